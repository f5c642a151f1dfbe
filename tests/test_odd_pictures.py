"""Pictures that are easily misread: transparent, turned, deep, coloured by a profile, animated, very long or tiny."""

import io
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from preprocess import PreprocessConfig, prepare_dataset
from sdxl.data import framed_pictures
from sdxl.data.contact_sheet import dataset_sheet
from sdxl.data.dataset_folder import read_dataset_folder
from sdxl.data.face_masks import face_salience
from sdxl.data.framing import crop_box, place_crop
from sdxl.data.picture_reader import LONGEST_RATIO, is_plain_png, read_header, read_image
from sdxl.data.pixel_budget import PixelBudget
from sdxl.errors import DatasetError
from sdxl.serving.canvas import cover, lay_out
from sdxl.serving.request import LayoutOptions
from sdxl.training.random_views import views_of
from tests.conftest import exchanged_profile, png, write_zip

SIDE = 64
TABLE = "image_file,caption,original_height,original_width,crop_top,crop_left\n0.src.png,TOK,128,128,0,0\n"
"""A dataset folder of one picture, which is half the size of its original."""


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def prepare(tmp_path: Path, files: dict[str, bytes | str], **settings) -> Path:
    config = PreprocessConfig(**{"target_size": SIDE, "caption_prefix": "a photo of TOK", **settings})
    return prepare_dataset(write_zip(tmp_path / "x.zip", files), tmp_path / "dataset", config=config)


def plain(path: Path) -> np.ndarray:
    """The pixels as a reader sees them that knows nothing of rotation, transparency or profiles."""
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)


def halves(mode: str = "RGB") -> Image.Image:
    """Red above, blue below."""
    image = Image.new("RGB", (SIDE, SIDE), (200, 0, 0))
    image.paste((0, 0, 200), (0, SIDE // 2, SIDE, SIDE))
    return image.quantize() if mode == "P" else image.convert(mode)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3
    return file_of(halves(), exif=exif)


def transparent() -> bytes:
    image = halves("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    return file_of(image)


def with_profile(mode: str = "RGB") -> bytes:
    """Red and blue exchanged by the profile."""
    return file_of(halves(mode), icc_profile=exchanged_profile("r", "b"))


def deep() -> bytes:
    return file_of(Image.fromarray(np.full((SIDE, SIDE), 100 * 257, np.uint16)))


def animated() -> bytes:
    return file_of(halves(), save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE), "lime")])


@pytest.mark.parametrize(
    ("content", "top", "bottom"),
    [
        (turned, (0, 0, 200), (200, 0, 0)),
        (transparent, (255, 255, 255), (255, 255, 255)),
        (with_profile, (0, 0, 200), (200, 0, 0)),
        (lambda: with_profile("P"), (0, 0, 200), (200, 0, 0)),
        (deep, (100, 100, 100), (100, 100, 100)),
        (animated, (200, 0, 0), (0, 0, 200)),
        (lambda: file_of(halves(), "JPEG", quality=95, subsampling=0), (200, 0, 0), (0, 0, 200)),
        (lambda: file_of(halves(), "WEBP", lossless=True), (200, 0, 0), (0, 0, 200)),
    ],
    ids=["turned", "transparent", "profile", "palette", "deep", "animated", "jpeg", "webp"],
)
def test_prepared_pictures_that_plain_readers_misread_are_written_anew(
    tmp_path: Path, content: Callable[[], bytes], top: tuple, bottom: tuple
):
    folder = prepare(tmp_path, {"0.src.png": content(), "captions.csv": TABLE})
    seen = plain(folder / "0.src.png")
    assert np.abs(seen[10, 32] - top).max() <= 6
    assert np.abs(seen[-10, 32] - bottom).max() <= 6
    with Image.open(folder / "0.src.png") as written:
        assert (written.format, written.mode) == ("PNG", "RGB")
    assert is_plain_png(folder / "0.src.png")
    assert (folder / "captions.csv").read_text() == TABLE, "the numbers of the original stay"


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("profile", [None, "sRGB"])
def test_plain_prepared_pictures_keep_their_bytes_and_are_read_by_all(
    tmp_path: Path, mode: str, profile: str | None
):
    options = {}
    if profile is not None:
        options = {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile(profile)).tobytes()}
    content = file_of(halves(mode), **options)
    mask = file_of(halves("L"), **options)
    folder = prepare(tmp_path, {"0.src.png": content, "0.mask.png": mask, "captions.csv": TABLE})
    assert (folder / "0.src.png").read_bytes() == content
    assert (folder / "0.mask.png").read_bytes() == mask
    (prepared,) = read_dataset_folder(folder)
    (view,) = views_of(prepared, np.random.default_rng(0), crops=0, flip=False)
    assert view.mask is not None
    assert np.array_equal(np.asarray(view.picture), np.asarray(halves(mode).convert("RGB")))
    assert np.array_equal(np.asarray(view.mask), np.asarray(halves("L")))
    assert dataset_sheet(folder, {"0.src.png": "TOK"}).mode == "RGB"


@pytest.mark.parametrize(
    ("content", "grey"),
    [
        (deep(), 100),
        (file_of(Image.new("LA", (SIDE, SIDE), (255, 100))), 100),
        (file_of(Image.new("L", (SIDE, SIDE), 100), "BMP"), 100),
    ],
    ids=["deep", "transparent", "bmp named png"],
)
def test_prepared_masks_that_plain_readers_misread_are_written_anew(
    tmp_path: Path, content: bytes, grey: int
):
    folder = prepare(
        tmp_path, {"0.src.png": png(0, (SIDE, SIDE)), "0.mask.png": content, "captions.csv": TABLE}
    )
    with Image.open(folder / "0.mask.png") as written:
        assert (written.format, written.mode) == ("PNG", "L")
        assert written.getextrema() == (grey, grey)


@pytest.mark.parametrize(
    ("kind", "suffix", "frames"),
    [("GIF", "png", 3), ("WEBP", "webp", 3), ("PNG", "png", 3), ("AVIF", "jpg", 3)],
)
def test_the_first_frame_is_used_and_the_log_says_so(
    tmp_path: Path, kind: str, suffix: str, frames: int, caplog: pytest.LogCaptureFixture
):
    others = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("lime", "white")][: frames - 1]
    folder = prepare(
        tmp_path,
        {f"1.{suffix}": file_of(halves(), kind, save_all=True, append_images=others), "2.png": png(2)},
    )
    told = f"1.{suffix} is animated ({frames} frames): only its first frame is used."
    assert [record.message for record in caplog.records if "frame" in record.message] == [told]
    seen = plain(folder / "0.src.png")
    assert np.abs(seen[10, 32] - (200, 0, 0)).max() <= 12


def test_pages_are_told_and_previews_of_phones_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    pages = {"save_all": True, "append_images": [Image.new("RGB", (SIDE, SIDE))]}
    prepare(
        tmp_path,
        {"scan.png": file_of(halves(), "TIFF", **pages), "phone.jpg": file_of(halves(), "MPO", **pages)},
    )
    assert "scan.png holds 2 pictures: only its main one is used." in caplog.text
    assert "phone.jpg" not in caplog.text


@pytest.mark.parametrize("size", [(4000, 40), (40, 4000), (1, 100_000), (8 * LONGEST_RATIO + 1, 8)])
def test_very_long_pictures_are_refused_by_name_and_size(tmp_path: Path, size: tuple[int, int]):
    width, height = size
    with pytest.raises(
        DatasetError, match=rf"^2\.png is {width}×{height}, but one side.*: crop it first"
    ) as caught:
        prepare(tmp_path, {"1.png": png(1), "2.png": file_of(Image.new("RGB", size))})
    assert "\n" not in str(caught.value)


def test_the_size_of_a_turned_picture_is_told_as_people_see_it(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = file_of(Image.new("RGB", (400, 10)), "JPEG", exif=exif)
    with pytest.raises(DatasetError, match=r"^a\.jpg is 10×400"):
        prepare(tmp_path, {"a.jpg": content})


@pytest.mark.parametrize(("side", "refused"), [(14_000, False), (14_200, True), (30_000, True)])
def test_pictures_are_refused_for_their_size_above_200_megapixels(tmp_path: Path, side: int, refused: bool):
    """Pillow's own limits are lower and twice as high."""
    header = b"IHDR" + struct.pack(">II", side, side) + png(1)[24:29]
    (tmp_path / "a.png").write_bytes(
        png(1)[:12] + header + struct.pack(">I", zlib.crc32(header)) + png(1)[33:]
    )
    if refused:
        with pytest.raises(DatasetError, match=r"^a\.png has more than 200 megapixels: shrink it first\.$"):
            read_header(tmp_path / "a.png")
    else:
        assert read_header(tmp_path / "a.png").pixels == side * side


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (20, 7)])
def test_pictures_that_show_nothing_are_refused(tmp_path: Path, size: tuple[int, int]):
    width, height = size
    with pytest.raises(DatasetError, match=rf"^2\.png is {width}×{height} pixels, which shows nothing"):
        prepare(tmp_path, {"1.png": png(1), "2.png": file_of(Image.new("RGB", size))})


@pytest.mark.parametrize("bucketing", [False, True])
@pytest.mark.parametrize("size", [(20, 30), (8, 8), (8 * LONGEST_RATIO, 8), (8, 8 * LONGEST_RATIO)])
def test_small_and_long_pictures_within_the_limits_work(
    tmp_path: Path, size: tuple[int, int], bucketing: bool
):
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, 4, 4))
    files = {"0.png": file_of(Image.new("RGB", size, (9, 99, 199))), "0.mask.png": file_of(mask)}
    folder = prepare(tmp_path, files, bucketing=bucketing)
    assert plain(folder / "0.src.png").reshape(-1, 3).mean(0).round().tolist() == [9, 99, 199]
    assert plain(folder / "0.mask.png").max() > 200, "the crop follows the mask at the end"


@pytest.mark.parametrize("size", [(1, 1), (32, 1), (3, 90)])
def test_looking_for_faces_bears_any_size(size: tuple[int, int]):
    assert face_salience(Image.new("RGB", size), 1.0) is None


def test_only_what_is_shown_is_enlarged(monkeypatch: pytest.MonkeyPatch):
    """A picture of 32:1 that covers the largest size would be 65,536 pixels wide."""
    asked: list[tuple[int, int]] = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, *rest, **more: (asked.append(size), resize(self, size, *rest, **more))[1],
    )
    long = Image.new("RGB", (64 * LONGEST_RATIO, 64), "navy")
    long.paste("red", (30 * 32, 0, 34 * 32, 64))
    shown = cover(long, (2048, 2048))
    assert (shown.size, shown.getpixel((1024, 1024)), shown.getpixel((0, 0))) == (
        (2048, 2048),
        (255, 0, 0),
        (255, 0, 0),
    )
    white = long.convert("L").point([0] * 50 + [255] * 206)
    mask = lay_out(LayoutOptions(image=long, mask=white, width=2048, height=2048), native=64).mask
    assert mask is not None and mask.getextrema() == (255, 255)
    assert max(width * height for width, height in asked) <= 2048 * 2048


def test_of_a_long_picture_only_the_crop_is_enlarged_by_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upscaler_folder: Path
):
    from sdxl.data.upscaler import Upscaler

    monkeypatch.setenv("SDXL_UPSCALER", str(upscaler_folder))
    asked: list[tuple[int, int]] = []
    enlarge = Upscaler.enlarge
    monkeypatch.setattr(
        Upscaler, "enlarge", lambda self, image: (asked.append(image.size), enlarge(self, image))[1]
    )
    long = Image.new("RGB", (32 * LONGEST_RATIO, 32), "navy")
    long.paste("orange", (15 * LONGEST_RATIO, 0, 17 * LONGEST_RATIO, 32))
    folder = prepare(tmp_path, {"1.png": file_of(long)})
    assert asked == [(32, 32)]
    middle = plain(folder / "0.src.png")[32, 32].astype(int)
    orange, navy = (np.abs(middle - colour).sum() for colour in ((255, 165, 0), (0, 0, 128)))
    assert orange < navy / 2, middle  # a model with random weights shifts colours


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_damaged_later_frames_do_no_harm(tmp_path: Path):
    content = bytearray(
        file_of(halves(), "TIFF", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))])
    )
    with Image.open(io.BytesIO(content)) as opened:
        opened.seek(1)
        second = opened.tag_v2.offset  # type: ignore[attr-defined]
    content[second + 2 :] = b"\xff" * 8
    (tmp_path / "scan.tiff").write_bytes(content)
    assert read_header(tmp_path / "scan.tiff").pixels == SIDE * SIDE
    assert read_image(tmp_path / "scan.tiff")[1] == (SIDE, SIDE)


def test_covering_shows_the_same_pixels_as_enlarging_all():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8))
    framing = place_crop((50, 90), (64, 64), None)
    height, width = framing.covered_size
    top, left = framing.crop_top_left
    whole = image.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + 64, top + 64))
    assert np.abs(np.asarray(cover(image, (64, 64))).astype(int) - np.asarray(whole)).max() <= 1
    assert crop_box(image, framing)[2] <= 90


def test_pictures_that_do_not_fit_the_budget_wait_for_the_others():
    """The order of events: 60 of 100 are held, 50 must wait, 40 need not, and 1000 wait until all others are done."""
    budget, events = PixelBudget(100), []

    def take(pixels: int) -> None:
        with budget.taken(pixels):
            events.append(f"{pixels} in")
            events.append(f"{pixels} out")

    def begun(pixels: int) -> threading.Thread:
        """A thread that waits for its pixels, or has got them."""
        waiting, thread = budget.waiting, threading.Thread(target=take, args=(pixels,))
        thread.start()
        while budget.waiting == waiting and not events:
            time.sleep(0)
        return thread

    with budget.taken(60):
        threads = [begun(50), begun(1000)]
        take(40)
        events.append("60 out")
    for thread in threads:
        thread.join()
    assert events[:3] == ["40 in", "40 out", "60 out"]
    alone = [["50 in", "50 out"], ["1000 in", "1000 out"]]
    assert events[3:] in (alone[0] + alone[1], alone[1] + alone[0])
    assert budget.waiting == 0


def test_a_budget_below_every_picture_prepares_them_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    open_now, most = set(), []
    lock = threading.Lock()
    frame = framed_pictures._frame

    def counted(source, *rest):
        with lock:
            open_now.add(source.file)
            most.append(len(open_now))
        made = frame(source, *rest)
        with lock:
            open_now.remove(source.file)
        return made

    monkeypatch.setattr(framed_pictures, "OPEN_PIXELS", 1)
    monkeypatch.setattr(framed_pictures, "_frame", counted)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    folder = prepare(tmp_path, {f"{index}.png": png(index) for index in range(12)})
    assert len(read_dataset_folder(folder)) == 12
    assert set(most) == {1}


def test_the_header_counts_what_will_be_decoded(tmp_path: Path):
    Image.new("RGB", (1600, 1200)).save(tmp_path / "a.jpg")
    Image.new("RGB", (1600, 1200)).save(tmp_path / "a.png")
    assert read_header(tmp_path / "a.jpg").pixels == 1600 * 1200
    assert read_header(tmp_path / "a.jpg", at_least=(300, 300)).pixels == 400 * 300
    assert read_header(tmp_path / "a.png", at_least=(300, 300)).pixels == 1600 * 1200
    assert read_image(tmp_path / "a.jpg", at_least=(300, 300))[0].size == (400, 300)


def test_a_failed_picture_frees_its_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(framed_pictures, "OPEN_PIXELS", 1)
    budget = PixelBudget(10)
    with pytest.raises(ValueError, match="broken"), budget.taken(20):
        raise ValueError("broken")
    with budget.taken(20):
        pass
    with pytest.raises(DatasetError, match=r"1\.png"):
        prepare(tmp_path, {"0.png": png(0), "1.png": png(1)[:-40], "2.png": png(2)})


def test_the_title_of_a_narrow_sheet_fits(tmp_path: Path):
    mask = file_of(Image.new("L", (SIDE, SIDE), 9))
    folder = prepare(tmp_path, {"0.png": png(0, (SIDE, SIDE)), "0.mask.png": mask})
    sheet = np.asarray(dataset_sheet(folder, {"0.src.png": "TOK"}).convert("L"))
    title = np.flatnonzero((sheet[12:36] < 128).any(0))
    assert 300 < title.max() < sheet.shape[1] - 8
