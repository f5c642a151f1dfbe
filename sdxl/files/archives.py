"""Unpack archives from strangers safely, and pack tars deterministically.

Knows where members of zips and tars may go; does not know what they contain.
"""

import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from sdxl.errors import ArchiveError, StorageError
from sdxl.files.archive_members import Limits, checked, members, open_tar
from sdxl.files.file_kinds import describe_other_kind

__all__ = ["Limits", "atomic_path", "in_place", "pack_tar", "unpack"]

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_LIMITS = Limits()
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_DEEPEST, _LONGEST_NAME = 32, 255
"""Folders in a member's path, and bytes of the name of each."""
_LARGEST_RATIO, _RATIO_FROM = 200, 1 << 30
"""An archive that unpacks to more bytes than `_RATIO_FROM` may not have grown more than `_LARGEST_RATIO` times."""


def in_place(archive: Path, *, limits: Limits = _LIMITS) -> dict[Path, tuple[int, int]] | None:
    """The byte ranges of the regular files in an uncompressed tar: safe relative path → (first byte, size).

    Returns None for anything else, and for a tar that `unpack` would refuse.
    """
    try:
        with open_tar(archive, limits) as tar:
            if tar.fileobj.compressed:  # type: ignore[union-attr]
                return None
            files = [member for member in checked(tar, archive, limits) if member.isreg()]
    except Exception:  # whatever a stranger's file makes Python's reader raise
        return None
    if len(files) > limits.files:
        return None
    try:
        return {_safe_relative(member.name, archive): (member.offset_data, member.size) for member in files}
    except ArchiveError:
        return None


def unpack(
    archive: Path,
    folder: Path,
    *,
    limits: Limits = _LIMITS,
    skip: Callable[[Path], bool] = lambda path: False,
) -> list[Path]:
    """Unpack a zip or tar into `folder`, and return the written files in the archive's order.

    Detects the format, also of compressed tars, by content and ignores the file name. Writes only regular files, and only
    inside `folder`; skips folders, links, devices, and members for whose path `skip` returns True. If two members have one
    path, the later one wins, and the log says so.

    Raises:
        ArchiveError: not an archive, damaged, encrypted, empty, over `limits`, or a member's path leaves `folder`.
        StorageError: a file cannot be written.
    """
    written: dict[Path, None] = {}
    has_skipped = False
    unpacked = 0
    with _told(archive):
        for name, source in members(archive, limits):
            if len(written) == limits.files:
                raise ArchiveError(f"{archive.name} holds more than {limits.files} files: split it.")
            relative = _safe_relative(name, archive)
            if skip(relative):
                has_skipped = True
                continue
            target = folder / relative
            if target in written:
                log.warning("%s holds %s more than once: the last one is used.", archive.name, relative)
            with _new_file(target) as sink:
                while chunk := source.read(min(_CHUNK, limits.total_bytes - unpacked + 1)):
                    unpacked += len(chunk)
                    _check_size(archive, unpacked, limits)
                    _write(sink, chunk, target)
            written[target] = None
    if not written and not has_skipped:
        raise ArchiveError(f"{archive.name} is empty: add files and pack it again.")
    return list(written)


def require_archive(path: Path) -> None:
    """Refuse at once what `unpack` cannot open. A folder is right too, and what comes after the first member is not looked at.

    Raises:
        ArchiveError: not an archive, or damaged or encrypted from its beginning on.
    """
    if not path.is_dir():
        with _told(path):
            next(members(path, _LIMITS), None)


@contextmanager
def _told(archive: Path) -> Iterator[None]:
    """Turn whatever reading `archive` raises into errors that name it."""
    try:
        yield
    except StorageError:
        raise
    except ArchiveError as error:
        raise error if archive.name in str(error) else _damaged(archive, error) from error
    except Exception as error:  # whatever a stranger's file makes Python's readers raise
        raise _damaged(archive, error) from error


def _damaged(archive: Path, error: Exception) -> ArchiveError:
    if kind := describe_other_kind(archive):
        return ArchiveError(f"{archive.name} {kind}")
    return ArchiveError(f"{archive.name} cannot be unpacked ({error}): pack the files again.")


def _check_size(archive: Path, unpacked: int, limits: Limits) -> None:
    if unpacked > limits.total_bytes:
        raise ArchiveError(
            f"{archive.name} unpacks to more than {limits.total_bytes / 2**30:.1f} GiB: use a smaller archive."
        )
    if unpacked > _RATIO_FROM and unpacked > _LARGEST_RATIO * archive.stat().st_size:
        raise ArchiveError(
            f"{archive.name} unpacks to more than {_LARGEST_RATIO} times its size: pack ordinary files."
        )


@contextmanager
def _new_file(target: Path) -> Iterator[IO[bytes]]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sink = target.open("wb")
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise ArchiveError(f"{target.name} is a file and a folder at once") from error
    except OSError as error:
        raise StorageError.of(error, target) from error
    try:
        yield sink
    finally:
        try:
            sink.close()  # writes what is still buffered
        except OSError as error:
            raise StorageError.of(error, target) from error


def _write(sink: IO[bytes], chunk: bytes, target: Path) -> None:
    try:
        sink.write(chunk)
    except OSError as error:
        raise StorageError.of(error, target) from error


def _safe_relative(name: str, archive: Path) -> Path:
    """The path of a member, relative to the folder into which it is unpacked.

    Raises:
        ArchiveError: it leads out of that folder, or is too long.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts or _DRIVE.match(name) or "\0" in name:
        raise ArchiveError(
            f"{archive.name} holds the unsafe path {name[:100]!r}: pack the files under relative paths."
        )
    if len(path.parts) > _DEEPEST or any(len(part.encode()) > _LONGEST_NAME for part in path.parts):
        raise ArchiveError(f"{archive.name} holds a path that is too long, {name[:100]!r}: shorten it.")
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
