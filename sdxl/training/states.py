"""When a run's state is saved: every so many steps, beside the training, and when the run stops.

    states = RunStates(folder, record, every=250)
    with states:
        first = states.begin(RunState(…))           # the number of steps that are done already
        for number in range(first, total):
            …                                       # gradients: what changes here is in `Order`
            with states.completing(number + 1):
                …                                   # the update: a stop waits for its end
    states.discard()                                # the result is safe

Knows moments, threads and CUDA's streams; does not know what a state consists of (run_state.py) or its files.
"""

import logging
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from sdxl.errors import WeightsError
from sdxl.files.weight_image import StoppedError, WeightImage
from sdxl.speed.memory import free_host_bytes
from sdxl.training.data_parallel import agreed, gathered, rank, sent, world_size
from sdxl.training.run_state import Order, RunState
from sdxl.training.state_files import SavedState, StateNotes, kinds
from sdxl.training.state_folders import RunFolder
from sdxl.training.stops import HeldStops

log = logging.getLogger(__name__)

_AT_ONCE = 1_500_000_000
"""Bytes of the largest state that is written when a run is cancelled. More would take longer than a cancel may."""

_POLL_S = 0.05
"""Seconds of one wait for a thread. A call that blocks longer could not be interrupted when a run is cancelled."""


class RunStates:
    """Saves the states of one run, and sets the run to the state that it goes on from."""

    def __init__(
        self,
        folder: RunFolder | None = None,
        record: Mapping[str, Any] | None = None,
        *,
        every: int = 0,
        seed: int = 0,
        pictures: str = "",
        goes_on: SavedState | None = None,
    ) -> None:
        """Without a folder or with 0 for `every`, nothing is saved.

        every: steps between two states.
        seed, pictures: see `StateNotes`.
        """
        self._folder, self._record, self._every = folder, record or {}, every if folder else 0
        self._seed, self._pictures, self._goes_on = seed, pictures, goes_on
        self._run: RunState | None = None
        self._boundary: tuple[int, Order] | None = None
        """The last complete step and the order after it; None while an update changes what trains."""
        self._stops = HeldStops()
        self._image: WeightImage | None = None
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        """CUDA's copies for a state that may still be under way."""
        self._writer: threading.Thread | None = None
        self._give_up = threading.Event()
        self._fails = False
        """Whether states cannot be saved any more."""
        self._saved_step = 0 if goes_on is None else goes_on.notes.step

    @property
    def goes_on(self) -> bool:
        """Whether the run goes on from a state."""
        return self._goes_on is not None

    def __enter__(self) -> "RunStates":
        self._stops.install()
        return self

    def begin(self, run: RunState) -> int:
        """Set `run` to the state that it goes on from, if any. Returns the number of steps that are done.

        Raises:
            WeightsError: the state does not fit this run.
        """
        self._run = run
        if self._goes_on is not None:
            _restore(run, self._goes_on)
            log.info("Going on after step %d, from %s.", self._saved_step, self._goes_on.folder)
        self._boundary = self._saved_step, run.order()
        if self._every and rank() == 0:
            assert self._folder is not None
            told = (
                "A state is saved every %d steps and when the run stops, in %s: resume=auto goes on from it."
            )
            log.info(told, self._every, self._folder.parent)
        return self._saved_step

    @contextmanager
    def completing(self, step: int) -> Iterator[None]:
        """In this context the step number `step`, from 1, changes what trains. A signal to stop waits for its end. Afterwards
        a state is saved if it is time for one."""
        if self._run is None or not self._every:
            yield
            return
        if self._copied is not None:  # what the next kernels change must have been copied
            torch.cuda.current_stream().wait_event(self._copied)
        self._stops.hold()
        self._boundary = None
        try:
            yield
            self._boundary = step, self._run.order()
        finally:
            self._stops.release()
        if step % self._every == 0:
            self._save()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an error or a stop, save the state of the last complete step."""
        self._stops.uninstall()
        if error is None or self._folder is None or rank() > 0:
            return
        if self._run is not None and self._every:
            try:
                self._save_last(is_stopped=not isinstance(error, Exception))
            except Exception as problem:  # the run's own error must be seen
                log.warning("The state could not be written: %s", problem)
        self.wait()
        self._folder.close()
        if self._folder.last is not None:
            log.info(
                "The state after step %d is in %s: give resume=auto.", self._saved_step, self._folder.last
            )

    def discard(self) -> None:
        """Delete the states of a run whose result is safe."""
        self._give_up.set()
        self.wait()
        if self._folder is not None and rank() == 0:
            self._folder.remove()

    def _save(self) -> None:
        """Copy the state and let a thread write it. A save before it that still goes on is waited for."""
        assert self._boundary is not None and self._run is not None
        step, own = self._boundary
        orders = gathered(own.as_json())  # in all processes, also in those that save nothing
        image = None
        if rank() == 0 and not self._fails:
            self.wait()
            image = self._room(pinned=True)
        has_room = image is not None
        if self._run.is_shared:  # then all processes give their parts
            has_room = agreed(has_room)
        if has_room:
            self._fill(image)
        if image is not None:
            given = (image, self._notes(step, orders), self._copied)
            self._writer = threading.Thread(target=self._write, args=given)
            self._writer.start()

    def _save_last(self, *, is_stopped: bool) -> None:
        """Write the state of the last complete step, unless that takes longer than a stop may or is impossible."""
        assert self._run is not None
        large = sum(tensor.nbytes for tensor in self._run.tensors().values()) > _AT_ONCE
        why_not = "it is too large to be written in time" if is_stopped and large else None
        if self._boundary is None:
            why_not = "the run stopped amid a step"
        elif world_size() > 1:
            why_not = "several processes trained"
        if is_stopped and (large or not why_not):
            self._give_up.set()  # of a state that is just being written: there is no time, or that of this step is worth more
        self.wait()
        self._give_up.clear()
        if self._boundary is None or why_not:
            log.info("No state of the last step is written, because %s.", why_not)
            return
        step, order = self._boundary
        if step > self._saved_step and not self._fails:
            image = self._room(pinned=False)
            if image is not None:
                self._fill(image)
                self._write(image, self._notes(step, [order.as_json()]), self._copied)

    def _notes(self, step: int, orders: list[dict[str, Any]]) -> StateNotes:
        assert self._run is not None
        return StateNotes(
            step=step,
            seed=self._seed,
            scalars=self._run.scalars(),
            orders=orders,
            watched=self._run.watched(),
            pictures=self._pictures,
        )

    def _room(self, *, pinned: bool) -> WeightImage | None:
        """Room in host memory for all tensors; None if there is none."""
        assert self._run is not None
        like = self._run.like()
        if self._image is None or not self._image.is_for(like):
            self._image = None  # first give the memory back
            size = sum(tensor.nbytes for tensor in like.values())
            if free_host_bytes() < 1.2 * size:
                self._fail(f"this machine has too little free memory to copy {_gigabytes(size)}")
                return None
            try:
                self._image = WeightImage(like, pinned=pinned)
            except OSError as error:
                self._fail(str(error))
        return self._image

    @torch.no_grad()
    def _fill(self, image: WeightImage | None) -> None:
        """Copy all tensors into `image`, on CUDA beside the next gradients. A process without one only gives its parts."""
        assert self._run is not None
        cuda = self._run.device.type == "cuda"
        if cuda:
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # None leaves the stream as it is
            for name, tensor in self._run.whole_tensors():
                if image is not None:
                    image.tensors[name].copy_(tensor, non_blocking=cuda)
            if cuda:
                self._copied = torch.cuda.Event()
                self._copied.record(self._stream)

    def _write(self, image: WeightImage, notes: StateNotes, copied: torch.cuda.Event | None) -> None:
        """Write a state, in a thread or at the end."""
        assert self._folder is not None
        try:
            if copied is not None:
                copied.synchronize()
            room = shutil.disk_usage(self._folder.nearest).free
            if room < 2 * image.nbytes:  # the result needs room too
                self._fail(
                    f"the disk has only {_gigabytes(room)} left for states of {_gigabytes(image.nbytes)}"
                )
                return
            self._folder.write(image, notes, self._record, self._give_up)
            self._saved_step = notes.step
        except StoppedError:
            pass
        except Exception as error:  # a disk that is full must not stop the training
            self._fail(str(error))

    def _fail(self, why: str) -> None:
        self._fails = True
        log.warning("No more states are saved, and the training goes on: %s.", why)

    def wait(self) -> None:
        """Wait until the thread that writes a state has ended."""
        while self._writer is not None and self._writer.is_alive():
            self._writer.join(_POLL_S)
        self._writer = None


def _restore(run: RunState, saved: SavedState) -> None:
    """Set `run` to `saved`. Only the first process reads its tensors: other hosts may not see its folder.

    Raises:
        WeightsError: it does not fit.
    """
    name, notes, is_first = saved.folder.name, saved.notes, rank() == 0
    found = agreed(kinds(saved.file) if is_first else {})
    differs = run.differs(found)
    if differs is not None:
        raise WeightsError(
            f"{name} holds weights of another precision, optimizer or shape than this run (at {differs}): give the settings "
            "and the kind of GPU of its run."
        )
    own = saved.file.read() if is_first else {}
    tensors = ((key, sent(own.get(key), *kind, run.device)) for key, kind in found.items())
    run.restore(tensors, notes.scalars, notes.orders[rank()], notes.watched)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
