"""`speed=fast`: shallow calls of a UNet, and which calls are shallow or without guidance."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from dataset_and_utils import TokenMap
from sdxl.serving.denoising import course
from sdxl.serving.generation import generate
from sdxl.serving.pipeline import load_pipeline, load_refiner
from sdxl.serving.request import GenerationRequest
from sdxl.serving.samplers import SCHEDULERS, make_scheduler
from sdxl.serving.shallow_unet import ReusingUNet
from sdxl.serving.shortcuts import FEWEST_STEPS, GUIDED_ABOVE, OLDEST, WHOLE_ABOVE, Call, fast_calls
from sdxl.serving.unet_runner import Runners, UNetRunner
from tests.conftest import REPOSITORY, TINY_BASE
from tests.test_unet_runner import inputs
from tests.tiny_helpers import narrow_unet

REFINER = REPOSITORY / "base_models" / "tiny-sdxl-refiner"
PICTURE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
MASK = Image.fromarray(255 * (np.indices((64, 64))[0] > 30).astype(np.uint8))


@pytest.fixture(scope="module")
def pipeline():
    made = load_pipeline(TINY_BASE, torch.device("cpu"))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def refiner(pipeline):
    return load_refiner(REFINER, pipeline)


def request(**given: Any) -> GenerationRequest:
    common = {"prompt": "a red fish on a blue background", "width": 64, "height": 64, "seed": 7}
    return GenerationRequest(**{**common, "num_inference_steps": 23, "guidance_scale": 4.0, **given})


def draw(pipeline, asked: GenerationRequest, refiner=None, **options: Any) -> list[np.ndarray]:
    return [np.array(one, float) for one in generate(pipeline, asked, TokenMap({}), refiner, **options)]


class Counting:
    """A runner that notes what the calls of its UNet do."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __call__(self, unet: UNet2DConditionModel) -> Any:
        called = ReusingUNet(unet)

        def noting(sample: torch.Tensor, *positional: Any, **given: Any) -> Any:
            self.calls.append((given.get("features", "none"), len(sample)))
            return called(sample, *positional, **given)

        return noting


@torch.no_grad()
@pytest.mark.parametrize("side", [8, 13])
def test_a_shallow_call_with_the_features_of_the_same_call_is_that_call(pipeline, side: int):
    for unet in (pipeline.unet, narrow_unet()):
        called, given, when = ReusingUNet(unet), inputs(unet, 2, side), torch.tensor(500)
        exact = unet(timestep=when, **given, return_dict=False)[0]
        assert torch.equal(called(timestep=when, **given, features="keep")[0], exact)
        assert torch.equal(called(timestep=when, **given, features="reuse")[0], exact)
        assert not unet.up_blocks[-1]._forward_pre_hooks


@torch.no_grad()
def test_a_shallow_call_sees_its_own_latents_and_time(pipeline):
    unet = pipeline.unet
    called, given, when = ReusingUNet(unet), inputs(unet, 1, 16), torch.tensor(500)
    called(timestep=when, **given, features="keep")
    near = {**given, "sample": given["sample"] + 0.05 * torch.randn_like(given["sample"])}
    exact = unet(timestep=when - 20, **near, return_dict=False)[0]
    shallow = called(timestep=when - 20, **near, features="reuse")[0]
    before = unet(timestep=when, **given, return_dict=False)[0]
    assert (shallow - exact).norm() < 0.5 * (before - exact).norm()


@torch.no_grad()
def test_a_runner_keeps_the_features_of_each_shape(pipeline):
    unet = pipeline.unet
    runner, shapes = UNetRunner(unet, "graphs"), [inputs(unet, rows, 8) for rows in (1, 2)]
    plain = [ReusingUNet(unet) for _ in shapes]
    for time, features in ((500, "keep"), (480, "reuse"), (460, "keep"), (440, "reuse"), (420, "none")):
        for given, expected in zip(shapes, plain, strict=True):
            call = {"timestep": torch.tensor(time), **given, "features": features}
            assert torch.equal(runner(**call)[0], expected(**call)[0])


def kinds(calls: list[Call]) -> str:
    """A letter for each call: w for whole, s for shallow; a capital with guidance."""
    letters = ["s" if one.features == "reuse" else "w" for one in calls]
    return "".join(
        letter.upper() if one.guided else letter for letter, one in zip(letters, calls, strict=True)
    )


def test_the_first_calls_do_everything_and_the_last_have_no_guidance():
    assert kinds(fast_calls([980 - 40 * i for i in range(25)])) == "WWWWWSWSWSWSWSWwswswswsws"
    assert kinds(fast_calls([490 - 20 * i for i in range(25)])) == "WWWWWSSWSSWSSWSwsswsswssw"
    assert kinds(fast_calls([990 - 60 * i for i in range(16)])) == "WWWWWWWWWWwwwwww"
    assert kinds(fast_calls([999, 749, 749, 499, 499, 249, 249, 0])) == "WWSWSwsw"  # Heun
    assert kinds(fast_calls([0])) == "W"
    assert kinds(fast_calls([])) == ""


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 4, FEWEST_STEPS, 50])
@pytest.mark.parametrize("start", [0, 0.5])
def test_no_limit_is_passed_whatever_the_sampler(pipeline, name: str, steps: int, start: float):
    scheduler: Any = make_scheduler(name, pipeline)
    scheduler.set_timesteps(steps)
    times = course(scheduler, int(start * steps), steps).timesteps.tolist()
    calls = fast_calls(times)
    assert len(calls) == len(times)
    kept = 0
    for index, (time, call) in enumerate(zip(times, calls, strict=True)):
        assert call.guided == (time >= GUIDED_ABOVE * times[0])
        if call.features == "reuse":
            assert calls[kept].features == "keep" and calls[kept].guided == call.guided
            assert 0 <= times[kept] - time <= OLDEST and time <= WHOLE_ABOVE * times[0]
        else:
            kept = index
    used = {call.features for call in calls}
    assert ("keep" in used) == ("reuse" in used)
    if steps >= FEWEST_STEPS:
        assert "reuse" in used


def test_runners_draw_the_same_fast_pictures(narrow_base: Path):
    pipeline = load_pipeline(narrow_base, torch.device("cpu"))
    pipeline.set_progress_bar_config(disable=True)
    asked = request(speed="fast", num_outputs=3)
    plain = draw(pipeline, asked, at_once=2)
    graphs, eager = Runners("graphs", torch.device("cpu")), Runners("eager", torch.device("cpu"))
    for runners in (graphs, graphs, eager):  # the second time there are features of the first
        assert np.array_equal(plain, draw(pipeline, asked, at_once=2, runner=runners))
    for one, alone in zip(plain, draw(pipeline, asked, at_once=1), strict=True):
        assert np.abs(one - alone).max() <= 2


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"scheduler": "HeunDiscrete"},
        {"scheduler": "DPMSolverMultistep"},
        {"scheduler": "PNDM", "guidance_scale": 1.0},
        {"image": PICTURE, "prompt_strength": 0.5},
        {"image": PICTURE, "mask": MASK},
        {"refine": "expert_ensemble_refiner"},
        {"refine": "base_image_refiner", "guidance_rescale": 0.5, "negative_prompt": "a house"},
    ],
    ids=["plain", "heun", "multistep", "pndm", "image", "inpainting", "ensemble", "base_image"],
)
def test_fast_pictures_are_near_the_exact_ones_in_all_modes(pipeline, refiner, given: dict[str, Any]):
    noted = Counting()
    [drawn] = draw(pipeline, request(**given, speed="fast"), refiner, runner=noted)
    exact = Counting()
    [expected] = draw(pipeline, request(**given), refiner, runner=exact)
    assert {features for features, _ in exact.calls} == {"none"}
    whole = [sum(rows for what, rows in calls if what != "reuse") for calls in (exact.calls, noted.calls)]
    assert len(exact.calls) == len(noted.calls) and whole[1] < 0.75 * whole[0]
    assert 0 < np.abs(drawn - expected).mean() < 12
