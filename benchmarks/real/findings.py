"""What a check finds, and how checks run: each on its own, so that one that fails does not stop the rest.

Knows names, expectations and seconds; does not know models.
"""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image

from sdxl.errors import NotEnoughMemoryError, UserInputError

if TYPE_CHECKING:
    from benchmarks.real.setup import Setup

Verdict = Literal["ok", "differs", "not for this base", "fact"]
Status = Literal["ok", "differs", "not for this base", "could not run"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One thing that was looked at."""

    what: str
    expected: str
    """Empty if there is no expectation."""
    found: str
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of a check, and what it shows."""

    image: Image.Image
    caption: str


class Notes:
    """What one check notes while it runs."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.pictures: list[Picture] = []

    def expect(
        self, what: str, expected: object, found: object, holds: bool, *, applies: bool = True
    ) -> None:
        """Note an expectation, and whether it holds.

        applies: False for an expectation that says nothing about this base.
        """
        verdict: Verdict = "not for this base" if not applies else "ok" if holds else "differs"
        self.lines.append(Line(what=what, expected=shown(expected), found=shown(found), verdict=verdict))

    def equal(self, what: str, expected: object, found: object, *, applies: bool = True) -> None:
        """Note that `found` should equal `expected`. Lists and tuples count as equal."""
        self.expect(what, expected, found, _plain(expected) == _plain(found), applies=applies)

    def between(
        self, what: str, low: float, high: float, found: float, *, unit: str = "", applies: bool = True
    ) -> None:
        """Note that a number should be from `low` to `high`."""
        # Written so that NaN, which compares as false with everything, differs.
        holds = low <= found <= high
        expected = f"{low:g} to {high:g}{unit}"
        self.expect(what, expected, f"{found:.4g}{unit}", holds, applies=applies)

    def at_most(self, what: str, high: float, found: float, *, unit: str = "", applies: bool = True) -> None:
        """Note that a number should be at most `high`."""
        self.expect(what, f"at most {high:g}{unit}", f"{found:.4g}{unit}", found <= high, applies=applies)

    def fact(self, what: str, found: object) -> None:
        """Note something without an expectation."""
        self.lines.append(Line(what=what, expected="", found=shown(found), verdict="fact"))

    def picture(self, image: Image.Image, caption: str) -> None:
        """Show a picture on the page."""
        self.pictures.append(Picture(image=image, caption=caption))


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check: its function's name, and the question that it answers."""

    name: str
    question: str
    run: Callable[[Setup, Notes], None]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of a check."""

    name: str
    question: str
    status: Status
    seconds: float
    peak_gib: float | None
    """The most GPU memory that PyTorch held during the check; None without a GPU."""
    lines: Sequence[Line] = ()
    pictures: Sequence[Picture] = field(default=(), repr=False)
    error: str = ""
    """Why the check could not run: one sentence, or a traceback."""

    def as_json(self) -> dict[str, Any]:
        """Everything except for the pictures, of which there are the captions."""
        rest = {key: value for key, value in vars(self).items() if key not in ("lines", "pictures")}
        lines = [asdict(line) for line in self.lines]
        return rest | {"lines": lines, "pictures": [picture.caption for picture in self.pictures]}


CHECKS: dict[str, Check] = {}
"""Name → check, in the order in which they run."""


def check(question: str) -> Callable[[Callable[[Setup, Notes], None]], Callable[[Setup, Notes], None]]:
    """Make a function a check that answers `question`."""

    def register(function: Callable[[Setup, Notes], None]) -> Callable[[Setup, Notes], None]:
        name = function.__name__
        CHECKS[name] = Check(name=name, question=question, run=function)
        return function

    return register


def run(name: str, setup: Setup) -> Finding:
    """Run one check. What it raises becomes part of the finding."""
    chosen, notes, error = CHECKS[name], Notes(), ""
    free_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    try:
        with torch.no_grad():
            chosen.run(setup, notes)
    except UserInputError as problem:  # its message is a sentence for people
        error = str(problem)
    except Exception as problem:
        too_large = NotEnoughMemoryError.behind(problem, smaller="run this check alone with --only")
        error = str(too_large) if too_large else traceback.format_exc()
    return Finding(
        name=name,
        question=chosen.question,
        status=_status(notes.lines, error),
        seconds=round(time.monotonic() - started, 1),
        peak_gib=round(torch.cuda.max_memory_reserved() / 2**30, 1) if torch.cuda.is_available() else None,
        lines=[_without_private_paths(line) for line in notes.lines],
        pictures=notes.pictures,
        error=without_private_paths(error),
    )


def _status(lines: Sequence[Line], error: str) -> Status:
    verdicts = {line.verdict for line in lines}
    if "differs" in verdicts:  # also if the check failed afterwards
        return "differs"
    if error:
        return "could not run"
    expectations = verdicts - {"fact"}
    return "not for this base" if expectations == {"not for this base"} else "ok"


def free_memory() -> None:
    """Free GPU memory that is no longer used. Also drop compiled shapes, which count against one limit."""
    if torch.cuda.is_available():
        torch._dynamo.reset()
        gc.collect()  # compiled modules refer to themselves
        torch.cuda.empty_cache()


def shown(value: object) -> str:
    """A value as people read it."""
    match value:
        case bool() | None:
            return {True: "yes", False: "no", None: "not given"}[value]
        case float():
            return f"{value:.5g}"
        case list() | tuple():
            return ", ".join(map(shown, value))
    return str(value)


def without_private_paths(text: str) -> str:
    """`text` without the folders that name the user: the page may be attached to a public report."""
    for folder, short in ((Path.cwd(), "."), (Path.home(), "~")):
        if len(folder.parts) > 1:  # never replace the root, which is part of every path
            text = text.replace(str(folder) + os.sep, short + os.sep)
    return text


def _without_private_paths(line: Line) -> Line:
    return Line(
        what=line.what,
        expected=line.expected,
        found=without_private_paths(line.found),
        verdict=line.verdict,
    )


def _plain(value: object) -> object:
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
