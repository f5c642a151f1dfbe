"""Archives that lie about themselves: each ends in one sentence, soon, without files outside the folder."""

import gzip
import io
import lzma
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sdxl.errors import ArchiveError
from sdxl.files.archives import Limits, in_place, unpack

SMALL = Limits(files=100, total_bytes=1 << 20)


def header(name: str = "a", size: int | bytes = 0, kind: bytes = b"0") -> bytes:
    """A ustar header. `size` as bytes is written as it is, such as a negative number in base 256."""
    block = bytearray(512)
    block[0 : len(name)] = name.encode()
    block[100:108] = b"0000644\0"
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def record(key: str, value: str) -> bytes:
    """A record of a pax header: its own length in decimal, then key=value."""
    length = len(f" {key}={value}\n")
    total = length + len(str(length))
    total = length + len(str(total))
    return f"{total} {key}={value}\n".encode()


def pax(key: str, value: str, kind: bytes = b"x") -> bytes:
    content = record(key, value)
    return header("x", len(content), kind) + content.ljust(-(-len(content) // 512) * 512, b"\0")


END = bytes(1024)
FILE = header("a", 3) + b"abc".ljust(512, b"\0")
NEGATIVE = b"\xff" * 11 + b"\x00"
"""A size of −256 in base 256."""


def plain(*blocks: bytes) -> Callable[[], bytes]:
    return lambda: b"".join(blocks) + END


TARS = {
    "negative size": plain(FILE, header("b", NEGATIVE)),
    "negative size in pax": plain(FILE, pax("size", "-1024"), header("b", 3)),
    "impossible size": plain(header("b", b"\x80" + b"\xff" * 11)),
    "impossible size in pax": plain(FILE, pax("size", "1" + "0" * 30), header("b", 3)),
    "size with 5,000 digits": plain(FILE, pax("size", "9" * 5000), header("b", 3) + b"abc".ljust(512, b"\0")),
    "long name of 2 GB": plain(header("n", 2 << 30, b"L"), FILE),
    "pax header of 2 GB": plain(header("n", 2 << 30, b"x"), FILE),
    "3,000 pax headers": plain(*[pax("path", "b")] * 3000, FILE),
    "sparse file of an exabyte": plain(
        pax("GNU.sparse.size", "1" + "0" * 18) + pax("GNU.sparse.map", "0,1"), header("b", 1), b"x" * 512
    ),
    "sparse map without an end": plain(
        header("x", len(record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0")), b"x")
        + (record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0")).ljust(512, b"\0"),
        header("b", 512),
        b"99999\n1\n".ljust(512, b"1"),
    ),
    "old sparse file": plain(header("b", 512, b"S") + bytes(512)),
    "damaged header after a file": plain(FILE, b"rubbish".ljust(512, b"\1"), header("b", 3) + b"abc"),
    "many folders": plain(*[header(f"d{index}", 0, b"5") for index in range(500)], FILE),
    "many links": plain(*[header(f"d{index}", 0, b"2") for index in range(500)], FILE),
    "cut in the content": lambda: FILE + header("b", 3000) + b"x" * 1000,
    "gzip bomb": lambda: gzip.compress(plain(header("b", 1 << 26), bytes(1 << 26))()),
    "gzip bomb in a skipped member": lambda: gzip.compress(
        plain(header("b", 1 << 26, b"5"), bytes(1 << 26))()
    ),
    "xz that wants much memory": lambda: lzma.compress(
        plain(FILE)(), filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 512 << 20}]
    ),
    "cut gzip": lambda: gzip.compress(plain(FILE)())[:-20],
    "cut xz": lambda: lzma.compress(plain(FILE)())[:60],
    "file in a file": plain(FILE, header("a/b", 3) + b"abc".ljust(512, b"\0")),
    "deep path": plain(pax("path", "a/" * 500 + "b"), header("b", 3) + b"abc".ljust(512, b"\0")),
    "long name": plain(pax("path", "a" * 300), header("b", 3) + b"abc".ljust(512, b"\0")),
    "line breaks in a path": plain(pax("path", "../\n\x1b[31m" * 30), header("b", 3) + bytes(512)),
}


@pytest.mark.parametrize("name", TARS)
def test_lying_tars_are_refused_in_one_sentence(tmp_path: Path, name: str):
    archive = tmp_path / "set.tar"
    archive.write_bytes(TARS[name]())
    with pytest.raises(ArchiveError) as caught:
        unpack(archive, tmp_path / "out", limits=SMALL)
    said = str(caught.value)
    assert said.startswith("set.tar ")
    assert said.endswith(".")
    assert said.isprintable()
    assert len(said) < 300
    assert str(tmp_path) not in said
    assert {path.name for path in tmp_path.iterdir()} <= {"set.tar", "out"}
    assert in_place(archive, limits=SMALL) is None or name == "file in a file"


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress], ids=["plain", "gzip", "xz"])
def test_honest_tars_of_every_kind_are_unpacked(tmp_path: Path, compress: Callable[[bytes], bytes]):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in {"a" * 150 + "/b": b"x" * 1024, "c": b"", "d": b"y" * 700}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    (tmp_path / "set.tar").write_bytes(compress(buffer.getvalue()))
    files = unpack(tmp_path / "set.tar", tmp_path / "out", limits=SMALL)
    assert [path.read_bytes() for path in files] == [b"x" * 1024, b"", b"y" * 700]


def test_a_tar_without_its_last_blocks_is_complete(tmp_path: Path):
    (tmp_path / "set.tar").write_bytes(FILE)
    assert [path.name for path in unpack(tmp_path / "set.tar", tmp_path / "out")] == ["a"]


def zip_of(entries: int, content: bytes = b"", method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for index in range(entries):
            archive.writestr(f"{index}/", b"") if not content else archive.writestr(f"{index}", content)
    return buffer.getvalue()


def overstated_directory() -> bytes:
    """A zip whose end claims a directory of 4 GB."""
    data = bytearray(zip_of(1, b"x"))
    struct.pack_into("<I", data, data.rfind(b"PK\5\6") + 12, 0xFFFF_FFF0)
    return bytes(data)


def unknown_compression() -> bytes:
    data = bytearray(zip_of(1, b"x"))
    struct.pack_into("<H", data, data.find(b"PK\1\2") + 10, 9)
    struct.pack_into("<H", data, 8, 9)
    return bytes(data)


ZIPS = {
    "many folders": lambda: zip_of(500),
    "directory of 4 GB": overstated_directory,
    "bomb": lambda: zip_of(3, bytes(1 << 19), zipfile.ZIP_DEFLATED),
    "unknown compression": unknown_compression,
    "damaged content": lambda: zip_of(1, b"a picture").replace(b"a picture", b"b picture", 1),
}


@pytest.mark.parametrize("name", ZIPS)
def test_lying_zips_are_refused_in_one_sentence(tmp_path: Path, name: str):
    archive = tmp_path / "set.zip"
    archive.write_bytes(ZIPS[name]())
    with pytest.raises(ArchiveError, match=r"^set\.zip .*\.$"):
        unpack(archive, tmp_path / "out", limits=SMALL)
