"""Text to image, image to image and inpainting, with every sampler and refiner mode, on the miniature."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image, ImageDraw

from dataset_and_utils import TokenMap
from sdxl.errors import UserInputError, WeightsError
from sdxl.serving.canvas import lay_out
from sdxl.serving.generation import generate
from sdxl.serving.masks import feather
from sdxl.serving.pipeline import load_pipeline, load_refiner
from sdxl.serving.request import GenerationRequest, LayoutOptions
from sdxl.serving.samplers import SCHEDULERS, SPACINGS, make_scheduler
from tests.conftest import REPOSITORY, TINY_BASE

REFINER = REPOSITORY / "base_models" / "tiny-sdxl-refiner"
THOROUGH = ["DDIM", "DPMSolverMultistep", "HeunDiscrete", "KarrasDPM", "K_EULER_ANCESTRAL", "K_EULER", "PNDM"]
"""The others are called in the same way as one of them."""
MODES = ["text", "image", "inpaint"]
REFINES = ["no_refiner", "expert_ensemble_refiner", "base_image_refiner"]
EVERYWHERE = ["HeunDiscrete", "PNDM"]
"""The samplers with more calls than steps are tried in each mode with each refiner. The other thorough ones meet each mode once and
each refiner once."""


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    made = load_pipeline(TINY_BASE, torch.device("cpu"))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def narrow_pipeline(narrow_base: Path) -> StableDiffusionXLPipeline:
    """Draws noise, and several times as fast: for what does not depend on the picture."""
    made = load_pipeline(narrow_base, torch.device("cpu"))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def refiner(pipeline: StableDiffusionXLPipeline):
    return load_refiner(REFINER, pipeline)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    drawn = Image.new("RGB", (64, 64), "navy")
    ImageDraw.Draw(drawn).ellipse((10, 10, 50, 44), fill="red")
    return drawn


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    drawn = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(drawn).rectangle((32, 16, 63, 40), fill=255)
    return drawn


def request(**given: Any) -> GenerationRequest:
    common = {"prompt": "a red fish on a blue background", "width": 64, "height": 64, "seed": 7}
    return GenerationRequest(**{**common, "num_inference_steps": 5, "guidance_scale": 4.0, **given})


def draw(pipeline, asked: GenerationRequest, refiner=None, **options: Any) -> list[np.ndarray]:
    return [np.array(drawn) for drawn in generate(pipeline, asked, TokenMap({}), refiner, **options)]


def inputs(mode: str, picture: Image.Image, mask: Image.Image) -> dict[str, Any]:
    return {"text": {}, "image": {"image": picture}, "inpaint": {"image": picture, "mask": mask}}[mode]


def far(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


@pytest.mark.parametrize(
    ("mode", "refine", "scheduler"),
    [
        *itertools.product(MODES, REFINES, EVERYWHERE),
        *(
            (mode, REFINES[(place + turn) % 3], name)
            for turn, name in enumerate(name for name in THOROUGH if name not in EVERYWHERE)
            for place, mode in enumerate(MODES)
        ),
        *(("inpaint", "expert_ensemble_refiner", name) for name in SCHEDULERS if name not in THOROUGH),
    ],
)
def test_each_picture_of_a_batch_is_the_single_one_of_its_seed(
    narrow_pipeline, refiner, picture, mask, mode: str, refine: str, scheduler: str
):
    asked = {"scheduler": scheduler, "refine": refine, **inputs(mode, picture, mask)}
    both = draw(narrow_pipeline, request(num_outputs=2, **asked), refiner)
    [second] = draw(narrow_pipeline, request(seed=8, **asked), refiner)
    assert far(both[1], second) <= 2, "sums of a batch may round differently, no more"
    assert far(both[0], both[1]) > 8
    assert all(one.std() > 4 for one in both)
    if mode == "inpaint":
        kept = np.array(feather(mask)) == 0
        assert np.array_equal(both[0][kept], np.array(picture)[kept])
        assert far(both[0][~kept], np.array(picture)[~kept]) > 8


def test_a_batch_in_turns_is_the_batch(pipeline):
    asked = request(num_outputs=3, scheduler="K_EULER_ANCESTRAL")
    for one, other in zip(draw(pipeline, asked), draw(pipeline, asked, at_once=1), strict=True):
        assert far(one, other) <= 2


# What diffusers' own pipelines draw from the same parts -----------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_text_to_image_is_that_of_diffusers(pipeline, scheduler: str):
    theirs = StableDiffusionXLPipeline(**pipeline.components, add_watermarker=False)
    theirs.scheduler = make_scheduler(scheduler, pipeline)
    theirs.set_progress_bar_config(disable=True)
    common = {"prompt": request().prompt, "width": 64, "height": 64, "output_type": "np"}
    drawn = theirs(
        **common,
        **({"eta": 0.3} if scheduler == "TCD" else {}),  # TCD's own default; that of the pipeline is DDIM's
        num_inference_steps=5,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(7)],
    ).images[0]
    assert far(draw(pipeline, request(scheduler=scheduler))[0], levels(drawn)) <= 1


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5])
@pytest.mark.parametrize(
    ("scheduler", "spacing", "made"),
    [
        ("K_EULER", "trailing", EulerDiscreteScheduler),
        ("UniPC", "linspace", UniPCMultistepScheduler),
        ("LCM", "base", LCMScheduler),
    ],
)
def test_few_steps_are_those_of_diffusers(pipeline, scheduler: str, spacing: str, made: Any, guidance: float):
    theirs = StableDiffusionXLPipeline(**pipeline.components, add_watermarker=False)
    spread = {} if spacing == "base" else {"timestep_spacing": spacing}
    theirs.scheduler = made.from_config(pipeline.scheduler.config, **spread)
    theirs.set_progress_bar_config(disable=True)
    drawn: Any = theirs(
        prompt=request().prompt,
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(7)],
        output_type="np",
    ).images[0]
    asked = request(
        scheduler=scheduler, timestep_spacing=spacing, num_inference_steps=4, guidance_scale=guidance
    )
    assert far(draw(pipeline, asked)[0], levels(drawn)) <= 1


def test_without_guidance_the_negative_prompt_is_not_drawn(pipeline):
    rows = []

    def counting(unet):
        return lambda latents, *given, **more: rows.append(len(latents)) or unet(latents, *given, **more)

    for guidance in (0.0, 1.0, 1.1):
        draw(pipeline, request(guidance_scale=guidance, num_inference_steps=1), runner=counting)
    assert rows == [1, 1, 2]


@pytest.mark.parametrize("scheduler", ["DDIM", "PNDM", "UniPC"])
def test_spacing_reaches_the_sampler(pipeline, scheduler: str):
    drawn = [
        draw(pipeline, request(scheduler=scheduler, timestep_spacing=spacing))[0] for spacing in SPACINGS
    ]
    assert np.array_equal(drawn[0], drawn[1]), "the miniature was saved with leading, as SDXL is"
    assert far(drawn[1], drawn[2]) > 2 and far(drawn[1], drawn[3]) > 2


def levels(drawn: Any) -> np.ndarray:
    """0..1 → 0..255, as pixels are rounded."""
    return np.round(drawn * 255)


def latents_of(pipeline, picture: Image.Image) -> torch.Tensor:
    """Scaled latents, without the posterior's noise that diffusers draws."""
    pixels = pipeline.image_processor.preprocess(picture)
    with torch.no_grad():
        return pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor


def by_diffusers(kind, pipeline, picture, scheduler: str, **asked: Any) -> np.ndarray:
    """What diffusers' pipeline of a `kind` draws over `picture`."""
    theirs = kind(**pipeline.components, add_watermarker=False)
    theirs.scheduler = make_scheduler(scheduler, pipeline)
    theirs.set_progress_bar_config(disable=True)
    return theirs(
        prompt=request().prompt,
        image=latents_of(pipeline, picture),
        strength=0.7,
        num_inference_steps=5,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(7)],
        output_type="np",
        **asked,
    ).images[0]


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "PNDM"])
def test_image_to_image_is_that_of_diffusers(pipeline, picture, scheduler: str):
    """But for PNDM, whose schedule diffusers cuts so that its two first calls are of different intervals."""
    eta = {"eta": 0.3} if scheduler == "TCD" else {}
    drawn = by_diffusers(StableDiffusionXLImg2ImgPipeline, pipeline, picture, scheduler, **eta)
    ours = draw(pipeline, request(scheduler=scheduler, image=picture, prompt_strength=0.7))[0]
    assert far(ours, levels(drawn)) <= 1


@pytest.mark.parametrize("scheduler", ["DDIM", "K_EULER", "DPMSolverMultistep"])
def test_the_two_experts_are_those_of_diffusers(pipeline, refiner, scheduler: str):
    base = StableDiffusionXLPipeline(**pipeline.components, add_watermarker=False)
    theirs = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        REFINER, variant="fp16", dtype=torch.float32, add_watermarker=False
    )
    generator = [torch.Generator().manual_seed(7)]
    common = {
        "prompt": request().prompt,
        "num_inference_steps": 10,
        "guidance_scale": 4.0,
        "generator": generator,
    }
    for one in (base, theirs):
        one.scheduler = make_scheduler(scheduler, pipeline)
        one.set_progress_bar_config(disable=True)
    half = base(**common, width=64, height=64, denoising_end=0.6, output_type="latent").images
    drawn = theirs(**common, image=half, denoising_start=0.6, output_type="np").images[0]
    asked = request(
        scheduler=scheduler, refine="expert_ensemble_refiner", high_noise_frac=0.6, num_inference_steps=10
    )
    assert far(draw(pipeline, asked, refiner)[0], levels(drawn)) <= 1


def test_inpainting_repaints_as_diffusers_does(pipeline, picture):
    """With a mask on the latents' grid, within the white, where no feather shows the original."""
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((32, 16, 63, 39), fill=255)
    drawn = by_diffusers(
        StableDiffusionXLInpaintPipeline, pipeline, picture, "K_EULER", mask_image=mask, width=64, height=64
    )
    ours = draw(pipeline, request(image=picture, mask=mask, prompt_strength=0.7))[0]
    white = np.array(mask) > 0
    assert far(ours[white], levels(drawn)[white]) <= 1


# Strength, refiner, sizes -----------------------------------------------------------------------------------------------


def test_strength_decides_how_much_of_the_picture_stays(pipeline, picture):
    def distance(strength: float) -> float:
        drawn = draw(pipeline, request(image=picture, prompt_strength=strength, num_inference_steps=10))[0]
        return float(np.abs(drawn.astype(int) - np.array(picture)).mean())

    distances = [distance(strength) for strength in (0.0, 0.3, 1.0)]
    assert distances == sorted(distances)
    assert distances[0] < 12, "nothing is drawn, only the autoencoder passed"
    anew = draw(pipeline, request(image=picture, prompt_strength=1.0))[0]
    assert np.array_equal(anew, draw(pipeline, request())[0]), "nothing of the picture stays"


def test_the_refiner_changes_what_it_is_given_and_only_that(pipeline, refiner):
    plain = draw(pipeline, request())[0]
    for refine, nothing, much in (
        ("expert_ensemble_refiner", {"high_noise_frac": 1.0}, {"high_noise_frac": 0.4}),
        ("base_image_refiner", None, {"refine_steps": 10}),
    ):
        if nothing is not None:
            assert np.array_equal(draw(pipeline, request(refine=refine, **nothing), refiner)[0], plain)
        assert far(draw(pipeline, request(refine=refine, **much), refiner)[0], plain) > 8


def test_a_refiner_of_another_base_is_refused(pipeline):
    with pytest.raises(WeightsError, match="set SDXL_REFINER"):
        draw(pipeline, request(refine="base_image_refiner"), pipeline.unet)
    with pytest.raises(WeightsError, match="is not a complete UNet"):
        load_refiner(REPOSITORY / "docs", pipeline)


def test_sides_that_are_no_multiples_of_eight_come_back_as_they_were(pipeline):
    odd = Image.effect_noise((75, 93), 60).convert("RGB")
    mask = Image.new("L", (75, 93), 0)
    mask.paste(255, (60, 80, 75, 93))
    canvas = lay_out(LayoutOptions(image=odd, mask=mask), native=256)
    drawn = draw(pipeline, request(**vars(canvas)))[0]
    assert drawn.shape == (93, 75, 3)
    assert canvas.mask is not None
    kept = np.array(feather(canvas.mask)) == 0
    assert np.array_equal(drawn[kept], np.array(odd)[kept])


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({}, (256, 256)),
        ({"width": 128}, (128, 256)),
        ({"aspect_ratio": "16:9"}, (336, 192)),
        ({"image": (100, 70)}, (100, 70)),
        ({"image": (1000, 500)}, (360, 184)),
        ({"image": (1000, 500), "width": 64, "height": 128}, (64, 128)),
        ({"image": (100, 70), "aspect_ratio": "1:1"}, (256, 256)),
    ],
)
def test_sizes(given: dict[str, Any], size: tuple[int, int]):
    if "image" in given:
        given = {**given, "image": Image.new("RGB", given["image"])}
    canvas = lay_out(LayoutOptions(**given), native=256)
    assert (canvas.width, canvas.height) == size
    assert canvas.image is None or canvas.image.size == size
    assert (canvas.image is not None) == ("image" in given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": (64, 64)}, "without image"),
        ({"aspect_ratio": "1:1", "width": 64}, "give one or the other"),
        ({"aspect_ratio": "2:1"}, "must be one of custom, 1:1"),
        ({"image": (1000, 20)}, "sides must be"),
        ({"image": (64, 64), "width": 64}, "Only one of width and height is given"),
        ({"image": (64, 64), "mask": (64, 64)}, "completely black"),
    ],
)
def test_sizes_that_cannot_be(given: dict[str, Any], message: str):
    pictures = {key: Image.new("RGB", given[key]) for key in ("image", "mask") if key in given}
    with pytest.raises(UserInputError, match=message):
        lay_out(LayoutOptions(**{**given, **pictures}), native=256)


def test_a_hole_that_is_cut_off_is_named_too():
    hole = Image.new("L", (64, 256), 0)
    hole.paste(255, (0, 0, 64, 16))
    given = LayoutOptions(image=Image.new("RGB", (64, 256)), mask=hole, width=64, height=64)
    with pytest.raises(
        UserInputError, match=r"^Nothing to repaint .* of mask or the transparent area of image larger"
    ):
        lay_out(given, native=64)


def test_weights_that_overflow_are_told_not_drawn_black(pipeline):
    bias = pipeline.unet.conv_out.bias
    before = bias.detach().clone()
    try:
        with torch.no_grad():
            bias.fill_(float("nan"))
        with pytest.raises(WeightsError, match="overflowing"):
            draw(pipeline, request())
    finally:
        with torch.no_grad():
            bias.copy_(before)


def test_files_tell_the_request(tmp_path: Path, picture: Image.Image):
    from sdxl.serving.picture_files import describe, read_parameters, save

    text = describe(
        request(negative_prompt="schlecht, häßlich", scheduler="KarrasDPM", image=picture), 2, model="tiny"
    )
    assert text == (
        "a red fish on a blue background\nNegative prompt: schlecht, häßlich\n"
        "Steps: 5, Sampler: DPM++ 2M Karras, CFG scale: 4, Seed: 9, Size: 64x64, Model: tiny, Denoising strength: 0.8"
    )
    for suffix in ("png", "webp", "jpg"):
        save(picture, tmp_path / f"told.{suffix}", quality=90, parameters=text)
        assert read_parameters(tmp_path / f"told.{suffix}") == text
        save(picture, tmp_path / f"silent.{suffix}", quality=90, parameters=None)
        assert read_parameters(tmp_path / f"silent.{suffix}") is None
