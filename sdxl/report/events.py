"""Event files for TensorBoard, if the package `tensorboard` is installed. They follow a history while it grows.

Knows a history and TensorBoard's names; does not know a training. torch has the writer, which needs that package.
"""

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdxl.history import Check, History, Previews, Step

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 10


class EventFiles:
    """Writes what is new in a history as events, into a folder that appears with the first of them.

    Failures are told once and end the writing: they concern no training.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._on = importlib.util.find_spec("tensorboard") is not None
        self._steps = self._previews = 0

    def update(self, history: History, *, checks: bool = False) -> None:
        """Write the steps and previews that were added since the last call.

        Paths of previews are relative to the parent of the events' folder.

        checks: write all checks too. Their scores are compared with each other, so they are known when the last is.
        """
        if not self._on:
            return
        try:
            self._write(history)
            for check in history.checks if checks else ():
                for name, value in _of_check(check):
                    self._writer.add_scalar(name, value, check.step)
        except Exception as error:
            self._on = False
            log.warning("The event files for TensorBoard end here, because writing them failed: %s.", error)

    def close(self) -> None:
        """Write everything to disk."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, history: History) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), flush_secs=_FLUSH_SECONDS)
        for step in history.steps[self._steps :]:
            for name, value in _of_step(step):
                self._writer.add_scalar(name, value, step.step)
        for shown in history.previews[self._previews :]:
            for name, value in _of_previews(shown):
                self._writer.add_scalar(name, value, shown.step)
            for number, name in enumerate(shown.pictures):
                picture = _picture(f"previews/{number}", self._folder.parent / name)
                self._writer.file_writer.add_summary(picture, shown.step)
        self._steps, self._previews = len(history.steps), len(history.previews)


def _of_step(step: Step) -> Iterator[tuple[str, float]]:
    yield "training/loss", step.loss
    yield "rates/weights", step.learning_rate
    yield "rates/tokens", step.ti_learning_rate
    yield "machine/seconds", step.seconds
    if step.memory_gib:
        yield "machine/memory_gib", step.memory_gib


def _of_previews(shown: Previews) -> Iterator[tuple[str, float]]:
    if shown.likeness is not None:
        yield "previews/likeness", shown.likeness
    if shown.prompt_shown is not None:
        yield "previews/prompt_shown", shown.prompt_shown


def _of_check(check: Check) -> Iterator[tuple[str, float]]:
    """At full strength under plain names; other strengths have names of their own."""
    suffix = "" if check.strength == 1 else f"_at_{check.strength:g}"
    yield f"checks/score{suffix}", check.score
    yield f"checks/drift{suffix}", check.drift
    yield f"checks/followed{suffix}", check.followed
    for band, loss in check.held_out.items():
        yield f"held_out/{band}{suffix}", loss


def _picture(tag: str, path: Path) -> Any:
    """A picture's file as an event. `add_image` would encode it anew, as PNG: a second for four previews."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportMissingImports]

    with Image.open(path) as opened:
        width, height = opened.size
    shown = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
    return Summary(value=[Summary.Value(tag=tag, image=shown)])
