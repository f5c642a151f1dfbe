"""The geometry of crops: buckets, crops around what matters, decoding at a fraction of the size."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl.data.framing import Framing, Salience, buckets, crop_box, cut, nearest_bucket, place_crop
from sdxl.data.picture_reader import read_image
from tiny_world.parts import pad
from tiny_world.raster import mask_box, render
from tiny_world.subjects import random_shot, shot_parts, subject


@pytest.mark.parametrize(
    ("side", "step", "count"), [(1024, 64, 11), (768, 64, 7), (512, 64, 5), (256, 32, 5)]
)
def test_buckets_have_one_area_and_no_extreme_shape(side: int, step: int, count: int):
    sizes = buckets(side)
    assert len(sizes) == len(set(sizes)) == count
    assert (side, side) in sizes
    for height, width in sizes:
        assert height % step == width % step == 0
        assert 0.75 * side**2 <= height * width <= side**2
        assert max(height, width) <= 2 * min(height, width)
        assert (width, height) in sizes


def test_the_nearest_bucket_loses_the_least():
    assert nearest_bucket((3000, 4000), 1024) == (896, 1152)
    assert nearest_bucket((4000, 3000), 1024) == (1152, 896)
    assert nearest_bucket((1000, 1010), 1024) == (1024, 1024)
    assert nearest_bucket((100, 900), 1024) == (704, 1408)


def blob(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((height, width), np.float32)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return mask


def test_crops_are_centred_or_follow_the_mask():
    assert place_crop((100, 300), (100, 100), None).crop_top_left == (0, 100)
    right = Salience(mask=blob(50, 150, (130, 10, 140, 20)))
    assert place_crop((100, 300), (100, 100), right).crop_top_left == (0, 200)
    low = Salience(mask=blob(150, 50, (10, 60, 20, 80)))
    assert place_crop((300, 100), (50, 50), low).crop_top_left == (45, 0)
    assert place_crop((100, 300), (100, 100), Salience(mask=np.zeros((5, 5)))).crop_top_left == (0, 100)


def test_a_box_to_keep_is_kept_against_the_mask_where_it_fits():
    mask = blob(100, 300, (0, 0, 60, 100))
    kept = place_crop((100, 300), (100, 100), Salience(mask=mask * 0.4, keep=[(0.8, 0.2, 0.95, 0.8)]))
    assert 185 <= kept.crop_top_left[1] <= 240
    wide = place_crop((100, 300), (100, 100), Salience(mask=mask * 0.4, keep=[(0.3, 0.2, 0.95, 0.8)]))
    assert wide.crop_top_left[1] <= 60


def test_crops_of_known_scenes_hold_the_subject():
    rng = np.random.default_rng(7)
    parts = [shot_parts(random_shot("TOK", rng), {"TOK": subject(seed)}, seed) for seed in range(0, 120, 2)]
    masks = render(pad(parts)).masks[:, 0]
    held = seen = 0
    for mask in masks:
        box = mask_box(mask)
        if box is None:
            continue
        seen += 1
        offset = int(rng.integers(0, 257))
        canvas = np.zeros((256, 512), np.float32)
        canvas[:, offset : offset + 256] = mask.numpy()
        framing = place_crop((256, 512), (256, 256), Salience(mask=canvas))
        left = framing.crop_top_left[1]
        held += left <= box[0] + offset and box[2] + offset <= left + 256
    assert seen > 50
    assert held / seen >= 0.99


def test_a_framing_knows_its_scale_and_what_it_loses():
    framing = place_crop((200, 300), (100, 100), None)
    assert framing.scale == 0.5
    assert framing.covered_size == (100, 150)
    assert framing.cut_off == pytest.approx(1 / 3)
    uncropped = Framing(original_size=(90, 60), crop_top_left=(0, 0), target_size=(180, 120))
    assert uncropped.scale == 2
    assert uncropped.cut_off == 0


def test_two_framings_in_a_row_describe_the_original():
    first = Framing(original_size=(200, 300), crop_top_left=(10, 0), target_size=(192, 320))
    second = place_crop((192, 320), (96, 96), None)
    assert first.followed_by(second).time_ids == [200, 300, 5, 32, 96, 96]


def test_cutting_at_another_scale_shows_the_same_place():
    large = Image.effect_noise((800, 600), 60).convert("RGB").resize((1600, 1200), Image.Resampling.BICUBIC)
    framing = place_crop((1200, 1600), (256, 256), Salience(mask=blob(60, 80, (70, 0, 80, 60))))
    assert crop_box(large, framing)[2] == pytest.approx(1600, abs=3)
    whole, half = cut(large, framing), cut(large.reduce(2), framing)
    assert np.abs(np.asarray(whole, float) - np.asarray(half, float)).mean() < 2


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_draft_covers_at_least_and_reports_the_true_size(tmp_path: Path, orientation: int):
    picture = Image.linear_gradient("L").resize((1600, 800)).convert("RGB")
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "x.jpg", exif=exif)
    whole, size = read_image(tmp_path / "x.jpg")
    draft, told = read_image(tmp_path / "x.jpg", at_least=(200, 200))
    assert told == size == (whole.height, whole.width)
    assert draft.size == (whole.width // 4, whole.height // 4)
    assert np.abs(np.asarray(whole.reduce(4), float) - np.asarray(draft, float)).mean() < 2
