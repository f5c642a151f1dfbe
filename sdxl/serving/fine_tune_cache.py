"""A cache of fine-tunes on disk and in memory, by their source and within limits.

An entry on disk is a folder whose name is a hash of its source. It is built under another name and appears complete, by
one rename. A file lock protects an entry while a process builds or evicts it; the system releases the lock if the process
dies. The next start sweeps the half-written folders of killed processes. Knows sources; does not know what a fine-tune
does.
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
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from sdxl.errors import StorageError, UserInputError, shortened
from sdxl.files import hub
from sdxl.files.archives import unpack
from sdxl.files.checksums import checksum
from sdxl.files.fetching import (
    decode_data_uri,
    download,
    existing,
    is_data_uri,
    is_remote,
    name_of,
)
from sdxl.files.sources import HUB_FILE, HUB_NAME
from sdxl.model import fine_tune_files
from sdxl.settings import CacheLimits

log = logging.getLogger(__name__)

_MANIFEST = ".entry.json"
_PARTIAL = ".partial-"
_EMBEDDING = re.compile(r"\w[\w .-]{0,100}\.safetensors")
_SWEEP_AGE_S = 60


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=_Sized)


class FineTuneCache(Generic[T]):
    """Evicts the least recently used fine-tunes first, on disk and in memory.

    Safe for threads, and for processes that share a folder.
    """

    def __init__(
        self, folder: Path, limits: CacheLimits, load: Callable[[fine_tune_files.FineTuneFiles], T]
    ) -> None:
        """`load` reads checked files completely into memory; afterwards the files may be deleted."""
        self._folder, self._limits, self._load = folder, limits, load
        self._memory: OrderedDict[str, T] = OrderedDict()
        self._mutex = threading.Lock()
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError.of(error, folder) from error
        self._sweep()

    def get(self, source: str) -> T:
        """The fine-tune at `source`: a path, a `data:` URI, an http(s) URL, or the name of a hub repository or of a
        file in one.

        Each call asks the server of a URL whether the file has changed. If the server does not answer, the cached
        fine-tune is used.

        Raises:
            UserInputError: the source cannot be fetched, or is not a fine-tune.
        """
        if is_remote(source):
            return self._from_remote(source)
        path, name = existing(source), None
        if path is None:
            if HUB_FILE.fullmatch(source):
                path = hub.fine_tune_file(source)
            elif HUB_NAME.fullmatch(source):
                path, name = hub.fine_tune_folder(source), source
            else:
                raise UserInputError(
                    f"{shortened(source)} does not exist: give an existing file, a data: URI, an http(s) URL or the "
                    "name of a hub repository."
                )

        # Local files are identified by their state, so that a changed file is another fine-tune.
        if path.is_dir():
            files = sorted(path.rglob("*"))
            key = _key("folder", str(path.resolve()), *(_state(file) for file in files if file.is_file()))
            return self._remember(key, lambda: self._load(fine_tune_files.read(path, path, name=name)))
        key = _key("file", str(path.resolve()), _state(path))

        def make() -> T:
            return (
                self._in_place(path)
                if fine_tune_files.is_read_in_place(path)
                else self._from_disk(key, path.name, lambda folder: path)
            )

        return self._remember(key, make)

    def _in_place(self, path: Path) -> T:
        """Read a local file that needs no unpacking, and thus no entry on disk."""
        before = _state(path)
        with self._partial() as scratch:
            loaded = self._load(fine_tune_files.read(path, scratch))
        if _state(path) != before:
            raise UserInputError(f"{path.name} changed while it was read: try again when it is complete.")
        return loaded

    def _from_remote(self, source: str) -> T:
        """The fine-tune at a URL or `data:` URI."""
        if is_data_uri(source):
            key = _key("data", hashlib.sha256(source.encode()).hexdigest())
            name = "The data: URI"
            return self._remember(
                key, lambda: self._from_disk(key, name, lambda to: decode_data_uri(source, to))
            )
        key, name = _key("url", source), name_of(source)
        with self._locked(key):
            # Send the validators of the cached file (ETag, Last-Modified): the server answers whether it has changed.
            manifest = self._manifest(key)
            is_new = self._fetch(source, key, name, manifest.get("validators", {}) if manifest else None)

            def read() -> T:
                if not is_new and not self._is_intact(key):
                    log.warning("The cached copy of %s is damaged: fetching it again", name)
                    self._fetch(source, key, name, None)
                return self._read(key, name)

            # Another process may have fetched a newer file, so the key in memory includes the state of the entry.
            return self._remember(_key(key, _state(self._folder / key / _MANIFEST)), read)

    def _fetch(self, url: str, key: str, name: str, validators: dict[str, str] | None) -> bool:
        """Build the entry of a URL, unless its server says that nothing changed since `validators`; whether it was built."""
        with self._partial() as partial:
            fetched = download(url, partial / "fetched", validators=validators)
            if fetched is not None:
                self._build(key, name, partial, fetched.path, fetched.validators)
        return fetched is not None

    def _from_disk(self, key: str, name: str, bring: Callable[[Path], Path]) -> T:
        """The fine-tune of the entry `key`. If the entry is missing, build it from the archive that `bring` puts into a folder."""
        with self._locked(key):
            if not self._is_intact(key):
                with self._partial() as partial:
                    self._build(key, name, partial, bring(partial), {})
            return self._read(key, name)

    def _read(self, key: str, name: str) -> T:
        """Load an entry, and mark it as just used."""
        entry = self._folder / key
        os.utime(entry)
        return self._load(fine_tune_files.read(entry, entry, name=name))

    def _build(self, key: str, name: str, partial: Path, archive: Path, validators: dict[str, str]) -> None:
        """Unpack and check `archive`, publish it as the entry `key`, and evict others if the disk limit is exceeded."""
        content = partial / "content"
        content.mkdir()
        if fine_tune_files.is_safetensors(archive, name=name):
            shutil.copyfile(archive, content / _file_name(name))
        else:
            unpack(archive, content, limits=fine_tune_files.LIMITS, skip=fine_tune_files.is_left_out)
        fine_tune_files.read(content, content, name=name)
        sizes = {str(file.relative_to(content)): file.stat().st_size for file in _files(content)}
        checksums = {name: checksum(content / name) for name in sizes}
        manifest = {
            "files": sizes,
            "checksums": checksums,
            "bytes": sum(sizes.values()),
            "validators": validators,
        }
        (content / _MANIFEST).write_text(json.dumps(manifest))
        self._discard(key)
        content.rename(self._folder / key)
        self._make_room(keep=key)

    def _manifest(self, key: str) -> dict | None:
        """The manifest of an entry; None if the entry is missing or its files do not match."""
        entry = self._folder / key
        try:
            manifest = json.loads((entry / _MANIFEST).read_text())
            if all((entry / name).stat().st_size == size for name, size in manifest["files"].items()):
                return manifest
        except (OSError, ValueError, KeyError):
            pass
        return None

    def _is_intact(self, key: str) -> bool:
        """Whether an entry exists, and its files are as they were built. Disks and machines that lose power damage files."""
        manifest = self._manifest(key)
        if manifest is None:
            return False
        try:
            return all(
                checksum(self._folder / key / name) == manifest["checksums"][name]
                for name in manifest["files"]
            )
        except (OSError, KeyError, TypeError):
            return False

    def _make_room(self, keep: str) -> None:
        """Evict the least recently used entries, but not `keep`, until the disk limit holds."""
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
            # Entries share a few locks; we already hold the lock of `keep`. Skip entries that others are using.
            ours = _lock_of(name) == _lock_of(keep)
            with contextlib.suppress(BlockingIOError):
                with contextlib.nullcontext() if ours else self._locked(name, wait=False):
                    self._discard(name)
                total -= size

    def _discard(self, key: str) -> None:
        """Remove an entry by one rename, then delete its files."""
        entry = self._folder / key
        if entry.exists():
            with self._partial() as doomed:
                entry.rename(doomed / "doomed")

    @contextlib.contextmanager
    def _partial(self) -> Iterator[Path]:
        """A folder to build or delete in. It is locked while its process lives, so that no other process sweeps it."""
        folder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self._folder))
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)

    def _sweep(self) -> None:
        """Delete half-written folders of killed processes: those without a lock, unless they are too new to have one yet."""
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
        """Hold the lock of an entry. Without `wait`, raise BlockingIOError if another process holds it."""
        with (self._folder / "locks" / _lock_of(key)).open("a") as handle:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not wait:
                        raise
                    time.sleep(0.02)  # a blocking lock could not be interrupted when the request is cancelled
            yield

    def _remember(self, key: str, make: Callable[[], T]) -> T:
        """The fine-tune in memory under `key`; if it is missing, `make` it, and evict others beyond the memory limit."""
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
    """The lock file of an entry; entries share 256 of them."""
    return key[:2]


def _state(file: Path) -> str:
    """A text that changes whenever the content of `file` does."""
    stat = file.stat()
    return f"{file} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _file_name(name: str) -> str:
    """File name for a bare .safetensors; for an embedding it is the word to write in prompts."""
    return name if _EMBEDDING.fullmatch(name) else "weights.safetensors"
