"""Run an entry point without a container: `python train.py -i name=value -i file=@path -o DIR`.

Reads the inputs from the entry point's signature, as declared to Cog, and follows the grammar of Cog's own command line.
Knows the attributes of a declared input (default, description, ge, le, choices, deprecated); does not import cog.
"""

import argparse
import difflib
import inspect
import os
import shutil
import signal
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NoReturn

from sdxl.errors import UserInputError
from sdxl.files.archives import atomic_path
from sdxl.files.fetching import is_remote

_REQUIRED = object()


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
    """The object that `cog.Input(...)` returned."""

    @property
    def default(self) -> Any:
        """The value if the user gives none; `_REQUIRED` if the user must give one."""
        default = self.declaration.default
        if default is None:
            return None if self.optional else _REQUIRED
        return default

    def parse(self, text: str) -> Any:
        """Convert `text` to this input's type and check it.

        Raises:
            UserInputError: wrong type, out of range, not one of the choices, or no such file.
        """
        value = self._convert(text)
        declared = self.declaration
        if declared.choices and value not in declared.choices:
            raise UserInputError(
                f"{self.name} is {text!r}, but must be one of {', '.join(map(str, declared.choices))}."
            )
        if declared.ge is not None and value < declared.ge:
            raise UserInputError(f"{self.name} is {text}, but must be at least {declared.ge}.")
        if declared.le is not None and value > declared.le:
            raise UserInputError(f"{self.name} is {text}, but must be at most {declared.le}.")
        return value

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
            return self.kind(text)
        except ValueError as error:
            expected = {int: "an integer", float: "a number"}.get(self.kind, self.kind.__name__)
            raise UserInputError(f"{self.name} is {text!r}, but must be {expected}.") from error

    def describe(self) -> str:
        """The help text: name, type, default and range in one line, the wrapped description below it."""
        declared = self.declaration
        facts = ["file" if issubclass(self.kind, PurePath) else self.kind.__name__]
        if self.default is _REQUIRED:
            facts.append("required")
        elif self.default is not None:
            facts.append(f"default {self.default!r}")
        if declared.ge is not None or declared.le is not None:
            facts.append(
                f"from {declared.ge}" + (f" to {declared.le}" if declared.le is not None else "")
                if declared.ge is not None
                else f"up to {declared.le}"
            )
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
    hints = typing.get_type_hints(entry_point)
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


def run_command_line(
    entry_point: Callable[..., Any],
    *,
    description: str,
    setup: Callable[[], None] = lambda: None,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse `argv`, run `setup` and `entry_point`, move the returned files into the output folder and print their paths.

    Sets `SDXL_WORKSPACE` to the output folder unless the user has set it: the checkpoints of a killed run are then
    where the user looks for them.

    Returns the exit code: 0 for success, 1 for a failed run, 2 for wrong inputs, 130 for Ctrl-C or SIGTERM.
    """
    inputs = declared_inputs(entry_point)
    parser = argparse.ArgumentParser(
        prog=f"python {Path(sys.argv[0]).name}",
        usage="%(prog)s -i NAME=VALUE [-i NAME=@FILE ...] [-o DIR]",
        description=description,
        epilog="inputs:\n" + "\n".join(declared.describe() for declared in inputs.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-i",
        "--input",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an input; write @ before the path of a file",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(), metavar="DIR", help="folder for the results"
    )
    arguments = parser.parse_args(argv)

    # Reject wrong inputs before anything is created or loaded.
    try:
        values = _parse_all(arguments.input, inputs)
    except UserInputError as error:
        print(f"{error} See --help.", file=sys.stderr)
        return 2

    # SIGTERM, which `kill` and `docker stop` send, ends the run as Ctrl-C does.
    is_new_folder = not arguments.output.exists()
    arguments.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("SDXL_WORKSPACE", str(arguments.output))
    previous_handler = signal.signal(signal.SIGTERM, _stop)
    try:
        setup()
        for path in _deliver(entry_point(**values), arguments.output):
            print(path)
    except UserInputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
        if is_new_folder and not any(arguments.output.iterdir()):
            arguments.output.rmdir()
    return 0


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _parse_all(items: Sequence[str], inputs: dict[str, DeclaredInput]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            raise UserInputError(f"-i {item} is not an input: write -i name=value.")
        if name not in inputs:
            similar = difflib.get_close_matches(name, inputs, n=1)
            hint = f"did you mean {similar[0]}?" if similar else "choose one from the list of inputs."
            raise UserInputError(f"There is no input {name}: {hint}")
        value = inputs[name].parse(text)
        if inputs[name].many:
            values.setdefault(name, []).append(value)
            continue
        if name in values:
            raise UserInputError(f"{name} is given twice: give it once.")
        values[name] = value
    for name, declared in inputs.items():
        if name not in values:
            if declared.default is _REQUIRED:
                raise UserInputError(f"{name} is missing: add -i {name}=...")
            values[name] = declared.default
    return values


def _existing(path: str, name: str) -> Path:
    if not Path(path).exists():
        raise UserInputError(f"{name} is {path}, which does not exist: give an existing file.")
    return Path(path)


def _deliver(result: Any, folder: Path) -> list[Path]:
    """Move the returned files atomically into `folder`, and remove their old folders if these are now empty."""
    delivered = []
    files = [Path(file) for file in (result if isinstance(result, list) else [result])]
    for file in files:
        with atomic_path(folder / file.name) as partial:
            shutil.move(file, partial)
        delivered.append(folder / file.name)
    for old_folder in {file.parent for file in files} - {folder}:
        if not any(old_folder.iterdir()):
            old_folder.rmdir()
    return delivered
