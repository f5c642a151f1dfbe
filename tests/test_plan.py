"""The plan of passes: which UNet denoises which intervals, without a model."""

from typing import Any

import pytest
from PIL import Image

from sdxl.serving.plan import Pass, plan_passes
from sdxl.serving.request import GenerationRequest

PICTURE = Image.new("RGB", (64, 64))


def plan(base_intervals: int = 0, **given: Any) -> list[Pass]:
    request = GenerationRequest(
        prompt="a fish", seed=0, **{"width": 64, "height": 64, "num_inference_steps": 10, **given}
    )
    return plan_passes(request, base_intervals)


def base(first: int, stop: int) -> Pass:
    return Pass(model="base", steps=10, first=first, stop=stop, adds_noise=True)


@pytest.mark.parametrize(
    ("given", "first"),
    [
        ({}, 0),
        ({"prompt_strength": 0.3}, 0),
        ({"image": PICTURE}, 2),
        ({"image": PICTURE, "prompt_strength": 0.35}, 7),
        ({"image": PICTURE, "prompt_strength": 0.01}, 9),
        ({"image": PICTURE, "prompt_strength": 0.0}, 10),
        ({"image": PICTURE, "prompt_strength": 1.0}, 0),
    ],
)
def test_the_base_runs_the_last_intervals_by_prompt_strength(given: dict[str, Any], first: int):
    assert plan(**given) == [base(first, 10)]


@pytest.mark.parametrize(
    ("base_intervals", "given", "first", "switch"),
    [
        (8, {}, 0, 8),
        (0, {}, 0, 0),
        (12, {}, 0, 10),
        (8, {"image": PICTURE, "prompt_strength": 0.5}, 5, 8),
        (3, {"image": PICTURE, "prompt_strength": 0.5}, 5, 5),
    ],
)
def test_the_expert_continues_where_the_base_stops(
    base_intervals: int, given: dict[str, Any], first: int, switch: int
):
    assert plan(base_intervals, refine="expert_ensemble_refiner", **given) == [
        base(first, switch),
        Pass(model="refiner", steps=10, first=switch, stop=10, adds_noise=False),
    ]


@pytest.mark.parametrize(
    ("given", "steps", "first"), [({}, 10, 7), ({"refine_steps": 40}, 40, 28), ({"refine_steps": 1}, 1, 0)]
)
def test_the_refiner_redraws_the_finished_picture(given: dict[str, Any], steps: int, first: int):
    assert plan(refine="base_image_refiner", **given) == [
        base(0, 10),
        Pass(model="refiner", steps=steps, first=first, stop=steps, adds_noise=True),
    ]


def test_only_full_strength_ignores_the_picture():
    def starts(**given: Any) -> bool:
        return GenerationRequest(prompt="", seed=0, width=64, height=64, **given).starts_from_image

    assert not starts()
    assert starts(image=PICTURE) and starts(image=PICTURE, prompt_strength=0.0)
    assert not starts(image=PICTURE, prompt_strength=1.0)
