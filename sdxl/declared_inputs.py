"""The inputs that an entry point declares to Cog, and their values in the declared types.

Knows the attributes of a declared input (default, description, ge, le, choices, deprecated); does not import cog, and
does not know what the inputs mean.
"""

import difflib
import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from sdxl.errors import UserInputError, shortened
from sdxl.files.fetching import existing, is_remote
from sdxl.files.sources import allowed_file

_DECLARED = "_declared_hints"
"""Attribute of an entry point: its type hints as they are written."""
REQUIRED = object()
"""The default of an input that must be given."""


@dataclass(frozen=True, kw_only=True)
class DeclaredInput:
    """One input of an entry point."""

    name: str
    kind: type
    """str, int, float, bool or a Path class."""
    optional: bool
    """Whether the user may omit it; it is then None."""
    many: bool = False
    """Whether it is a list; each `-i` adds one value."""
    declaration: Any
    """The object that `cog.Input(...)` returned. Cog's server puts its default into the signature instead."""

    @property
    def default(self) -> Any:
        """The value if the user gives none; `REQUIRED` if the user must give one."""
        default = getattr(self.declaration, "default", self.declaration)
        if default is None:
            return None if self.optional else REQUIRED
        return default

    def typed(self, value: Any) -> Any:
        """Convert a JSON value to this input's type. Cog hands them over as they came: an integer may be 7.0.

        An empty text for a file, or for what may be omitted, is None.

        Raises:
            UserInputError: not an integer where one is declared, not Unicode, empty where a file is required, or a path
                from strangers.
        """
        if isinstance(value, list | tuple):
            return [self._typed_item(item) for item in value]
        if self._is_left_out(value):
            return None
        if issubclass(self.kind, PurePath) and isinstance(value, str):
            value = allowed_file(value, self.name)
        return self._typed_item(value)

    def parse(self, text: str) -> Any:
        """Convert `text` to this input's type and check it; an empty text is treated as in `typed`.

        Raises:
            UserInputError: wrong type, out of range, not one of the choices, or no such file.
        """
        if not self.many and self._is_left_out(text):
            return None
        value = self._convert(text)
        self._require_in_range(value, text)
        return value

    def checked(self, value: Any) -> Any:
        """`typed` for servers without Cog's schema in front of them: check a JSON value first. None is the default.

        Raises:
            UserInputError: missing, wrong type, out of range, or not one of the choices.
        """
        if value is None:
            if self.default is REQUIRED:
                raise UserInputError(f"{self.name} is missing: give a value.")
            return self.default
        if self.many and not isinstance(value, list):
            raise UserInputError(f"{self.name} is {shortened(repr(value))}, but must be a list.")
        for item in value if self.many else [value]:
            self._require_kind(item)
        value = self.typed(value)
        for item in value if self.many else [value] * (value is not None):
            self._require_in_range(item, shortened(str(item)))
        return value

    def _require_kind(self, value: Any) -> None:
        told = {bool: "true or false", int: "an integer", float: "a number"}.get(self.kind, "a text")
        if self.kind in (int, float):  # `typed` makes an integer of 7.0; Python counts true as an integer
            fits = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
            fits &= not isinstance(value, bool)
        else:
            fits = isinstance(value, bool if self.kind is bool else str)
        if not fits:
            raise UserInputError(f"{self.name} is {shortened(repr(value))}, but must be {told}.")

    def _require_in_range(self, value: Any, shown: str) -> None:
        """Check the declared choices and limits; `shown` is the value as messages show it."""
        declared = self.declaration
        if declared.choices and value not in declared.choices:
            raise UserInputError(
                f"{self.name} is {shown!r}, but must be one of {', '.join(map(str, declared.choices))}."
            )
        if declared.ge is not None and value < declared.ge:
            raise UserInputError(f"{self.name} is {shown}, but must be at least {declared.ge}.")
        if declared.le is not None and value > declared.le:
            raise UserInputError(f"{self.name} is {shown}, but must be at most {declared.le}.")

    def _typed_item(self, value: Any) -> Any:
        # Bytes of a command line that are not UTF-8 become half characters, which no tokenizer and no file takes.
        if isinstance(value, str) and not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise UserInputError(f"{self.name} is {shortened(value)!r}, but must be UTF-8.")
        return self._whole(value)

    def _is_left_out(self, value: object) -> bool:
        """Whether `value` is an empty text that stands for None. An empty text for a required file is an error."""
        if not isinstance(value, str) or value.strip():
            return False
        if self.default is REQUIRED and issubclass(self.kind, PurePath):
            raise UserInputError(f"{self.name} is missing: give a file, a data: URI or an http(s) URL.")
        return self.default is None

    def _whole(self, value: Any) -> Any:
        """`value` as an int if this input is one."""
        if self.kind is not int or not isinstance(value, float):
            return value
        if not value.is_integer():
            raise UserInputError(f"{self.name} is {value:g}, but must be an integer.")
        return int(value)

    def _convert(self, text: str) -> Any:
        if issubclass(self.kind, PurePath):
            return text if is_remote(text) else _existing(text.removeprefix("@"), self.name)
        if text.startswith("@"):
            return str(_existing(text[1:], self.name))  # such inputs take a path or a URL
        if self.kind is bool:
            booleans = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            if text.lower() not in booleans:
                raise UserInputError(f"{self.name} is {text!r}, but must be true or false.")
            return booleans[text.lower()]
        try:
            is_written_as_float = self.kind is int and not text.strip("+-").isdecimal()
            value = float(text) if is_written_as_float else self.kind(text)
        except ValueError as error:
            expected = {int: "an integer", float: "a number"}.get(self.kind, self.kind.__name__)
            raise UserInputError(f"{self.name} is {text!r}, but must be {expected}.") from error
        return self._whole(value)

    def describe(self) -> str:
        """The help text: name, type, default and range in one line, the wrapped description below it."""
        declared = self.declaration
        facts = ["file" if issubclass(self.kind, PurePath) else self.kind.__name__]
        if self.default is REQUIRED:
            facts.append("required")
        elif self.default is not None:
            facts.append(f"default {self.default!r}")
        if declared.ge is not None:
            facts.append(f"from {declared.ge}" + (f" to {declared.le}" if declared.le is not None else ""))
        elif declared.le is not None:
            facts.append(f"up to {declared.le}")
        if declared.choices:
            facts.append("one of " + ", ".join(map(str, declared.choices)))
        if self.many:
            facts.append("repeat for several values")
        if declared.deprecated:
            facts.append("deprecated")
        wrapped = textwrap.fill(
            declared.description or "", 100, initial_indent="      ", subsequent_indent="      "
        )
        return f"  {self.name} ({'; '.join(facts)})\n{wrapped}"


def declared_inputs(entry_point: Callable[..., Any]) -> dict[str, DeclaredInput]:
    """The inputs of a Cog function or bound method, in the order of its signature."""
    hints = getattr(entry_point, _DECLARED, None) or typing.get_type_hints(entry_point)
    inputs = {}
    for name, parameter in inspect.signature(entry_point).parameters.items():
        kind, optional = hints[name], False
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            optional = type(None) in typing.get_args(kind)
            kind = next(argument for argument in typing.get_args(kind) if argument is not type(None))
        many = typing.get_origin(kind) is list
        if many:
            [kind] = typing.get_args(kind)
        inputs[name] = DeclaredInput(
            name=name, kind=kind, optional=optional, declaration=parameter.default, many=many
        )
    return inputs


def leave_downloads_to_us(entry_point: Callable[..., Any]) -> None:
    """Make Cog's server hand over the files of a function's inputs as texts: URLs or `data:` URIs.

    It would fetch them itself, before any other code runs: from any address, and without a limit on size or time. The server
    goes by the types at run time; the schema, by which clients know files, is made from the source.
    """
    declared = typing.get_type_hints(entry_point)
    setattr(entry_point, _DECLARED, declared)
    texts = {}
    for name, kind in declared.items():
        kinds = typing.get_args(kind) or (kind,)
        if name != "return" and any(isinstance(one, type) and issubclass(one, PurePath) for one in kinds):
            texts[name] = str | None if type(None) in kinds else str
    entry_point.__annotations__ = declared | texts


def as_declared(entry_point: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs among `given`, such as all local variables, each converted to its declared type.

    Raises:
        UserInputError: a value cannot be converted, or a required file is empty.
    """
    inputs = declared_inputs(entry_point)
    return {name: declared.typed(given[name]) for name, declared in inputs.items() if name in given}


def checked_inputs(entry_point: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """All inputs of `entry_point` from a JSON object, each checked and in its declared type; defaults where none is given.

    Raises:
        UserInputError: an input is wrong or unknown.
    """
    inputs = declared_inputs(entry_point)
    for name in given:
        require_known(name, inputs)
    return {name: declared.checked(given.get(name)) for name, declared in inputs.items()}


def require_known(name: str, inputs: Mapping[str, DeclaredInput]) -> None:
    """Refuse a name that no input has.

    Raises:
        UserInputError: with the name that may be meant.
    """
    if name not in inputs:
        similar = difflib.get_close_matches(name, inputs, n=1)
        hint = f"did you mean {similar[0]}?" if similar else "choose one from the list of inputs."
        raise UserInputError(f"There is no input {shortened(name)}: {hint}")


def _existing(path: str, name: str) -> Path:
    found = existing(path)
    if found is None:
        raise UserInputError(f"{name} is {shortened(path)}, which does not exist: give an existing file.")
    return found
