"""Safe unpacking of archives from strangers, and deterministic packing.

Knows zip and tar; does not know what is inside them.
"""

import itertools
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from sdxl.errors import ArchiveError

_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an archive may unpack to, whatever its headers claim."""

    files: int = 10_000
    """Largest number of files."""
    total_bytes: int = 16 << 30
    """Largest sum of the unpacked sizes."""


def in_place(archive: Path, *, limits: Limits = Limits()) -> dict[Path, tuple[int, int]] | None:
    """Where the regular files of a plain tar lie in it: safe relative path → (first byte, size); None for anything else,
    and for a tar of more files than `limits` allows.

    Raises:
        ArchiveError: a member's path is unsafe.
    """
    try:
        with tarfile.open(archive, "r:") as opened:
            members = list(itertools.islice(opened, limits.files + 1))
            if len(members) > limits.files:
                return None
            return {
                _safe_relative(member.name, archive): (member.offset_data, member.size)
                for member in members
                if member.isreg() and not member.issparse()
            }
    except (tarfile.TarError, EOFError, OSError):
        return None


def unpack(
    archive: Path,
    folder: Path,
    *,
    limits: Limits = Limits(),
    leave: Callable[[Path], bool] = lambda path: False,
) -> list[Path]:
    """Unpack a zip or tar (plain or compressed; told by content, not by name) into `folder`.

    Only regular files are written, under relative paths that stay inside `folder`; folders, links, devices and what
    to `leave`, by its path in the archive, are skipped. Returns the written files in the archive's order.

    Raises:
        ArchiveError: not an archive, damaged, encrypted, empty, over `limits`, or a member's path leaves `folder`.
    """
    written: list[Path] = []
    left = False
    budget = limits.total_bytes
    try:
        for name, source in _members(archive):
            if len(written) == limits.files:
                raise ArchiveError(f"{archive.name} holds more than {limits.files} files: split it.")
            relative = _safe_relative(name, archive)
            if leave(relative):
                left = True
                continue
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as sink:
                while chunk := source.read(min(_CHUNK, budget + 1)):
                    budget -= len(chunk)
                    if budget < 0:
                        raise ArchiveError(
                            f"{archive.name} unpacks to more than {limits.total_bytes / 2**30:.1f} GiB: "
                            "hand over a smaller archive."
                        )
                    sink.write(chunk)
            written.append(target)
    except ArchiveError:
        raise
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        OSError,
        ValueError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        # zipfile answers RuntimeError for encrypted members and NotImplementedError for unknown compression, tarfile
        # ValueError for some damaged headers
        raise ArchiveError(f"{archive.name} cannot be unpacked ({error}): pack the files again.") from error
    if not written and not left:
        raise ArchiveError(f"{archive.name} is empty: put files into it and pack it again.")
    return written


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if not archive.is_file():
        raise ArchiveError(f"{archive} does not exist: name an existing zip or tar file.")
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                mode = entry.external_attr >> 16
                if entry.is_dir() or stat.S_ISLNK(mode):
                    continue
                with opened.open(entry) as source:
                    yield entry.filename, source
    elif _is_tar(archive):
        with tarfile.open(archive, "r:*") as opened:
            for member in opened:
                if member.isreg() and (source := opened.extractfile(member)) is not None:
                    yield member.name, source
    else:
        raise ArchiveError(
            f"{archive.name} is neither a zip nor a tar archive: pack the files as .zip or .tar.gz."
        )


def _is_tar(archive: Path) -> bool:
    return archive.stat().st_size > 0 and tarfile.is_tarfile(archive)


def _safe_relative(name: str, archive: Path) -> Path:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts or ":" in path.parts[0] or "\0" in name:
        raise ArchiveError(
            f"{archive.name} holds the unsafe path {name!r}: pack the files under relative paths."
        )
    return Path(*path.parts)


def pack_tar(files: dict[str, Path], target: Path) -> None:
    """Write an uncompressed tar of `files` (name inside → file) to `target`, atomically.

    Equal contents give equal bytes: names are sorted, times, owners and modes fixed.
    """
    with atomic_path(target) as partial, tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(files):
            entry = tarfile.TarInfo(name)
            entry.size = files[name].stat().st_size
            entry.mode = 0o644
            with files[name].open("rb") as source:
                tar.addfile(entry, source)


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` that becomes `target` on success and is removed on any failure."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
