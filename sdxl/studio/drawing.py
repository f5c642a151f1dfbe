"""Drawing: one process holds the model and draws what it is asked, one request after the other.

A crash there, or a GPU that runs out of memory, does not take the page down; the next request starts it anew. The page writes
one request a line to the process, and reads one answer a line. Knows how requests travel; does not know how pictures are made.
"""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from sdxl import settings
from sdxl.errors import UserInputError
from sdxl.studio import doors

_FAILED = "Drawing ended unexpectedly. Try again; the last lines of {log} say why."


class Drawer:
    """The process that draws, for all tabs. It starts with the first request."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        """command: starts a process that runs `serve`. folder: for its log and what it draws."""
        self._command, self.folder = command, folder
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def draw(self, inputs: Mapping[str, Any], target: Path) -> list[Path]:
        """Draw with these inputs of `predict`, into the new folder `target`; return the pictures.

        Raises:
            UserInputError: the entry point refuses the request, or the process ended.
        """
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(
                    json.dumps({"inputs": dict(inputs), "target": str(target.absolute())}) + "\n"
                )
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
            except (OSError, ValueError) as error:
                self._end()
                raise UserInputError(_FAILED.format(log=self.folder / doors.LOG)) from error
        if "error" in answer:
            raise UserInputError(answer["error"])
        return [Path(path) for path in answer["files"]]

    def free(self) -> None:
        """Give the memory of the model back, unless it draws just now: a training needs it."""
        if self._lock.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._lock.release()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / doors.LOG).open("wb") as log:
                self._process = subprocess.Popen(
                    self._command,
                    env=settings.environment(SDXL_WORKSPACE=str(self.folder)),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):  # what was not sent is lost with the process
                    assert pipe is not None
                    pipe.close()
            self._process.wait()
            self._process = None


def serve(draw: Callable[[Path, Mapping[str, Any]], Sequence[Path]]) -> None:
    """Answer requests from standard input, until it ends with the page. draw: draws with inputs of `predict` into a folder.

    Whatever writes to standard output meanwhile writes into the log.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        try:
            files = draw(Path(request["target"]), request["inputs"])
            answer: dict[str, Any] = {"files": [str(path) for path in files]}
        except UserInputError as error:
            answer = {"error": str(error)}
        except Exception as error:
            answer = {
                "error": f"Drawing failed: {type(error).__name__}. The log of the drawing has the details."
            }
        _answer(answers, answer)


def _answer(answers: IO[str], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
