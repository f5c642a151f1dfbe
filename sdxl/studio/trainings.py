"""Trainings of a project: `train.py` in a process that outlives the page, and what it tells on the way.

    trainings/1/pictures.tar   what it learns
                inputs.json    what was asked for, and what that became
                log.txt, lock  see `doors`
                sdxl-train-…   its workspace while it runs
                trained_model.tar, report.html   when it has finished
                seen/          history.json and previews of a finished training

Knows files and signals; does not know how a training works or how it is shown.
"""

import contextlib
import os
import re
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl.errors import UserInputError
from sdxl.files.archives import in_place
from sdxl.history import FILE, History
from sdxl.settings import resolve_seed
from sdxl.studio import doors
from sdxl.studio.picture_set import PictureSet
from sdxl.studio.projects import Project, read_json, write_json
from sdxl.workspace import OUTPUT, PREVIEWS, REPORT, RESULT

_PICTURES, _INPUTS, _PROCESS, _SEEN = "pictures.tar", "inputs.json", "process.json", "seen"
_ENDS_ON_SIGNAL = re.compile(r"kill -USR1 (\d+)")
"""What the log says from the moment on when the process ends early by a signal."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a training is."""

    state: str
    """"preparing", "training", "done", "failed"."""
    step: int
    steps: int
    message: str
    """One sentence for people: what it does, or why it failed."""
    history: History
    folder: Path
    """In which the previews of the history are."""

    @property
    def seconds_left(self) -> float | None:
        """None as long as that is unknown."""
        done = self.history.steps
        if self.state != "training" or len(done) < 2 or done[-1].seconds <= 0:
            return None
        each = (done[-1].seconds - done[0].seconds) / (done[-1].step - done[0].step or 1)
        return each * (self.steps - self.step)


class Training:
    """One training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def number(self) -> int:
        return int(self.folder.name)

    @property
    def result(self) -> Path:
        """The tar, once it has finished."""
        return self.folder / RESULT

    @property
    def report(self) -> Path:
        return self.folder / REPORT

    @property
    def is_running(self) -> bool:
        return doors.is_running(self.folder)

    @property
    def can_go_on(self) -> bool:
        """Whether it ended without a result, and may end otherwise: what refused its inputs at the start will do so again."""
        if self.is_running or self.result.is_file():
            return False
        return any(self._workspaces()) or doors.refusal(doors.log_of(self.folder)) is None

    def _workspaces(self) -> Iterator[Path]:
        return self.folder.glob("sdxl-train-*")

    @property
    def log_end(self) -> str:
        """The last lines of its log, without what progress bars wrote over."""
        lines = [line.strip() for line in doors.log_of(self.folder).splitlines() if line.strip()]
        return "\n".join(line for line in lines if "%|" not in line or line == lines[-1])[-4000:]

    @property
    def resolved(self) -> Mapping[str, Any]:
        """The settings that the inputs became."""
        return read_json(self.folder / _INPUTS, {}).get("resolved", {})

    def go(self) -> None:
        """Start it, or go on from its last state.

        Raises:
            UserInputError: it runs already.
        """
        inputs = read_json(self.folder / _INPUTS, {})["inputs"]
        given = {"input_images": self.folder / _PICTURES, **inputs, "resume": "auto"}
        if self.is_running:
            raise UserInputError("This training is running already.")
        (self.folder / doors.LOG).unlink(missing_ok=True)
        process = doors.start(doors.command("train", given, self.folder), self.folder)
        write_json(self.folder / _PROCESS, process.pid)

    def stop(self) -> str:
        """End it early with the best so far, or before its first step at once. Returns a sentence on what happens."""
        told = _ENDS_ON_SIGNAL.search(doors.log_of(self.folder))
        if not self.is_running:
            return "It does not run."
        if told is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(told[1]), signal.SIGUSR1)
            return "It ends after this step, and keeps the best so far. That takes a minute."
        with contextlib.suppress(ProcessLookupError):
            os.kill(read_json(self.folder / _PROCESS, 0), signal.SIGTERM)
        doors.note_stop(self.folder)
        return "It is stopped. It had learned nothing yet."

    @property
    def progress(self) -> Progress:
        """How far it is, from its files and its log."""
        running = self.is_running
        history, folder = self._history()
        steps = int(self.resolved.get("max_train_steps") or 0)
        step = history.steps[-1].step if history.steps else 0
        log = doors.log_of(self.folder)
        if shown := re.findall(r"(\d+)/(\d+) \[[^\]]*step", log):
            step, steps = max(step, int(shown[-1][0])), int(shown[-1][1])
        if self.result.is_file() and not running:
            chosen = history.choice
            message = f"Step {chosen.step} is kept. {chosen.reason}" if chosen else "It has finished."
            state = "done"
        elif not running:
            state, message = "failed", doors.last_words(log)
        elif step:
            state = "training"
            message = "It packs the result." if step >= steps else ""
        else:
            state, message = "preparing", _what_it_does(log)
        return Progress(state=state, step=step, steps=steps, message=message, history=history, folder=folder)

    def _history(self) -> tuple[History, Path]:
        """What has happened, and the folder in which its previews are."""
        if self.result.is_file() and not (self.folder / _SEEN).is_dir():
            _look_into(self.result, self.folder / _SEEN)
        running = [folder / OUTPUT for folder in self._workspaces()]
        for folder in [self.folder / _SEEN, *running]:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return History.read(folder), folder
        return History(), self.folder


def begin(project: Project, inputs: Mapping[str, Any], resolved: Mapping[str, Any]) -> Training:
    """Start a training on the pictures of a project.

    Raises:
        UserInputError: one runs already, or there are no pictures.
    """
    last = latest(project)
    if last is not None and last.is_running:
        raise UserInputError("A training of this project is running: stop it first, or wait.")
    training = Training(project.new("trainings"))
    try:
        PictureSet(project).pack(training.folder / _PICTURES)
    except UserInputError:
        training.folder.rmdir()
        raise
    # The seed is named so that the training can go on from a state.
    named = {"seed": resolve_seed(None), **inputs}
    write_json(training.folder / _INPUTS, {"inputs": named, "resolved": dict(resolved)})
    training.go()
    return training


def all_of(project: Project) -> list[Training]:
    """The trainings of a project, the newest first."""
    folders = [path for path in project.trainings.glob("*") if path.name.isdecimal()]
    return [Training(path) for path in sorted(folders, key=lambda path: -int(path.name))]


def latest(project: Project) -> Training | None:
    """The newest training of a project."""
    return next(iter(all_of(project)), None)


def seconds_of_a_step(trainings: list[Training], resolved: Mapping[str, Any]) -> float | None:
    """Seconds of a step in the last finished training with the same base, kind, size and batch; None if there is none."""
    alike = ("base", "is_lora", "resolution", "train_batch_size", "lora_targets")
    for training in trainings:
        if all(training.resolved.get(name) == resolved.get(name) for name in alike):
            steps = training.progress.history.steps
            if len(steps) > 1:
                return (steps[-1].seconds - steps[0].seconds) / (len(steps) - 1)
    return None


def _what_it_does(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    if any("kill -USR1" in line for line in lines):
        return "It draws the first previews."
    if any(line.startswith("Encoding pictures") for line in lines):
        return "It looks at the pictures."
    return "It loads the model. The first time this can take minutes, because the model is downloaded."


def _look_into(tar: Path, folder: Path) -> None:
    """Copy the history and the previews out of a result, without unpacking its weights."""
    for name, (begin_at, size) in (in_place(tar) or {}).items():
        if name.name == FILE or PREVIEWS in name.parts:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with tar.open("rb") as file:
                file.seek(begin_at)
                target.write_bytes(file.read(size))
