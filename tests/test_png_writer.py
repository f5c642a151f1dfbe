"""PNG files are written with several threads: other programs must read the same pixels and texts."""

import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from sdxl.serving.png_writer import write_png


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (8, 8), (1, 700), (700, 1), (63, 65), (128, 511), (129, 512), (256, 257)]
)
@pytest.mark.parametrize("kind", ["noise", "flat", "ramp"])
def test_other_programs_read_the_same_pixels(tmp_path: Path, width: int, height: int, kind: str):
    rows, columns = np.mgrid[:height, :width]
    pixels = {
        "noise": np.random.default_rng(0).integers(0, 256, (height, width, 3)),
        "flat": np.full((height, width, 3), (255, 0, 7)),
        "ramp": np.stack([rows % 256, columns % 256, (rows + columns) % 256], 2),
    }[kind].astype(np.uint8)
    file = tmp_path / "x.png"
    write_png(Image.fromarray(pixels), file, {})
    with Image.open(file) as opened:
        opened.verify()
    with Image.open(file) as opened:
        assert opened.mode == "RGB" and np.array_equal(np.asarray(opened), pixels)
    read = cv2.imread(str(file), cv2.IMREAD_COLOR)
    assert read is not None and np.array_equal(read[..., ::-1], pixels)


@pytest.mark.parametrize("text", ["plain, 1:2", "two\nlines", "Äpfel für 猫 🐈", ""])
def test_texts_are_read_as_they_were_written(tmp_path: Path, text: str):
    file = tmp_path / "x.png"
    write_png(Image.new("RGB", (8, 8)), file, {"parameters": text, "Software": "x"})
    with Image.open(file) as opened:
        opened.load()
        assert opened.text == {"parameters": text, "Software": "x"}  # type: ignore[attr-defined]


def test_every_chunk_has_its_checksum_and_the_stream_its_own(tmp_path: Path):
    """Pillow forgives what stricter readers refuse."""
    file = tmp_path / "x.png"
    write_png(Image.effect_noise((200, 300), 50).convert("RGB"), file, {"a": "b"})
    content, at, kinds, data = file.read_bytes(), 8, [], b""
    while at < len(content):
        size = int.from_bytes(content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + size]
        assert int.from_bytes(content[at + 8 + size : at + 12 + size]) == zlib.crc32(kind + body)
        kinds.append(kind)
        data += body if kind == b"IDAT" else b""
        at += 12 + size
    assert kinds == [b"IHDR", b"tEXt", b"IDAT", b"IEND"]
    assert len(zlib.decompress(data)) == 300 * (1 + 3 * 200)


def test_drawn_pictures_are_not_much_larger_than_pillows(tmp_path: Path):
    picture = Image.open("docs/fast.jpg").convert("RGB")
    ours, theirs = tmp_path / "ours.png", tmp_path / "theirs.png"
    write_png(picture, ours, {})
    picture.save(theirs, compress_level=1, compress_type=zlib.Z_RLE)
    assert ours.stat().st_size < 1.02 * theirs.stat().st_size
