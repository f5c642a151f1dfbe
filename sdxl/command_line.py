"""Run an entry point without a container: `python train.py -i name=value -i file=@path -o DIR`.

Reads the inputs from the entry point's signature, as declared to Cog, and follows the grammar of Cog's own command line.
Knows how a command line runs and ends; does not import cog.
"""

import argparse
import difflib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sdxl.declared_inputs import REQUIRED, DeclaredInput, declared_inputs
from sdxl.errors import UserInputError
from sdxl.files.archives import atomic_path


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

    os.environ.setdefault("SDXL_WORKSPACE", str(arguments.output))

    def work() -> None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        setup()
        for path in _deliver(entry_point(**values), arguments.output):
            print(path)

    return run_into(arguments.output, work)


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
            if declared.default is REQUIRED:
                raise UserInputError(f"{name} is missing: add -i {name}=...")
            values[name] = declared.default
    return values


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
