"""One replica's work: draw the requests one after another with predict.py, and stop those whose clients went away.

Knows predict.py; does not know Ray or HTTP.
"""

import asyncio
import base64
import dataclasses
import logging
import mimetypes
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deploy.requests import FAILED, Answer, failed
from deploy.stoppable import run_stoppable
from predict import Predictor
from sdxl import settings
from sdxl.errors import NotEnoughMemoryError, StorageError, UserInputError
from sdxl.files.sources import allowed_fine_tune
from sdxl.serving.fine_tune_cache import FineTuneCache

log = logging.getLogger(__name__)

STOP_S = 60
"""Seconds that a cancelled drawing may take to stop. On a GPU that hangs it never does."""


class StrangersPredictor(Predictor):
    """predict.py for requests that come from strangers, without Cog."""

    @property
    def serves_strangers(self) -> bool:
        return True


class _OnDisk:
    """A fine-tune that is fetched and not read."""

    nbytes = 1


class Drawer:
    """Draws one request at a time. The fine-tunes of the next ones are fetched meanwhile."""

    def __init__(self) -> None:
        """Load the base, and warm up."""
        settings.set_behind_server(True)
        self.predictor = StrangersPredictor()
        self.predictor.setup()
        # It shares its folder with the painter's cache, and keeps nothing in memory.
        limits = dataclasses.replace(settings.cache_limits(), memory=0)
        self._fetched = FineTuneCache(settings.cache_folder(), limits, lambda files: _OnDisk())
        self._turn = asyncio.Lock()
        self._broken: str | None = None
        self._stops_until: float | None = None

    async def fetch(self, source: str) -> None:
        """Bring a fine-tune to this machine's disk, unless it is there. Drawing with it reads it into memory.

        That is left to the drawing, because reading compares with the base, which fine-tunes change while they are applied.

        Raises:
            UserInputError: it cannot be fetched, is not a fine-tune, or a stranger may not name it.
        """
        allowed = allowed_fine_tune(source, "replicate_weights")
        assert allowed is not None
        try:
            await run_stoppable(lambda: self._fetched.get(allowed))
        except Exception as error:
            told = StorageError.behind(error) or NotEnoughMemoryError.behind(error)
            if told is None:
                raise
            raise told from error

    async def draw(self, inputs: dict[str, Any]) -> Answer:
        """Draw a request of checked inputs, when its turn comes. If the task is cancelled, the drawing stops."""
        async with self._turn:
            started = time.monotonic()
            try:
                output, logs = await run_stoppable(lambda: self._draw(inputs), stopping=self._stopping)
            except UserInputError as error:
                return failed(error)
            except Exception:
                log.exception("A drawing failed")
                self._broken = await asyncio.to_thread(self._why_broken)
                return Answer(status=500, error=FAILED)
            finally:
                self._stops_until = None
            seconds = round(time.monotonic() - started, 3)
            return Answer(output=output, logs=logs, metrics={"predict_time": seconds})

    def require_health(self) -> None:
        """Raise if this process should be replaced: the GPU computes no more, or a cancelled drawing does not stop.

        Raises:
            RuntimeError: why.
        """
        if self._broken is not None:
            raise RuntimeError(self._broken)
        if self._stops_until is not None and time.monotonic() > self._stops_until:
            raise RuntimeError(f"A cancelled drawing has not stopped for {STOP_S} s.")

    def _stopping(self) -> None:
        self._stops_until = time.monotonic() + STOP_S

    def _draw(self, inputs: dict[str, Any]) -> tuple[list[str], str]:
        """The pictures as `data:` URIs, and what was logged. Their files are removed."""
        with _log_of_this_thread() as lines:
            files = [Path(file) for file in self.predictor.run(**inputs)]
        try:
            return [_data_uri(file) for file in files], "".join(f"{line}\n" for line in lines)
        finally:
            for folder in {file.parent for file in files}:
                shutil.rmtree(folder, ignore_errors=True)

    def _why_broken(self) -> str | None:
        """After an unexpected error: why this device computes no more. After some errors CUDA never does again."""
        try:
            torch.ones(8, device=self.predictor.painter.placement.device).sum().item()
        except RuntimeError as error:
            return f"The device computes no more: {error}"
        return None


@contextmanager
def _log_of_this_thread() -> Iterator[list[str]]:
    """The lines that this thread logs."""
    lines: list[str] = []
    thread = threading.get_ident()

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread:
                lines.append(record.getMessage())

    handler = Lines(logging.INFO)
    logging.getLogger().addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger().removeHandler(handler)


def _data_uri(file: Path) -> str:
    kind = mimetypes.guess_type(file)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
