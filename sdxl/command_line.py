"""Run an entry point without a container: `python train.py -i name=value -i file=@path -o DIR`.

Reads the inputs from the entry point's signature, as declared to Cog, and follows the grammar of Cog's own command line.
Knows how a command line runs and ends; does not import cog.
"""

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sdxl.declared_inputs import REQUIRED, DeclaredInput, declared_inputs, require_known
from sdxl.errors import UserInputError, WithheldError
from sdxl.files.archives import atomic_path

Drawn = list[tuple[Mapping[str, Any], list[Path]]]
"""The inputs and the delivered files of each run."""


@dataclass(frozen=True, kw_only=True)
class ManyRuns:
    """An option that names a file, and calls the entry point once for each entry of it."""

    flag: str
    help: str
    beside: str
    """The input for a few entries, which takes no file itself."""
    read: Callable[[Path, Mapping[str, Any]], list[dict[str, Any]]]
    """The inputs of each run, from the file and the inputs that are given beside it."""
    sum_up: Callable[[Drawn, Path], list[Path]]
    """Writes files about all runs into the output folder; returns them."""


def run_command_line(
    entry_point: Callable[..., Any],
    *,
    description: str,
    setup: Callable[[], None] = lambda: None,
    argv: Sequence[str] | None = None,
    many: ManyRuns | None = None,
) -> int:
    """Parse `argv`, run `setup` and `entry_point`, move the returned files into the output folder and print their paths.

    Sets `SDXL_WORKSPACE` to the output folder unless the user has set it: the checkpoints of a killed run are then
    where the user looks for them.

    many: an option for several runs; the names of their files begin with the number of the run.

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
    add_input_option(parser, "an input; write @ before the path of a file")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(), metavar="DIR", help="folder for the results"
    )
    if many is not None:
        parser.add_argument(many.flag, dest="many", type=Path, metavar="FILE", help=many.help)
    arguments = parser.parse_args(argv)
    file: Path | None = arguments.many if many else None

    # Reject wrong inputs before anything is created or loaded.
    try:
        if many and any(item.startswith(f"{many.beside}=@") for item in arguments.input):
            raise UserInputError(f"{many.beside} takes no file: give it as {many.flag} FILE.")
        values = parse_inputs(arguments.input, inputs)
        runs = many.read(file, values) if many and file else [values]
    except UserInputError as error:
        print(f"{error} See --help.", file=sys.stderr)
        return 2

    os.environ.setdefault("SDXL_WORKSPACE", str(arguments.output))

    def work() -> None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        setup()
        if many and file:
            for path in _deliver_all(entry_point, runs, many, arguments.output):
                print(path, flush=True)
            return
        for path in deliver(entry_point(**values), arguments.output):
            print(path)

    return run_into(arguments.output, work)


def add_input_option(parser: argparse.ArgumentParser, told: str) -> None:
    """Add `-i NAME=VALUE`, which may be given many times and is read by `parse_inputs`. told: its help."""
    parser.add_argument("-i", "--input", action="append", default=[], metavar="NAME=VALUE", help=told)


def run_into(output: Path, work: Callable[[], None]) -> int:
    """Run `work`, which writes into the folder `output`; return the exit code: 0, 1 for a failed run, 130 for Ctrl-C.

    SIGTERM, which `kill` and `docker stop` send, ends the run as Ctrl-C does. A new folder is removed if it stays empty.
    """
    is_new_folder = not output.exists()
    previous_handler = signal.signal(signal.SIGTERM, _stop)
    try:
        work()
    except UserInputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
        if is_new_folder and output.exists() and not any(output.iterdir()):
            output.rmdir()
    return 0


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def parse_inputs(items: Sequence[str], inputs: dict[str, DeclaredInput]) -> dict[str, Any]:
    """All inputs, from texts such as "name=value"; defaults where none is given.

    Raises:
        UserInputError: an input is wrong, unknown, missing or given twice.
    """
    values: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            raise UserInputError(f"-i {item} is not an input: write -i name=value.")
        require_known(name, inputs)
        value = inputs[name].parse(text)
        if inputs[name].many:
            values.setdefault(name, []).append(value)
            continue
        if name in values:
            raise UserInputError(f"{name} is given twice: give it once.")
        values[name] = value
    for name, declared in inputs.items():
        if name not in values:
            if declared.default is REQUIRED:
                raise UserInputError(f"{name} is missing: add -i {name}=...")
            values[name] = declared.default
    return values


def _deliver_all(
    entry_point: Callable[..., Any], runs: list[dict[str, Any]], many: ManyRuns, folder: Path
) -> Iterator[Path]:
    """Deliver the files of all runs one after another, and then what sums them up.

    Raises:
        UserInputError: a run failed, or all pictures were withheld. What was delivered before stays.
    """
    done: Drawn = []
    for number, inputs in enumerate(runs, start=1):
        prefix = f"{number:0{len(str(len(runs)))}}-"
        try:
            files = deliver(entry_point(**inputs), folder, prefix=prefix)
        except WithheldError as error:
            print(f"Run {number} of {len(runs)}: {error}", file=sys.stderr)
            files = []
        done.append((inputs, files))
        yield from files
    if not any(files for _, files in done):
        raise WithheldError("No run gave a picture: see the messages above.")
    yield from many.sum_up(done, folder)


def deliver(result: Any, folder: Path, *, prefix: str = "") -> list[Path]:
    """Move the returned files atomically into `folder`, and remove their old folders if these are now empty.

    prefix: put before the names of the files.
    """
    delivered = []
    files = [Path(file) for file in (result if isinstance(result, list) else [result])]
    for file in files:
        target = folder / f"{prefix}{file.name}"
        with atomic_path(target) as partial:
            shutil.move(file, partial)
        delivered.append(target)
    for old_folder in {file.parent for file in files} - {folder}:
        if not any(old_folder.iterdir()):
            old_folder.rmdir()
    return delivered
