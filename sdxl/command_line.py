"""The doors without a container: `python train.py -i name=value -i file=@path -o DIR`.

The inputs are those that the door declares to Cog, read from its signature; the grammar is that of Cog's own command
line. Knows declared inputs by their attributes (default, description, ge, le, choices, deprecated); never imports cog.
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
from sdxl.process import repeat_on_cpu

_REQUIRED = object()


@dataclass(frozen=True, kw_only=True)
class DeclaredInput:
    """One input of a door."""

    name: str
    kind: type
    """str, int, float, bool or a Path class."""
    optional: bool
    """Whether it may be left out and then is None."""
    many: bool = False
    """Whether it is a list, of which each `-i` gives one value."""
    declaration: Any
    """What `cog.Input(...)` gave."""

    @property
    def default(self) -> Any:
        """The value when it is not given; `_REQUIRED` when it must be."""
        default = self.declaration.default
        if default is None:
            return None if self.optional else _REQUIRED
        return default

    def parse(self, text: str) -> Any:
        """The typed value of `text`.

        Raises:
            UserInputError: wrong type, out of range, not among the choices, or no such file.
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
            return str(_existing(text[1:], self.name))  # a path for an input that also takes URLs
        if self.kind is bool:
            truth = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            if text.lower() not in truth:
                raise UserInputError(f"{self.name} is {text!r}, but must be true or false.")
            return truth[text.lower()]
        try:
            return self.kind(text)
        except ValueError as error:
            wanted = {int: "a whole number", float: "a number"}.get(self.kind, self.kind.__name__)
            raise UserInputError(f"{self.name} is {text!r}, but must be {wanted}.") from error

    def describe(self) -> str:
        """Name, type, default and range in one line, the description wrapped under it."""
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
            facts.append("may be given several times")
        if declared.deprecated:
            facts.append("deprecated")
        wrapped = textwrap.fill(
            declared.description or "", 100, initial_indent="      ", subsequent_indent="      "
        )
        return f"  {self.name} ({'; '.join(facts)})\n{wrapped}"


def declared_inputs(door: Callable[..., Any]) -> dict[str, DeclaredInput]:
    """The inputs of a Cog function or bound method, in their order."""
    hints = typing.get_type_hints(door)
    inputs = {}
    for name, parameter in inspect.signature(door).parameters.items():
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
    door: Callable[..., Any],
    *,
    description: str,
    setup: Callable[[], None] = lambda: None,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse `argv`, run `setup` and `door`, move the files it returns into the output folder and print their paths.

    The run's own folder is made in the output folder too (`SDXL_WORKSPACE`, unless it is set), so that checkpoints of
    a killed run lie where the user looks. Returns the exit code: 0, 1 for a failed run, 2 for wrong inputs, 130 for
    Ctrl-C or SIGTERM.
    """
    repeat_on_cpu()
    inputs = declared_inputs(door)
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
        help="an input; @ before a path means its file",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(), metavar="DIR", help="folder for the results"
    )
    arguments = parser.parse_args(argv)
    try:
        values = _parse_all(arguments.input, inputs)
    except UserInputError as error:
        print(f"{error} See --help.", file=sys.stderr)
        return 2
    ours = not arguments.output.exists()
    arguments.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("SDXL_WORKSPACE", str(arguments.output))
    before = signal.signal(signal.SIGTERM, _stop)  # as `kill` and `docker stop` ask
    try:
        setup()
        for path in _deliver(door(**values), arguments.output):
            print(path)
    except UserInputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
        if ours and not any(arguments.output.iterdir()):
            arguments.output.rmdir()
    return 0


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _parse_all(given: Sequence[str], inputs: dict[str, DeclaredInput]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals:
            raise UserInputError(f"-i {item} is no input: write -i name=value.")
        if name not in inputs:
            near = difflib.get_close_matches(name, inputs, n=1)
            hint = f"did you mean {near[0]}?" if near else "look at the list of inputs."
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
        raise UserInputError(f"{name} names {path}, which does not exist: give an existing file.")
    return Path(path)


def _deliver(result: Any, folder: Path) -> list[Path]:
    """Move the returned files into `folder`, each appearing whole, and remove the folders they were made in."""
    delivered = []
    files = [Path(file) for file in (result if isinstance(result, list) else [result])]
    for file in files:
        with atomic_path(folder / file.name) as partial:
            shutil.move(file, partial)
        delivered.append(folder / file.name)
    for made_in in {file.parent for file in files} - {folder}:
        if not any(made_in.iterdir()):
            made_in.rmdir()
    return delivered
