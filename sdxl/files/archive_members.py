"""The members of a stranger's zip or tar, read within bounds.

Knows what the headers of both formats can claim, and what Python's readers believe; does not know where members go.
"""

import bz2
import gzip
import io
import logging
import lzma
import stat
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from sdxl.errors import ArchiveError
from sdxl.files.file_kinds import describe_other_kind

log = logging.getLogger(__name__)

_ENCRYPTED, _UTF8 = 0x1, 0x800
"""Flags of a zip's member: its content is encrypted; its name is in UTF-8."""
_LARGEST_HEADER = 1 << 20
"""Bytes of a tar's header of long names or extended attributes."""
_LARGEST_DIRECTORY = 64 << 20
"""Bytes of a zip's directory of its members."""
_XZ_MEMORY = 256 << 20
"""Bytes that the xz decoder may use; xz -9 needs 65 million."""
_HEADERS = {
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
}
"""Types of tar members that describe another one. Python reads their content whole."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on an archive's unpacked content. They count real bytes, not the sizes that headers claim."""

    files: int = 10_000
    """Maximum number of files."""
    total_bytes: int = 16 << 30
    """Maximum sum of the unpacked sizes."""

    @property
    def members(self) -> int:
        """Maximum number of members of every kind, with folders and links."""
        return 4 * self.files

    @property
    def stream_bytes(self) -> int:
        """Maximum bytes from a decompressor, with headers and skipped members."""
        return self.total_bytes + self.members * 4 * tarfile.BLOCKSIZE


def members(archive: Path, limits: Limits) -> Iterator[tuple[str, IO[bytes]]]:
    """The path and the content of each regular file in a zip or tar. Skips folders, devices and links; the log counts links.

    The beginning of the archive decides on its format. A zip is also recognised by its end, and a tar may end with a zip.

    Raises:
        ArchiveError: another kind of file, encrypted, with sparse files, or over `limits`.
    """
    if not archive.is_file():
        raise ArchiveError(f"{archive} does not exist: give an existing zip or tar file.")
    with archive.open("rb") as file:
        begins_as_zip = file.read(2) == b"PK"
    if begins_as_zip and zipfile.is_zipfile(archive):
        yield from _zip_members(archive, limits)
    elif _is_tar(archive):
        links = 0
        with open_tar(archive, limits) as tar:
            for member in checked(tar, archive, limits):
                links += member.issym() or member.islnk()
                if member.isreg() and (source := tar.extractfile(member)) is not None:
                    yield _printable(member.name), source
        _tell_links(archive, links)
    elif zipfile.is_zipfile(archive):  # after other content, as in an archive that unpacks itself
        yield from _zip_members(archive, limits)
    else:
        kind = describe_other_kind(archive) or (
            "is neither a zip nor a tar archive: pack the files as .zip or .tar.gz."
        )
        raise ArchiveError(f"{archive.name} {kind}")


def _tell_links(archive: Path, count: int) -> None:
    if count:
        log.warning(
            "%s holds links (%d), which are left out: pack the files themselves, as tar -h does.",
            archive.name,
            count,
        )


# zip --------------------------------------------------------------------------------------------------------


def _zip_members(archive: Path, limits: Limits) -> Iterator[tuple[str, IO[bytes]]]:
    if _directory_bytes(archive) > _LARGEST_DIRECTORY:
        raise ArchiveError(f"{archive.name} lists too many files: split it.")
    with zipfile.ZipFile(archive) as opened:
        entries = opened.infolist()
        if len(entries) > limits.members:
            raise ArchiveError(
                f"{archive.name} holds more than {limits.members} folders and files: split it."
            )
        _tell_links(archive, sum(stat.S_ISLNK(entry.external_attr >> 16) for entry in entries))
        for entry in entries:
            if entry.is_dir() or stat.S_ISLNK(entry.external_attr >> 16):
                continue
            if entry.flag_bits & _ENCRYPTED:
                raise ArchiveError(f"{archive.name} is encrypted: pack the files without a password.")
            try:
                with opened.open(entry) as source:
                    yield _name_in_zip(entry), source
            except NotImplementedError as error:
                raise ArchiveError(
                    f"{archive.name} uses a compression that cannot be read here: pack the files as an ordinary .zip."
                ) from error


def _directory_bytes(archive: Path) -> int:
    """The size of a zip's directory, which Python reads whole, as the end of the file claims it."""
    with archive.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - (1 << 16) - 22))
        tail = file.read()
        end = tail.rfind(b"PK\x05\x06")
        if end < 0 or len(tail) < end + 22:
            return 0  # then it is not a zip, and Python says so
        (claimed,) = struct.unpack_from("<I", tail, end + 12)
        # In a zip64, a record before the end has the size in 64 bits.
        large = tail.rfind(b"PK\x06\x06", 0, end)
        if claimed == 0xFFFFFFFF and 0 <= large <= len(tail) - 48:
            (claimed,) = struct.unpack_from("<Q", tail, large + 40)
    return claimed


def _name_in_zip(entry: zipfile.ZipInfo) -> str:
    """A member's path. Many programs, such as macOS, write UTF-8 without the flag that says so."""
    if entry.flag_bits & _UTF8:
        return entry.filename
    try:
        return entry.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return entry.filename


# tar --------------------------------------------------------------------------------------------------------


class _CheckedMember(tarfile.TarInfo):
    """Refuses sizes that make Python's reader loop, or read a header into memory that is as large as it claims.

    Every size passes through `_block`, which is private. Pythons from 2025 on refuse negative sizes there themselves.
    """

    def _block(self, count: int) -> int:
        if count < 0 or count >= 1 << 63 or (self.type in _HEADERS and count > _LARGEST_HEADER):
            raise ArchiveError(f"a member claims a size of {str(count)[:30]} bytes")
        return super()._block(count)  # type: ignore[misc]


class _Forward:
    """What a decompressor makes of a file, up to `most` bytes, or a plain file. Stops readers that never stop."""

    def __init__(self, source: BinaryIO, *, compressed: bool, most: int, name: str) -> None:
        self._source, self._most, self._name = source, most, name
        self.compressed = compressed
        self.last = b""
        """What was read last."""
        self._position, self._empty_reads = 0, 0

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(min(size if size >= 0 else 1 << 62, self._most + 1))
        self.last = data
        self._position += len(data)
        self._empty_reads = 0 if data else self._empty_reads + 1
        if self.compressed and self._position > self._most:
            raise ArchiveError(f"{self._name} unpacks to more than its limit: use a smaller archive.")
        if self._empty_reads > 100:
            raise ArchiveError("its end is missing")
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        if not self.compressed:
            self._position = self._source.seek(position)
        while self._position < position and self.read(min(position - self._position, 1 << 20)):
            pass
        return self._position

    def close(self) -> None:
        pass  # `open_tar` closes the source


class _Xz(io.RawIOBase):
    """Decompresses xz with bounded memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._decoder = file, self._new()

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(memlimit=_XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data, block = b"", b""
        while not data:
            if self._decoder.eof:  # another stream, or zeros up to a multiple of four bytes
                block = (self._decoder.unused_data or self._file.read(1 << 16)).lstrip(b"\0")
                if not block:
                    return 0
                self._decoder = self._new()
            elif self._decoder.needs_input and not (block := self._file.read(1 << 16)):
                raise EOFError("its end is missing")
            data = self._decoder.decompress(block, max_length=len(buffer))
            block = b""
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def open_tar(archive: Path, limits: Limits) -> Iterator[tarfile.TarFile]:
    """Open a tar, compressed or not, for `checked`."""
    with ExitStack() as stack:
        file: Any = stack.enter_context(archive.open("rb"))
        start = file.read(6)
        file.seek(0)
        compressed = True
        if start.startswith(b"\x1f\x8b"):
            file = stack.enter_context(gzip.GzipFile(fileobj=file))
        elif start.startswith(b"BZh"):
            file = stack.enter_context(bz2.BZ2File(file))
        elif start == b"\xfd7zXZ\0" or start.startswith(b"]\0\0"):
            file = stack.enter_context(io.BufferedReader(_Xz(file), 1 << 16))
        else:
            compressed = False
        bounded = _Forward(file, compressed=compressed, most=limits.stream_bytes, name=archive.name)
        yield stack.enter_context(
            tarfile.TarFile(fileobj=bounded, tarinfo=_CheckedMember)  # type: ignore[arg-type]
        )


def checked(tar: tarfile.TarFile, archive: Path, limits: Limits) -> Iterator[tarfile.TarInfo]:
    """The members of a tar of every kind.

    Raises:
        ArchiveError: more than `limits` allows, a sparse file, or a damaged header, where Python's reader would stop
            without an error.
    """
    for count, member in enumerate(tar, 1):
        if count > limits.members:
            raise ArchiveError(
                f"{archive.name} holds more than {limits.members} folders and files: split it."
            )
        if member.issparse():
            raise ArchiveError(
                f"{archive.name} holds a sparse file: pack the files again without that option."
            )
        yield member
    # The reader ends at a block of zeros, at the end of the file, or at a header that it cannot read.
    if any(tar.fileobj.last):  # type: ignore[union-attr]
        raise ArchiveError("the header of a member is damaged")


def _is_tar(archive: Path) -> bool:
    try:
        with open_tar(archive, Limits(files=1, total_bytes=1 << 20)):
            return True
    except (tarfile.TarError, OSError, EOFError, ValueError, lzma.LZMAError):
        return False


def _printable(name: str) -> str:
    """A member's path in a tar. Bytes that are not UTF-8 are read as Western European, so that it can be printed."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
    return name
