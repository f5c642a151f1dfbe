"""Fine-tunes by where they come from, kept on disk and in memory within limits.

An entry on disk is a folder that appears complete, by one rename, under a name made of its source. Builders and evictors
of an entry exclude each other by file locks, which the system releases when a process dies; what a killed one left
half-written lies under another name and is swept at the next start. Knows sources; does not know what a fine-tune does.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from sdxl.errors import UserInputError
from sdxl.files import hub
from sdxl.files.archives import unpack
from sdxl.files.fetching import decode_data_uri, download, existing, is_remote, shortened
from sdxl.model import fine_tune_files
from sdxl.settings import CacheLimits

log = logging.getLogger(__name__)

_MANIFEST = ".entry.json"
_PARTIAL = ".partial-"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_EMBEDDING = re.compile(r"\w[\w .-]{0,100}\.safetensors")
_SWEEP_AGE_S = 60


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=_Sized)


class FineTuneCache(Generic[T]):
    """Least recently used fine-tunes go first, on disk and in memory alike; safe for threads and for processes that
    share a folder."""

    def __init__(
        self, folder: Path, limits: CacheLimits, load: Callable[[fine_tune_files.FineTuneFiles], T]
    ) -> None:
        """`load` reads checked files into memory, all of it: the files may go afterwards."""
        self._folder, self._limits, self._load = folder, limits, load
        self._memory: OrderedDict[str, T] = OrderedDict()
        self._mutex = threading.Lock()
        (folder / "locks").mkdir(parents=True, exist_ok=True)
        self._sweep()

    def get(self, source: str) -> T:
        """The fine-tune at `source`: a path, a `data:` URI, an http(s) URL, or the name of a hub repository.

        A URL is asked each time whether it has changed; if it cannot be reached, what is here is used.

        Raises:
            UserInputError: it cannot be fetched or is no fine-tune (or a subclass of it).
        """
        if is_remote(source):
            return self._from_remote(source)
        path, name = existing(source), None
        if path is None:
            if not _HUB_NAME.fullmatch(source):
                raise UserInputError(
                    f"{shortened(source)} does not exist: give an existing file, a data: URI, an http(s) URL or the name of a "
                    "repository on the hub."
                )
            path, name = hub.fine_tune_folder(source), source
        if path.is_dir():
            files = sorted(path.rglob("*"))
            key = _key("folder", str(path.resolve()), *(_state(file) for file in files if file.is_file()))
            return self._remember(key, lambda: self._load(fine_tune_files.read(path, path, name=name)))
        key = _key("file", str(path.resolve()), _state(path))

        def make() -> T:
            return (
                self._in_place(path)
                if fine_tune_files.stays(path)
                else self._from_disk(key, path.name, lambda folder: path)
            )

        return self._remember(key, make)

    def _in_place(self, path: Path) -> T:
        """What is on disk already needs no entry beside it."""
        before = _state(path)
        with self._partial() as scratch:
            loaded = self._load(fine_tune_files.read(path, scratch))
        if _state(path) != before:
            raise UserInputError(f"{path.name} changed while it was read: ask again when it is written.")
        return loaded

    def _from_remote(self, source: str) -> T:
        if source.startswith("data:"):
            key = _key("data", hashlib.sha256(source.encode()).hexdigest())
            name = "The data: URI"
            return self._remember(
                key, lambda: self._from_disk(key, name, lambda to: decode_data_uri(source, to))
            )
        key, name = _key("url", source), _name_of(source)
        with self._locked(key):
            known = self._manifest(key)
            with self._partial() as partial:
                fetched = download(source, partial, known=known.get("validators", {}) if known else None)
                if fetched is not None:
                    self._build(key, name, partial, fetched.path, fetched.validators)
            # Another process may have fetched a later one: what is in memory is that of this very entry.
            return self._remember(
                _key(key, _state(self._folder / key / _MANIFEST)), lambda: self._read(key, name)
            )

    def _from_disk(self, key: str, name: str, bring: Callable[[Path], Path]) -> T:
        """The entry of `key`, built first where it is missing from what `bring` brings into a folder."""
        with self._locked(key):
            if self._manifest(key) is None:
                with self._partial() as partial:
                    self._build(key, name, partial, bring(partial), {})
            return self._read(key, name)

    def _read(self, key: str, name: str) -> T:
        entry = self._folder / key
        os.utime(entry)
        return self._load(fine_tune_files.read(entry, entry, name=name))

    def _build(self, key: str, name: str, partial: Path, archive: Path, validators: dict[str, str]) -> None:
        """Unpack `archive`, check it, and let the entry appear; another's bytes make room for it."""
        content = partial / "content"
        content.mkdir()
        if fine_tune_files.is_safetensors(archive):
            shutil.copyfile(archive, content / _file_name(name))
        else:
            unpack(archive, content, limits=fine_tune_files.LIMITS, leave=fine_tune_files.is_checkpoint)
        fine_tune_files.read(content, content, name=name)
        sizes = {str(file.relative_to(content)): file.stat().st_size for file in _files(content)}
        manifest = {"files": sizes, "bytes": sum(sizes.values()), "validators": validators}
        (content / _MANIFEST).write_text(json.dumps(manifest))
        self._discard(key)
        content.rename(self._folder / key)
        self._make_room(keep=key)

    def _manifest(self, key: str) -> dict | None:
        """What an entry says of itself; None where it is missing, or is not what it says."""
        entry = self._folder / key
        try:
            manifest = json.loads((entry / _MANIFEST).read_text())
            if all((entry / name).stat().st_size == size for name, size in manifest["files"].items()):
                return manifest
        except (OSError, ValueError, KeyError):
            pass
        return None

    def _make_room(self, keep: str) -> None:
        entries = []
        for entry in self._folder.iterdir():
            if entry.is_dir() and not entry.name.startswith(".") and entry.name != "locks":
                with contextlib.suppress(OSError, ValueError, KeyError):
                    size = json.loads((entry / _MANIFEST).read_text())["bytes"]
                    entries.append((entry.stat().st_mtime_ns, entry.name, size))
        total = sum(size for *_, size in entries)
        for _, name, size in sorted(entries):
            if total <= self._limits.disk:
                return
            if name == keep:
                continue
            # An entry that shares its lock with the one being built is ours already.
            ours = _lock_of(name) == _lock_of(keep)
            with contextlib.suppress(BlockingIOError):
                with contextlib.nullcontext() if ours else self._locked(name, wait=False):
                    self._discard(name)
                total -= size

    def _discard(self, key: str) -> None:
        """Take an entry away at once, then delete it."""
        entry = self._folder / key
        if entry.exists():
            with self._partial() as doomed:
                entry.rename(doomed / "doomed")

    @contextlib.contextmanager
    def _partial(self) -> Iterator[Path]:
        """A folder to build or delete in, locked as long as its maker lives."""
        folder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self._folder))
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)

    def _sweep(self) -> None:
        """Delete what killed processes left half-written: a living maker holds its lock, a very young one may not yet."""
        for left in self._folder.glob(f"{_PARTIAL}*"):
            with contextlib.suppress(OSError):
                handle = os.open(left, os.O_RDONLY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if time.time() - left.stat().st_mtime > _SWEEP_AGE_S:
                        shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(handle)

    @contextlib.contextmanager
    def _locked(self, key: str, *, wait: bool = True) -> Iterator[None]:
        """Exclude all others from an entry; raises BlockingIOError where it may not `wait`."""
        with (self._folder / "locks" / _lock_of(key)).open("a") as handle:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not wait:
                        raise
                    time.sleep(0.02)  # not a blocking call: a cancelled request must be able to leave
            yield

    def _remember(self, key: str, make: Callable[[], T]) -> T:
        """What is in memory under `key`, made and put there where it is missing."""
        with self._mutex:
            if key in self._memory:
                self._memory.move_to_end(key)
                return self._memory[key]
        made = make()
        with self._mutex:
            self._memory[key] = made
            self._memory.move_to_end(key)
            while self._memory and sum(one.nbytes for one in self._memory.values()) > self._limits.memory:
                self._memory.popitem(last=False)
        return made


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _lock_of(key: str) -> str:
    """The name of the lock of an entry: few files for any number of entries."""
    return key[:2]


def _state(file: Path) -> str:
    """Changes whenever a file's content does."""
    stat = file.stat()
    return f"{file} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _name_of(url: str) -> str:
    """What messages call the file at `url`: the last part of its path."""
    with contextlib.suppress(ValueError):  # no URL: fetching says so
        if name := Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name:
            return name
    return "The file"


def _file_name(name: str) -> str:
    """Of a bare file, which is the word of an embedding."""
    return name if _EMBEDDING.fullmatch(name) else "weights.safetensors"
