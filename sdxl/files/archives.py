"""Unpack archives from strangers safely, and pack tars deterministically.

Knows zip and tar; does not know what they contain.
"""

import itertools
import logging
import lzma
import os
import re
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
from sdxl.files.file_kinds import describe_other_kind

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_ENCRYPTED, _UTF8 = 0x1, 0x800
"""Flags of a zip's member: its content is encrypted; its name is in UTF-8."""
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on an archive's unpacked content. They count real bytes, not the sizes that headers claim."""

    files: int = 10_000
    """Maximum number of files."""
    total_bytes: int = 16 << 30
    """Maximum sum of the unpacked sizes."""


def in_place(archive: Path, *, limits: Limits = Limits()) -> dict[Path, tuple[int, int]] | None:
    """The byte ranges of the regular files in an uncompressed tar: safe relative path → (first byte, size).

    Returns None for anything else, and for a tar with more files than `limits` allows.

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
    skip: Callable[[Path], bool] = lambda path: False,
) -> list[Path]:
    """Unpack a zip or tar into `folder`, and return the written files in the archive's order.

    Detects the format, also of compressed tars, by content and ignores the file name. Writes only regular files, and only
    inside `folder`; skips folders, links, devices, and members for whose path `skip` returns True. If two members have one
    path, the later one wins, and the log says so.

    Raises:
        ArchiveError: not an archive, damaged, encrypted, empty, over `limits`, or a member's path leaves `folder`.
    """
    written: list[Path] = []
    has_skipped = False
    remaining_bytes = limits.total_bytes
    try:
        for name, source in _members(archive):
            if len(written) == limits.files:
                raise ArchiveError(f"{archive.name} holds more than {limits.files} files: split it.")
            relative = _safe_relative(name, archive)
            if skip(relative):
                has_skipped = True
                continue
            target = folder / relative
            if target.exists():
                log.warning("%s holds %s more than once: the last one is used.", archive.name, relative)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as sink:
                while chunk := source.read(min(_CHUNK, remaining_bytes + 1)):
                    remaining_bytes -= len(chunk)
                    if remaining_bytes < 0:
                        raise ArchiveError(
                            f"{archive.name} unpacks to more than {limits.total_bytes / 2**30:.1f} GiB: "
                            "use a smaller archive."
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
        # zipfile raises NotImplementedError for an unknown compression. tarfile raises ValueError for some damaged headers.
        if kind := describe_other_kind(archive):
            raise ArchiveError(f"{archive.name} {kind}") from error
        raise ArchiveError(f"{archive.name} cannot be unpacked ({error}): pack the files again.") from error
    if not written and not has_skipped:
        raise ArchiveError(f"{archive.name} is empty: add files and pack it again.")
    return written


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if not archive.is_file():
        raise ArchiveError(f"{archive} does not exist: give an existing zip or tar file.")
    # The beginning decides. A zip is also recognised by its end, and a tar may end with a zip.
    with archive.open("rb") as file:
        begins_as_zip = file.read(2) == b"PK"
    if begins_as_zip and zipfile.is_zipfile(archive):
        yield from _zip_members(archive)
    elif archive.stat().st_size > 0 and tarfile.is_tarfile(archive):
        with tarfile.open(archive, "r:*") as opened:
            for member in opened:
                if member.isreg() and (source := opened.extractfile(member)) is not None:
                    yield _readable(member.name), source
    elif zipfile.is_zipfile(archive):  # after other content, as in an archive that unpacks itself
        yield from _zip_members(archive)
    else:
        kind = describe_other_kind(archive)
        raise ArchiveError(
            f"{archive.name} {kind}"
            if kind
            else f"{archive.name} is neither a zip nor a tar archive: pack the files as .zip or .tar.gz."
        )


def _zip_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as opened:
        for entry in opened.infolist():
            if entry.is_dir() or stat.S_ISLNK(entry.external_attr >> 16):
                continue
            if entry.flag_bits & _ENCRYPTED:
                raise ArchiveError(f"{archive.name} is encrypted: pack the files without a password.")
            with opened.open(entry) as source:
                yield _name_in_zip(entry), source


def _name_in_zip(entry: zipfile.ZipInfo) -> str:
    """A member's path. Many programs, such as macOS, write UTF-8 without the flag that says so."""
    if entry.flag_bits & _UTF8:
        return entry.filename
    try:
        return entry.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return entry.filename


def _readable(name: str) -> str:
    """A member's path in a tar. Bytes that are not UTF-8 are read as Western European, so that it can be printed."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
    return name


def _safe_relative(name: str, archive: Path) -> Path:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts or _DRIVE.match(name) or "\0" in name:
        raise ArchiveError(
            f"{archive.name} holds the unsafe path {name!r}: pack the files under relative paths."
        )
    return Path(*path.parts)


def pack_tar(files: dict[str, Path], target: Path) -> None:
    """Write an uncompressed tar of `files` (name in the tar → file) to `target`, atomically.

    Equal contents give equal bytes: names are sorted; times, owners and modes are fixed.
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
    """Yield a temporary path in the folder of `target`. On success rename it to `target`; on failure delete it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
