"""Records a training: its history while it runs, and the report when it has finished.

Knows what is written and when; does not know how a page or an event file is made. Failures are told and stop no training.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl.files.archives import atomic_path
from sdxl.history import History, Step
from sdxl.report.events import EventFiles
from sdxl.workspace import EVENTS, REPORT

if TYPE_CHECKING:
    from sdxl.training.recipe import StepReport

log = logging.getLogger(__name__)

_EVERY_SECONDS = 5.0
"""Between two writes of the history while a training runs."""


class Recorder:
    """Fills the steps of a history, and writes what is made of it."""

    def __init__(
        self, history: History, folder: Path, *, asked: Mapping[str, Any], described: Mapping[str, str]
    ) -> None:
        """Write nothing yet.

        folder: where the result of the training will be.
        asked: the inputs that were given, by name.
        described: what an input means, by name.
        """
        self.history, self._folder = history, folder
        self._asked, self._described = asked, described
        self._advice: list[str] = []
        self._events = EventFiles(folder / EVENTS)
        self._written = float("-inf")

    def take_advice(self, advice: Sequence[str]) -> None:
        """Take the sentences on the pictures."""
        self._advice = [*advice]

    def before(self, then: Callable[["StepReport"], None]) -> Callable[["StepReport"], None]:
        """A function that records the report of a step, and calls `then` with it."""

        def record(report: "StepReport") -> None:
            self.history.steps.append(
                Step(
                    step=report.step,
                    loss=report.loss,
                    learning_rate=report.learning_rate,
                    ti_learning_rate=report.ti_learning_rate,
                    seconds=report.seconds,
                    memory_gib=report.memory_gib,
                )
            )
            self._events.update(self.history)
            self._write_now_and_then()
            then(report)

        return record

    def _write_now_and_then(self) -> None:
        """Write the history while the training runs, for whoever watches it from outside."""
        if time.monotonic() - self._written < _EVERY_SECONDS:
            return
        with contextlib.suppress(OSError):  # the end tells
            self._folder.mkdir(parents=True, exist_ok=True)
            self.history.write(self._folder)
        self._written = time.monotonic()

    def choice(self) -> dict[str, Any]:
        """Which moment was chosen and why, for the record of the run; nothing without a choice."""
        return {"choice": asdict(self.history.choice)} if self.history.choice else {}

    def finish(self, record: Mapping[str, Any], dataset_folder: Path) -> None:
        """Write the history and the report into the result, and a copy of the report beside the result's folder.

        record: the record of the run, as `training.json` has it.
        """
        self._events.update(self.history, checks=True)
        self._events.close()
        try:
            from sdxl.report.writing import write_report  # here: it imports torch

            self.history.write(self._folder)
            report = write_report(
                self._folder,
                history=self.history,
                record=record,
                dataset_folder=dataset_folder,
                advice=self._advice,
                asked=self._asked,
                described=self._described,
            )
            with atomic_path(self._folder.parent / REPORT) as partial:
                shutil.copy2(report, partial)
        except Exception as error:
            log.warning("There is no %s, because writing it failed: %s.", REPORT, error)
