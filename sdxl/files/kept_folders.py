"""Folders that are built once and kept for later runs, in the folder that `SDXL_CACHE` names.

A folder is built under another name and appears complete, by one rename. A file lock protects it while a process builds,
uses or deletes it; the system releases the locks of a dead process, and the next build sweeps what such a process has left.
Knows keys and bytes; does not know what is in a folder.
"""

import contextlib
import fcntl
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from sdxl.errors import StorageError

_PARTIAL = ".partial"
_POLL_S = 0.05
"""Seconds between two attempts to get a lock. A call that blocks could not be interrupted when a run is cancelled."""


class InUse:
    """As long as this object lives, no process deletes the folder that it belongs to."""

    def __init__(self, handle: int) -> None:
        weakref.finalize(self, os.close, handle)


class KeptFolders:
    """Kept folders with one purpose, below a limit of bytes. Safe for threads and processes that share them."""

    def __init__(self, root: Path, limit: int) -> None:
        """Beyond `limit` bytes in all, the least recently used folders that nobody uses are deleted."""
        self.root, self._limit = root, limit
        try:
            (root / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError.of(error, root) from error

    def find(self, key: str) -> tuple[Path, InUse] | None:
        """The folder `key`, and what keeps it from being deleted; None if it is missing."""
        folder, handle = self.root / key, self._open(key)
        try:
            _lock(handle, fcntl.LOCK_SH)
            if folder.is_dir():
                os.utime(folder)
                return folder, InUse(handle)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        return None

    def get(self, key: str, build: Callable[[Path], object]) -> tuple[Path, InUse]:
        """Like `find`, but if the folder is missing, `build` fills it first."""
        while (found := self.find(key)) is None:
            with self._locked(key):
                if not (self.root / key).is_dir():
                    self._build(key, build)
        return found

    @contextlib.contextmanager
    def scratch(self, key: str) -> Iterator[Path]:
        """A folder for files on the way, locked under `key`. It is deleted at the end."""
        folder = self._partial(key)
        with self._locked(key):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir()
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        handle = self._open(key)
        try:
            _lock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _partial(self, key: str) -> Path:
        return self.root / f".{key}{_PARTIAL}"

    def _open(self, key: str) -> int:
        return os.open(self.root / "locks" / key, os.O_RDWR | os.O_CREAT, 0o644)

    def _build(self, key: str, build: Callable[[Path], object]) -> None:
        self._sweep(except_key=key)
        partial = self._partial(key)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            build(partial)
            for file in _files(partial):  # a loss of power must not leave a folder that looks complete
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            partial.rename(self.root / key)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._make_room(keep=key)

    def _sweep(self, *, except_key: str) -> None:
        """Delete what killed processes were building."""
        for left in self.root.glob(f".*{_PARTIAL}"):
            key = left.name[1 : -len(_PARTIAL)]
            if key != except_key:
                with self._if_unused(key) as unused:
                    if unused:
                        shutil.rmtree(left, ignore_errors=True)

    def _make_room(self, *, keep: str) -> None:
        kept = [
            path for path in self.root.iterdir() if path.name != "locks" and not path.name.startswith(".")
        ]
        sizes = {path: sum(file.stat().st_size for file in _files(path)) for path in kept}
        total = sum(sizes.values())
        for path in sorted(kept, key=lambda path: path.stat().st_mtime_ns):
            if total <= self._limit:
                return
            if path.name == keep:
                continue
            with self._if_unused(path.name) as unused:
                if unused:
                    doomed = self._partial(path.name)
                    path.rename(doomed)
                    shutil.rmtree(doomed, ignore_errors=True)
                    total -= sizes[path]

    @contextlib.contextmanager
    def _if_unused(self, key: str) -> Iterator[bool]:
        """Lock `key` if no process uses it; yield whether that is so."""
        handle = self._open(key)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unused = True
        except BlockingIOError:
            unused = False
        try:
            yield unused
        finally:
            os.close(handle)


def _lock(handle: int, kind: int) -> None:
    """Wait for a lock."""
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_POLL_S)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
