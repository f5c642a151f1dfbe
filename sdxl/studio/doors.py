"""The entry points, called as a command line calls them: each in a process of its own.

A file of a stranger that fills the memory, or hours of work, then take nothing down with them. Knows how a process is started
and what its log says at the end; does not know what an entry point does.
"""

import fcntl
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from sdxl import settings
from sdxl.errors import UserInputError

HERE = Path(__file__).parents[2]
"""The folder of the entry points."""
LOG, LOCK = "log.txt", "lock"
_STOPPED = "Stopped."
"""The last line of an entry point that SIGTERM ends."""


def command(door: str, inputs: Mapping[str, object], output: Path) -> list[str]:
    """The command line of `train`, `preprocess` or `predict` with these inputs, into the folder `output`."""
    given = [word for name, value in inputs.items() for word in ("-i", f"{name}={_as_text(value)}")]
    return [sys.executable, str(HERE / f"{door}.py"), *given, "-o", str(output)]


def _as_text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"@{value}" if isinstance(value, Path) else str(value)


def run(line: Sequence[str], folder: Path, **variables: str) -> str:
    """Run a command line to its end; its log is in `folder`. Returns what it wrote.

    variables: of the environment, for this process.

    Raises:
        UserInputError: it failed; the message is the sentence that it ended with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    process = start(line, folder, **variables)
    code = process.wait()
    told = log_of(folder)
    if code:
        raise UserInputError(last_words(told))
    return told


def start(line: Sequence[str], folder: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Start a command line that outlives this process. It writes its log into `folder`, and holds a lock there until it ends.

    Raises:
        UserInputError: another one runs in this folder.
    """
    with (folder / LOG).open("ab") as log, (folder / LOCK).open("w") as lock:
        if not _taken(lock):
            raise UserInputError("This is running already: wait until it has finished.")
        return subprocess.Popen(
            line,
            cwd=Path.cwd(),
            env=settings.environment(SDXL_WORKSPACE=str(folder), **variables),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock.fileno(),),  # the system releases the lock when the last process that has it ends
            start_new_session=True,
        )


def is_running(folder: Path) -> bool:
    """Whether a process that `start` started in `folder` still runs, whoever started it."""
    try:
        with (folder / LOCK).open() as lock:
            return not _taken(lock)
    except FileNotFoundError:
        return False


def _taken(lock: IO[str]) -> bool:
    """Take the lock until the file is closed; False if another process has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def log_of(folder: Path, *, most: int = 400_000) -> str:
    """The end of the log in `folder`, at most so many bytes; empty if there is none."""
    try:
        with (folder / LOG).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - most))
            return file.read().decode(errors="replace").replace("\r", "\n")
    except FileNotFoundError:
        return ""


def note_stop(folder: Path) -> None:
    """Write into the log what a process says that is stopped: at its very start it cannot say so itself."""
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(f"\n{_STOPPED}\n")


def refusal(log: str) -> str | None:
    """The sentence with which an entry point refused its inputs; None if it did not."""
    for line in map(str.strip, reversed(log.splitlines())):
        if line.startswith("Error: "):
            return line.removeprefix("Error: ")
        if line.endswith(" See --help."):
            return line.removesuffix(" See --help.")
    return None


def last_words(log: str) -> str:
    """The sentence with which a failed process ended, for people."""
    if refused := refusal(log):
        return refused
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    end = lines[-1] if lines else "it says nothing"
    if end == _STOPPED:
        return "It was stopped."
    if "%|" in end:  # a bar of progress
        return "It ended unexpectedly in the middle of its work: another program ended it, or the memory was full."
    return f"It ended unexpectedly. The last line of its log: {end[:200]}"
