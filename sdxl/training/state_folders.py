"""Where states lie: a folder for each run, with its last two states, in the folder that `SDXL_STATE` names.

    state/3f0a…-x7k2/step-000250/   the name begins with what identifies the settings and the pictures
                     step-000500/

A run locks its folder, and the system releases the locks of a dead process. Knows names and folders; does not know what is in
a state.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdxl import settings
from sdxl.errors import WeightsError
from sdxl.files.weight_image import WeightImage
from sdxl.training.state_files import STATE, SavedState, StateNotes, read_state, write_state

log = logging.getLogger(__name__)

_KEPT_S = 7 * 24 * 3600
"""Seconds for which a server keeps the states of a stopped run in the folder that `SDXL_STATE` names."""


class RunFolder:
    """The states of one run, the last two of them. Created with the first one."""

    def __init__(self, parent: Path, key: str, goes_on: SavedState | None = None) -> None:
        """The folder of the state `goes_on` if that is one of `parent`, else a new one.

        key: what the new folder's name begins with.
        """
        self.parent, self._key = parent, key
        self.path: Path | None = None
        self.last: Path | None = None
        """The last complete state."""
        self._lock: int | None = None
        if goes_on is not None and goes_on.folder.parent.parent.resolve() == parent.resolve():
            self._lock = _lock(goes_on.folder.parent)
            if self._lock is not None:
                self.path, self.last = goes_on.folder.parent, goes_on.folder

    @property
    def nearest(self) -> Path:
        """The folder, or what exists above it."""
        folder = self.path or self.parent.absolute()
        return next(path for path in (folder, *folder.parents) if path.exists())

    def write(
        self, image: WeightImage, notes: StateNotes, record: Mapping[str, Any], stop: threading.Event
    ) -> Path:
        """Write a state and return its folder. Whatever happens, the one before it stays until this one is complete.

        Raises:
            StoppedError: `stop` was set.
            OSError: it cannot be written.
        """
        if self.path is None:
            self.parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=f"{self._key}-", dir=self.parent))
            self._lock = _lock(self.path)
        target = self.path / f"step-{notes.step:06d}"
        for old in set(_states_in(self.path)) - {self.last}:
            _remove(old)
        if self.last != target:
            write_state(target, image, notes, record, stop)
        self.last = target
        return target

    def remove(self) -> None:
        """Delete all states of the run, which is finished."""
        if self.path is not None:
            _remove(self.path)
        self.close()

    def close(self) -> None:
        """Let others use the folder, and leave none that is empty."""
        for folder in (self.path, self.parent):
            if folder is not None:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def key_of(identity: Any) -> str:
    """A short name for what identifies a run; `identity` consists of what JSON has."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def furthest(parent: Path, key: str, *, seed: int | None = None) -> SavedState | None:
    """Of the states in `parent` under `key` the one with the most steps; None if there is none.

    Passes over damaged states, those of running processes and those of other users, and says so in the log.

    seed: only states with this seed; None for any.
    """
    found = []
    for folder in parent.glob(f"{key}-*"):
        if not _is_ours(folder):
            continue
        handle = _lock(folder)
        if handle is None:
            log.warning("The states in %s are of a run that is still going, so they are not used.", folder)
            continue
        os.close(handle)
        found += _states_in(folder)
    return _best(found, seed)


def state_at(path: Path) -> SavedState:
    """The state in the folder `path`, or of several in it the one with the most steps.

    Raises:
        WeightsError: it holds none, or only damaged ones.
    """
    if (path / STATE).is_file():
        return read_state(path)
    visible = "[!.]*"  # others are being written or removed
    found = [
        file.parent for depth in (visible, f"{visible}/{visible}") for file in path.glob(f"{depth}/{STATE}")
    ]
    if len(found) == 1:
        return read_state(found[0])
    best = _best(found, None)
    if best is None:
        raise WeightsError(f"{path.name} holds no state of a training: give a folder such as step-000250.")
    return best


def sweep(parent: Path) -> None:
    """Remove what killed runs were writing. Behind a server, remove states too that nobody went on from for long: in the folder
    that `SDXL_STATE` names for a week, elsewhere for `SDXL_KEEP_MINUTES`."""
    longest = _KEPT_S if settings.variable("SDXL_STATE") else settings.keep_seconds()
    for removed in parent.glob(".*.partial"):
        if _is_ours(removed):
            shutil.rmtree(removed, ignore_errors=True)
    for folder in parent.glob("*-*"):
        with contextlib.suppress(OSError):
            handle = _lock(folder) if _is_ours(folder) else None
            if handle is None:
                continue
            for partial in folder.glob(".*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
            if settings.behind_server() and time.time() - folder.stat().st_mtime > longest:
                _remove(folder)
            with contextlib.suppress(OSError):
                folder.rmdir()
            os.close(handle)


def _best(folders: Iterable[Path], seed: int | None) -> SavedState | None:
    """The state with the most steps that is not damaged."""
    for folder in sorted(folders, key=lambda folder: (len(folder.name), folder.name), reverse=True):
        try:
            state = read_state(folder)
        except WeightsError as error:
            log.warning("%s The one before it is used, if there is any.", error)
            continue
        if seed in (None, state.notes.seed):
            return state
    return None


def _is_ours(folder: Path) -> bool:
    """Whether it is a folder of this user, and no link."""
    with contextlib.suppress(OSError):
        return not folder.is_symlink() and folder.is_dir() and folder.stat().st_uid == os.getuid()
    return False


def _states_in(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if path.is_dir()]


def _remove(folder: Path) -> None:
    """Delete `folder`; first by one rename, so that a kill leaves no half of a state that looks whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """A handle that locks `folder` until it is closed; None if another process holds it, or there is no such folder."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
