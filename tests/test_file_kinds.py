"""What a file is that is not what its name says."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from sdxl.files.archives import pack_tar
from sdxl.files.file_kinds import describe_other_kind


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("1.txt", "x" * 2000)
    return buffer.getvalue()


def torch_saved(**options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(300)}, buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>login</html>", "is a web page"),
        (b"\xef\xbb\xbf\n  <HTML lang=en>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
        (torch_saved(), "is a pickle"),
        (torch_saved(_use_new_zipfile_serialization=False), "is a pickle"),
        (torch_saved()[:500], "is a pickle"),
        *((pickle.dumps({"a": [1]}, protocol), "is a pickle") for protocol in (0, 2, 5)),
        (
            b"Rar!\x1a\x07\x01\x00" + bytes(50),
            "rar archive, which cannot be read here: unpack it and pack the",
        ),
        (b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(50), "7z archive"),
        (b"\x28\xb5\x2f\xfd" + bytes(50), "Zstandard archive"),
        *((picture(kind), "is a picture") for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF")),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is a picture"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "is a video"),
        (b"%PDF-1.7\n\xe2\xe3", "is a PDF"),
        (zipped()[:1000], "is an incomplete zip"),
        (json.dumps({"error": "not found"}).encode(), "is JSON text"),
        (b" [1, 2]", "is JSON text"),
        ("käse, 1\n".encode() * 200, "is a text file"),
        ("notes".encode("utf-16"), "is a text file"),
        (b"GGUF\3\0\0\0", "is a file of weights"),
        *(
            (save({"x" * n: torch.zeros(2)}), "is a file of weights") for n in (5, 500, 66_000, 66_116)
        ),  # the last begins like a pickle
    ],
)
@pytest.mark.parametrize("name", ["file.zip", "file.safetensors", "file"])
def test_a_kind_is_told_by_its_content(tmp_path: Path, content: bytes, says: str, name: str):
    (tmp_path / name).write_bytes(content)
    told = describe_other_kind(tmp_path / name, wanted="a LoRA")
    assert told is not None and says in told
    assert told.startswith("is ") and told.endswith(".") and told.count(".") < 4 and "\n" not in told


def tar_of_a_tempting_name(folder: Path) -> Path:
    (folder / "1.txt").write_bytes(b"x")
    pack_tar({"GIF8.txt": folder / "1.txt"}, folder / "a.tar")
    return folder / "a.tar"


def complete_zip(folder: Path) -> Path:
    (folder / "a.zip").write_bytes(zipped())
    return folder / "a.zip"


def unknown_bytes(folder: Path) -> Path:
    (folder / "a").write_bytes(bytes(range(256)) * 8)
    return folder / "a"


@pytest.mark.parametrize(
    "make",
    [
        tar_of_a_tempting_name,
        complete_zip,
        unknown_bytes,
        lambda folder: folder,
        lambda folder: folder / "missing",
    ],
)
def test_archives_and_unknown_files_are_not_described(tmp_path: Path, make: Callable[[Path], Path]):
    assert describe_other_kind(make(tmp_path)) is None
