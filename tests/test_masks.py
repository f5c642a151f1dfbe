"""Soft and inverted masks, and drawing only the part around a mask, on the miniature with a narrow UNet."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from dataset_and_utils import TokenMap
from predict import Predictor
from sdxl.errors import UserInputError
from sdxl.serving.canvas import Canvas, lay_out
from sdxl.serving.denoising import Kept
from sdxl.serving.generation import generate
from sdxl.serving.masks import feather, latent_mask
from sdxl.serving.pipeline import load_pipeline, load_refiner
from sdxl.serving.request import DrawingOptions, LayoutOptions
from sdxl.serving.samplers import SCHEDULERS, make_scheduler
from tests.conftest import REPOSITORY, call

REFINER = REPOSITORY / "base_models" / "tiny-sdxl-refiner"


@pytest.fixture(scope="module")
def pipeline(narrow_base: Path):
    made = load_pipeline(narrow_base, torch.device("cpu"))
    made.set_progress_bar_config(disable=True)
    return made


def photo(size: tuple[int, int] = (96, 64)) -> Image.Image:
    blocks = np.random.default_rng(0).integers(60, 200, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


def box_mask(
    size: tuple[int, int] = (96, 64), box: tuple[int, int, int, int] = (32, 16, 64, 48), *, paint: int = 255
) -> Image.Image:
    drawn = Image.new("L", size, 0)
    drawn.paste(paint, box)
    return drawn


def across(size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Black at the left, white at the right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, size[0]).astype(np.uint8), (size[1], 1)))


def canvas(**given: Any) -> Canvas:
    return lay_out(LayoutOptions(**{"image": photo(), **given}), native=80)


def draw(pipeline: Any, on: Canvas, refiner: Any = None, **given: Any) -> np.ndarray:
    options = {"prompt": "a red fish", "seed": 1, "num_inference_steps": 8, "guidance_scale": 1.0, **given}
    [request] = DrawingOptions(**options).on(on)
    [drawn] = generate(pipeline, request, TokenMap({}), refiner)
    return np.asarray(drawn).astype(int)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# What a mask means ------------------------------------------------------------------------------------------------------


def test_grey_stays_grey_and_what_lossy_files_add_is_removed():
    mask = canvas(mask=across()).mask
    assert mask is not None
    values = pixels(mask)[0]
    assert (np.diff(values) >= 0).all() and len(np.unique(values)) > 80
    assert abs(values[48] - 128) <= 3
    assert (values[:6] == 0).all() and (values[-6:] == 255).all()


def test_a_mask_of_another_size_follows_its_picture():
    fitted = pixels(
        canvas(image=photo((100, 100)), mask=box_mask((50, 50), (25, 0, 50, 50)), width=64, height=64).mask
    )
    assert (fitted[:, :30] == 0).all()
    assert (fitted[:, 34:] == 255).all()


def test_blur_softens_the_edge_by_pixels_of_the_picture():
    hard, soft = (pixels(canvas(mask=box_mask(), mask_blur=blur).mask)[32] for blur in (0, 4))
    assert set(hard) == {0, 255}
    assert soft[31] in range(100, 128) and soft[32] in range(128, 156), "the edge stays where it was"
    # A Gaussian of 4 pixels: 16 % of it lie more than 4 pixels from its middle.
    assert abs(soft[28] / 255 - 0.16) < 0.05 and abs(soft[35] / 255 - 0.84) < 0.05
    assert soft[10] == 0


def test_an_inverted_mask_repaints_the_rest():
    one = canvas(mask=box_mask(), mask_invert=True).mask
    other = canvas(mask=Image.eval(box_mask(), lambda value: 255 - value)).mask
    assert one is not None and other is not None and one.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": Image.new("L", (96, 64))}, "mask is completely black: paint"),
        ({"mask": Image.new("L", (96, 64)), "only_masked": True}, "mask is completely black: paint"),
        ({"mask": Image.new("L", (96, 64), 90)}, "too dark, with a brightest value of 90"),
        ({"mask": Image.new("L", (96, 64), 255), "mask_invert": True}, "With mask_invert nothing of mask is repainted"),
        ({"mask": box_mask(), "mask_blur": 300}, "mask_blur is 300, but must be from 0 to 256"),
        ({"mask": box_mask(), "mask_padding": -1}, "mask_padding is -1"),
        (
            {
                "image": photo((1600, 70)), "mask": box_mask((1600, 70), (0, 0, 1600, 70)), "only_masked": True,
                "width": 1024, "height": 1024,
            },
            "would be drawn at 1024×48, but sides must be at least 64 pixels: leave out",
        ),
        (
            {
                "image": photo((1600, 1500)), "mask": box_mask((1600, 1500), (9, 9, 10, 10)), "only_masked": True,
                "mask_padding": 2000,
            },
            "Nothing of mask is left at 80×80: make its white area larger, or give less mask_blur or mask_padding",
        ),
        (
            {"image": Image.new("RGB", (8000, 7000)), "mask": box_mask(), "only_masked": True},
            "image has 8000×7000 pixels, but only_masked takes at most 50 million",
        ),
    ],
)  # fmt: skip
def test_masks_that_cannot_be(given: dict[str, Any], message: str):
    with pytest.raises(UserInputError, match=message):
        canvas(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"mask": box_mask(paint=200)},
        {"mask": box_mask(), "mask_blur": 30},
        {
            "image": photo((700, 500)),
            "mask": box_mask((700, 500), (9, 9, 12, 12)),
            "only_masked": True,
            "mask_padding": 700,
        },
    ],
)
def test_a_mask_without_white_is_told(given: dict[str, Any], caplog: pytest.LogCaptureFixture):
    canvas(**given)
    assert caplog.text.count("Nothing is repainted in full, because the mask has at most") == 1
    caplog.clear()
    canvas(mask=box_mask())
    assert not caplog.text


# Pixels -----------------------------------------------------------------------------------------------------------------


def test_the_feather_of_a_hard_mask_is_narrow_and_all_white_is_drawn():
    mask = box_mask()
    soft, hard = pixels(feather(mask)), pixels(mask)
    assert (soft[hard == 255] == 255).all()
    near = pixels(mask.filter(ImageFilter.MaxFilter(5)))
    assert (soft[near == 0] == 0).all() and ((soft > 0) & (soft < 255)).any()


def test_a_soft_mask_is_its_own_feather():
    mask = canvas(mask=box_mask(), mask_blur=5).mask
    assert mask is not None and feather(mask).tobytes() == mask.tobytes()


@pytest.mark.parametrize("blur", [0, 2, 8])
def test_black_keeps_every_pixel_and_grey_blends(pipeline, blur: int):
    on = canvas(mask=box_mask(), mask_blur=blur)
    assert on.image is not None and on.mask is not None
    drawn, before = draw(pipeline, on), pixels(on.image)
    shown = pixels(feather(on.mask))
    assert np.array_equal(drawn[shown == 0], before[shown == 0])
    change = np.abs(drawn - before).max(-1)
    little, much = ((shown > 0) & (shown < 64)), shown > 192
    assert change[little].mean() < change[much].mean() / 2


def test_cells_are_as_bright_as_their_brightest_pixel():
    cells = latent_mask(box_mask(box=(31, 16, 64, 47)))
    assert np.array_equal(np.argwhere(cells == 1).min(0), (2, 3)) and np.array_equal(
        np.argwhere(cells == 1).max(0), (5, 7)
    )
    assert set(np.unique(cells)) == {0.0, 1.0}
    grey = latent_mask(box_mask(paint=127))
    assert grey.max() == pytest.approx(127 / 255)


# Latents ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_cell_is_kept_until_its_share_of_the_noise_is_left(pipeline, scheduler: str):
    steps = make_scheduler(scheduler, pipeline)
    steps.set_timesteps(10)
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).reshape(1, 1, 1, 5)
    picture, noise = torch.randn(2, 1, 4, 1, 5)
    kept = Kept(latents=picture, noise=noise, mask=shares, begin=steps.timesteps[0])
    drawn = torch.full_like(picture, 7.0)
    free = []
    for timestep in [*steps.timesteps.unique().flip(0)[1:], None]:
        put = kept.put_into(drawn, steps, timestep)
        free.append((put == drawn).all(1).flatten().tolist())
        around = picture if timestep is None else steps.add_noise(picture, noise, timestep.reshape(1))
        assert torch.equal(put[..., 0], around[..., 0])
        if timestep is not None:
            assert free[-1] == [bool(share > timestep / steps.timesteps[0]) for share in shares.flatten()]
    assert free[0] == [False, False, False, free[0][3], True]
    assert free[-1] == [False, True, True, True, True]


def test_a_share_of_the_mask_is_that_share_of_the_strength(pipeline):
    """A half grey mask everywhere draws about what half the `prompt_strength` draws, and shows half of it."""
    grey = canvas(mask=Image.new("L", (96, 64), 128))
    before = pixels(photo())
    half = before + (draw(pipeline, canvas(), prompt_strength=0.5) - before) / 2
    masked = draw(pipeline, grey, prompt_strength=1.0)
    full = before + (draw(pipeline, canvas(), prompt_strength=1.0) - before) / 2
    assert np.abs(masked - half).mean() < np.abs(masked - full).mean() / 2


@pytest.mark.parametrize("refine", ["expert_ensemble_refiner", "base_image_refiner"])
@pytest.mark.parametrize("strength", [0.0, 0.8])
def test_soft_masks_work_with_the_refiner(pipeline, refine: str, strength: float):
    on = canvas(mask=across(), only_masked=False)
    drawn = draw(pipeline, on, load_refiner(REFINER, pipeline), refine=refine, prompt_strength=strength)
    assert np.array_equal(drawn[:, :5], pixels(photo())[:, :5])
    assert np.abs(drawn - pixels(photo()))[:, 64:].mean() > 2


# Only masked ------------------------------------------------------------------------------------------------------------

LARGE = (700, 500)
SPOT = (500, 100, 560, 140)


def part(**given: Any) -> Canvas:
    return canvas(image=photo(LARGE), mask=box_mask(LARGE, SPOT), only_masked=True, **given)


@pytest.mark.parametrize(
    ("given", "box", "size"),
    [
        ({"mask_padding": 20}, (480, 80, 580, 160), (88, 72)),
        ({"mask_padding": 0}, SPOT, (96, 64)),
        ({"mask_padding": 20, "width": 64, "height": 64}, (480, 70, 580, 170), (64, 64)),
        ({"mask_padding": 20, "aspect_ratio": "1:1"}, (480, 70, 580, 170), (80, 80)),
        ({"mask_padding": 2000}, (0, 0, *LARGE), (96, 64)),
        ({"mask_padding": 2000, "width": 128, "height": 128}, (0, 0, *LARGE), (128, 88)),
    ],
)
def test_the_part_around_the_mask(given: dict[str, Any], box: Any, size: tuple[int, int]):
    on = part(**given)
    assert on.surroundings is not None
    assert on.surroundings.box == box
    assert (on.width, on.height) == size
    assert on.image is not None and on.mask is not None and on.image.size == on.mask.size == size


@pytest.mark.parametrize("seed", range(20))
def test_any_part_can_be_drawn_and_put_back(seed: int):
    dice = np.random.default_rng(seed)
    width, height, left, top = (int(side) for side in dice.integers(64, 400, 4))
    given: dict[str, Any] = {
        "mask_blur": int(dice.integers(0, 12)),
        "mask_padding": int(dice.integers(0, 90)),
    }
    if seed % 2:
        given |= {"width": int(dice.integers(128, 900)), "height": int(dice.integers(128, 900))}
    spot = (left % width, top % height, left % width + 24, top % height + 60)
    on = canvas(
        image=photo((width, height)), mask=box_mask((width, height), spot), only_masked=True, **given,
        mask_invert=seed % 5 == 0,
    )  # fmt: skip
    around = on.surroundings
    assert around is not None
    assert on.width % 8 == on.height % 8 == 0 and min(on.width, on.height) >= 64
    assert not given.get("width") or (on.width <= given["width"] + 4 and on.height <= given["height"] + 4)
    left, top, right, bottom = around.box
    assert (right - left) / (bottom - top) == pytest.approx(on.width / on.height, rel=0.15)
    outside = pixels(around.mask)
    yellow = pixels(around.put_back(Image.new("RGB", (on.width, on.height), "yellow")))
    assert (yellow[outside == 255] == (255, 255, 0)).all()
    outside[top:bottom, left:right] = 0
    assert not outside.any()


def test_a_part_at_the_border_is_moved_into_the_picture():
    on = canvas(
        image=photo(LARGE), mask=box_mask(LARGE, (0, 490, 30, 500)), only_masked=True, mask_padding=10,
        width=64, height=64,
    )  # fmt: skip
    assert on.surroundings is not None and on.surroundings.box == (0, 460, 40, 500)


def test_a_thin_mask_is_drawn_with_what_is_beside_it():
    on = canvas(
        image=photo(LARGE), mask=box_mask(LARGE, (100, 200, 600, 204)), only_masked=True, mask_padding=0
    )
    assert on.surroundings is not None
    left, top, right, bottom = on.surroundings.box
    assert (left, right) == (100, 600) and (right - left) / (bottom - top) == pytest.approx(2.4, rel=0.01)
    assert (on.width, on.height) == (152, 64)


def test_a_long_picture_can_be_drawn_as_a_whole():
    on = canvas(image=photo((3000, 100)), mask=Image.new("L", (3000, 100), 255), only_masked=True)
    assert (on.width, on.height) == (1920, 64)


@pytest.mark.parametrize("blur", [0, 6])
def test_the_drawn_part_comes_back_into_the_whole_picture(pipeline, blur: int):
    on = part(mask_padding=20, mask_blur=blur)
    drawn, before = draw(pipeline, on, prompt_strength=1.0), pixels(photo(LARGE))
    assert drawn.shape == before.shape
    assert on.surroundings is not None
    shown = pixels(feather(on.surroundings.mask))
    assert np.array_equal(drawn[shown == 0], before[shown == 0])
    left, top, right, bottom = on.surroundings.box
    edges = np.ones_like(shown, bool)
    edges[top + 1 : bottom - 1, left + 1 : right - 1] = False
    assert (shown[edges] == 0).all(), "the mask has faded out where the part ends"
    inside = drawn[SPOT[1] + 20 : SPOT[3] - 15, SPOT[0] + 20 : SPOT[2] - 20]
    assert np.abs(inside - before[SPOT[1] + 20 : SPOT[3] - 15, SPOT[0] + 20 : SPOT[2] - 20]).mean() > 8


def test_what_is_drawn_fits_where_it_is_put(pipeline):
    """With strength 0 the part only passes the autoencoder, so it must look as before, in its place."""
    picture = Image.new("RGB", LARGE, "navy")
    ImageDraw.Draw(picture).rectangle((520, 110, 540, 130), fill="yellow")
    on = canvas(image=picture, mask=box_mask(LARGE, SPOT), only_masked=True, mask_padding=20)
    drawn = draw(pipeline, on, prompt_strength=0.0)
    assert np.abs(drawn - pixels(picture)).mean((0, 1)).max() < 1
    assert np.abs(drawn[112:128, 522:538] - (255, 255, 0)).mean() < 40


def test_a_delivered_picture_has_its_size_and_all_pixels_around(predictor: Predictor, tmp_path: Path):
    """Also under the watermark, and with the hole of the picture as its mask."""
    layered = photo(LARGE).convert("RGBA")
    layered.putalpha(Image.eval(box_mask(LARGE, SPOT), lambda value: 255 - value))
    layered.save(tmp_path / "hole.png")
    small = {"prompt": "a red fish", "num_inference_steps": 2, "width": 64, "height": 64, "seed": 0}
    [file] = call(predictor.run, **small, image=str(tmp_path / "hole.png"), only_masked=True, mask_blur=3)
    with Image.open(file) as opened:
        drawn = pixels(opened)
    changed = np.argwhere((drawn != pixels(photo(LARGE))).any(-1))
    (top, left), (bottom, right) = changed.min(0), changed.max(0)
    assert drawn.shape == pixels(photo(LARGE)).shape
    assert SPOT[0] - 10 <= left < SPOT[0] + 5 and SPOT[2] - 5 < right <= SPOT[2] + 10
    assert SPOT[1] - 10 <= top < SPOT[1] + 5 and SPOT[3] - 5 < bottom <= SPOT[3] + 10


def test_the_fields_of_a_canvas_are_those_of_a_request():
    from sdxl.serving.request import GenerationRequest

    ours = {one.name for one in dataclasses.fields(Canvas)}
    assert ours < {one.name for one in dataclasses.fields(GenerationRequest)}
