"""Pictures and masks as cameras, scanners and editors save them: the prepared pixels are right, or people are told."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from sdxl.data.caption_text import one_line
from sdxl.data.picture_reader import is_picture_content, read_image
from sdxl.errors import DatasetError
from tests.conftest import png
from tests.test_odd_pictures import SIDE, file_of, plain, prepare

CORNERS = {(8, 8): (200, 0, 0), (8, -9): (0, 200, 0), (-9, 8): (0, 0, 200), (-9, -9): (200, 200, 0)}
"""Place in the picture, (row, column) → its colour."""


def quarters() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE))
    half = SIDE // 2
    for (top, left), colour in CORNERS.items():
        y, x = half * (top < 0), half * (left < 0)
        image.paste(colour, (x, y, x + half, y + half))
    return image


def left_half(value: int = 255, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A mask: its left half has this value."""
    mask = Image.new("L", size)
    mask.paste(value, (0, 0, size[0] // 2, size[1]))
    return mask


def deep_rgb() -> bytes:
    """A png of 16 bits per channel, which Pillow cannot write."""
    rows = (np.asarray(quarters()).astype(">u2") * 257).reshape(SIDE, -1)
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows.astype(">u2")))
    chunks = [(b"IHDR", header), (b"IDAT", content), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def turned(orientation: int) -> bytes:
    """A jpg that is upright after its orientation is applied."""
    stored = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that undoes it
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = quarters()
    if orientation in stored:
        image = image.transpose(Image.Transpose(stored[orientation]))
    return file_of(image, "JPEG", quality=95, subsampling=0, exif=exif)


def grey_profile(gamma: float) -> bytes:
    """The smallest ICC profile of a grey space."""
    white = struct.pack(">iii", 63190, 65536, 54061)
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"grey\0" + b"\0" * 78,
        b"wtpt": b"XYZ \0\0\0\0" + white,
        b"kTRC": b"curv\0\0\0\0" + struct.pack(">IHH", 1, int(gamma * 256), 0),
        b"cprt": b"text\0\0\0\0x\0\0\0",
    }
    table, body, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        data = content.ljust(-(-len(content) // 4) * 4, b"\0")
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"lcms", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + white
    return head.ljust(128, b"\0") + table + body


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(quarters(), *profiles, outputMode="LAB")
    assert converted is not None
    return converted


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((f"{orientation}.jpg", turned(orientation)) for orientation in range(10)),
        ("deep.png", deep_rgb()),
        ("lab.tif", file_of(lab(), "TIFF")),
        ("cmyk.tif", file_of(quarters().convert("CMYK"), "TIFF")),
        ("ycbcr.tif", file_of(quarters().convert("YCbCr"), "TIFF")),
        ("cmyk.jpg", file_of(quarters().convert("CMYK"), "JPEG", quality=95, subsampling=0)),
        ("profile.png", file_of(quarters(), icc_profile=b"damaged" * 30)),
        ("grey_profile.png", file_of(quarters(), icc_profile=grey_profile(1))),
        ("motion.jpg", turned(1) + b"\0\0\0\x18ftypmp42" + b"\0" * 99),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_corners_have_their_colours(tmp_path: Path, name: str, content: bytes):
    seen = plain(prepare(tmp_path, {name: content}) / "0.src.png")
    for place, colour in CORNERS.items():
        assert np.abs(seen[place] - colour).max() <= (30 if "lab" in name else 4)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_profiles_of_grey_pictures_count(tmp_path: Path, mode: str):
    image = Image.new("L", (SIDE, SIDE), 100)
    if mode == "I;16":
        image = Image.fromarray(np.full((SIDE, SIDE), 100 * 257, np.uint16))
    content = file_of(image if mode == "I;16" else image.convert(mode), icc_profile=grey_profile(1))
    seen = plain(prepare(tmp_path, {"1.png": content}) / "0.src.png")
    encoded = 255 * (1.055 * (100 / 255) ** (1 / 2.4) - 0.055)  # sRGB's curve
    assert np.abs(seen - encoded).max() <= 1.5


@pytest.mark.parametrize("values", [np.float32(0.5), np.float32(100), np.int32(1 << 20), np.int32(-5)])
def test_pictures_whose_white_is_unknown_are_refused(tmp_path: Path, values: np.generic):
    content = file_of(Image.fromarray(np.full((SIDE, SIDE), values)), "TIFF")
    with pytest.raises(DatasetError, match=r"^a/1\.tif has more than 16 bits a pixel: save it"):
        prepare(tmp_path, {"a/1.tif": content})


def test_raw_files_of_cameras_are_no_pictures(tmp_path: Path):
    (tmp_path / "1.dng").write_bytes(file_of(quarters(), "TIFF"))
    (tmp_path / "1.tif").write_bytes(file_of(quarters(), "TIFF"))
    assert not is_picture_content(tmp_path / "1.dng")
    assert read_image(tmp_path / "1.tif")[1] == (SIDE, SIDE)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (left_half(size=(32, 48)), r"^masks/1\.png is 32×48, but 1\.jpg is 48×32: turn the mask like its picture\.$"),
        (left_half(size=(24, 16)), r"^masks/1\.png is 24×16, but 1\.jpg is 48×32: give both the same size\.$"),
        (left_half(2, size=(48, 32)), r"^masks/1\.png is black .*: paint white what matters in 1\.jpg\.$"),
    ],
)  # fmt: skip
def test_masks_that_do_not_fit_are_refused_by_path(tmp_path: Path, mask: Image.Image, message: str):
    picture = file_of(Image.new("RGB", (48, 32), "navy"), "JPEG")
    with pytest.raises(DatasetError, match=message):
        prepare(tmp_path, {"1.jpg": picture, "masks/1.png": file_of(mask)})


def test_masks_that_are_not_white_or_show_a_picture_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    labels = left_half(1).convert("P")
    labels.putpalette([0, 0, 0, 128, 0, 0])  # the colours of a data set with many classes
    overlay = Image.open(io.BytesIO(png(3, (SIDE, SIDE)))).point(
        [60 + value // 2 for value in range(256)] * 3
    )
    overlay.paste("red", (0, 0, 20, 20))
    files = {f"{index}.png": png(index, (SIDE, SIDE)) for index in range(3)}
    masks = {"0.mask.png": labels, "1.mask.png": overlay, "2.mask.png": left_half()}
    prepare(tmp_path, {**files, **{name: file_of(mask) for name, mask in masks.items()}})
    assert "0.mask.png has a brightest value of 128 of 255: paint white what counts fully." in caplog.text
    assert "1.mask.png is mostly neither black nor white" in caplog.text
    assert "2.mask.png" not in caplog.text


def test_transparent_pictures_and_forgotten_masks_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    cut_out = quarters().convert("RGBA")
    cut_out.putalpha(left_half())
    prepare(tmp_path, {"1.png": file_of(cut_out), "2.png": png(2), "1_matte.png": file_of(left_half())})
    assert "1.png is transparent on 50% of its area: training learns white there." in caplog.text
    assert "1_matte.png is black and white like a mask" in caplog.text
    assert "2.png is" not in caplog.text


def test_a_caption_is_one_line_of_what_is_seen():
    assert one_line(" a\u200bTOK\ufeff\r\n\tat\u00a0home\u00ad\u202e \x1b") == "a TOK at home"
    joined = "👨\u200d👩\u200d👧 می\u200cخواهم 🏴\U000e0067\U000e007f"
    assert one_line(joined) == joined
