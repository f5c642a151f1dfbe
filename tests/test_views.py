"""Views: sharp crops of the original, as far as it has the pixels, and the whole picture in between."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.photographs import photograph
from benchmarks.views import cut_of
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.data.dataset_folder import PreparedPicture, read_dataset_folder
from sdxl.training.config import resolve_views
from sdxl.training.random_views import LARGEST_ZOOM, WHOLE_SHARE, View, views_of


def astronaut(*, width: int = 512, height: int = 512) -> Image.Image:
    """A photograph of 512×512 pixels, or its middle."""
    left, top = (512 - width) // 2, (512 - height) // 2
    return photograph("astronaut").crop((left, top, left + width, top + height))


def prepare(folder: Path, picture: Image.Image, side: int, **settings) -> PreparedPicture:
    """`picture`, prepared at `side`."""
    (folder / "raw").mkdir(parents=True)
    picture.save(folder / "raw" / "a.png")
    return prepare_again(folder, "raw", side, **settings)


def prepare_again(folder: Path, name: str, side: int, **settings) -> PreparedPicture:
    config = PreprocessConfig(target_size=side, global_caption="TOK", **settings)
    (prepared,) = read_dataset_folder(prepare_dataset(folder / name, folder / f"{name}-at", config=config))
    return prepared


def views(prepared: PreparedPicture, crops: int = 24, *, flip: bool = False) -> list[View]:
    return views_of(prepared, np.random.default_rng(0), crops=crops, flip=flip)


def finest(picture: Image.Image) -> float:
    """Energy of the finest detail: of the differences from the mean of the four neighbours."""
    grey = np.asarray(picture.convert("L"), np.float32)
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float(((grey[1:-1, 1:-1] - around / 4) ** 2).mean())


def zoom(view: View, whole: View) -> float:
    return view.resized_width / whole.resized_width


@pytest.mark.parametrize("bucketing", [False, True])
def test_crops_are_as_sharp_as_the_original_and_lie_where_the_time_ids_say(tmp_path: Path, bucketing: bool):
    original = astronaut(height=400)
    prepared = prepare(tmp_path, original, 192, bucketing=bucketing)
    whole, *crops = views(prepared)
    assert len(crops) == 24 and max(zoom(view, whole) for view in crops) > 1.25
    for view in crops:
        assert view.original_size == (400, 512) and view.picture.size == whole.picture.size
        direct = cut_of(original, view)
        assert finest(view.picture) / finest(direct) == pytest.approx(1, abs=0.12)
        difference = np.asarray(view.picture, np.float32) - np.asarray(direct, np.float32)
        assert np.abs(difference).mean() < 4  # a shift by one pixel gives more than 10


def test_crops_zoom_in_only_as_far_as_the_original_has_pixels(tmp_path: Path):
    whole, *crops = views(prepare(tmp_path / "some", astronaut(width=220, height=220), 192))
    assert 1.1 < max(zoom(view, whole) for view in crops) <= 220 / 192 < LARGEST_ZOOM
    for side in (192, 150):  # no pixel to spare, and too few
        (alone,) = views(prepare(tmp_path / str(side), astronaut(width=side, height=side), 192))
        assert alone.share == 1


def test_the_whole_picture_keeps_its_share_of_the_draws(tmp_path: Path):
    prepared = prepare(tmp_path, astronaut(), 128)
    for flip, times in ((False, 1), (True, 2)):
        shown = views(prepared, 10, flip=flip)
        assert len(shown) == 11 * times
        assert sum(view.share for view in shown) == pytest.approx(1)
        assert sum(view.share for view in shown[::11]) == pytest.approx(WHOLE_SHARE)


def test_a_prepared_set_keeps_its_large_copies(tmp_path: Path):
    first = prepare(tmp_path, astronaut(), 128)
    assert first.large is not None
    again = prepare_again(tmp_path, "raw-at", 128)
    assert again.large is not None and again.large.read_bytes() == first.large.read_bytes()
    # At another size, the prepared picture is the original.
    smaller = prepare_again(tmp_path, "raw-at-at", 96)
    assert smaller.large is not None
    with Image.open(smaller.large) as opened:
        assert opened.size == (128, 128)


@pytest.mark.parametrize("what", ["picture edited", "copy too large", "copy too small"])
def test_a_large_copy_that_does_not_fit_is_told_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
):
    prepared = prepare(tmp_path, astronaut(), 128)
    assert prepared.large is not None
    if what == "picture edited":
        with Image.open(prepared.picture) as opened:
            edited = opened.copy()
        edited.paste("red", (60, 60, 68, 68))
        edited.save(prepared.picture)
    else:
        astronaut().resize((512, 512) if "large" in what else (96, 96)).save(prepared.large)
    assert prepare_again(tmp_path, "raw-at", 128).large is None
    assert "0.large.png is not used" in caplog.text


def test_the_copy_of_a_deleted_picture_is_no_picture(tmp_path: Path):
    prepared = prepare(tmp_path, astronaut(), 128)
    (prepared.picture.with_name("1.large.png")).write_bytes(prepared.large.read_bytes())  # type: ignore[union-attr]
    assert prepare_again(tmp_path, "raw-at", 128).picture.name == "0.src.png"


def test_a_picture_enlarged_before_has_only_the_pixels_of_its_original(tmp_path: Path):
    prepared = prepare(tmp_path, astronaut(width=100, height=100), 192)
    assert prepared.large is None
    assert prepare_again(tmp_path, "raw-at", 96).large is None


@pytest.mark.parametrize(
    ("draws", "images", "wanted"),
    [
        (4000, 6, 17),
        (4000, 20, 5),
        (4000, 1, 0),
        (8000, 2, 63),
        (200, 6, 1),
        (80, 6, 0),
        (10**7, 100, 20),
        (10**9, 10**9, 0),
    ],
)
def test_the_number_of_views_follows_from_the_draws(draws: int, images: int, wanted: int):
    assert resolve_views(None, draws=draws, images=images) == wanted
    assert resolve_views(9, draws=draws, images=images) == 9
