"""The signature of predict.py against the options of requests, and wrong inputs that are refused without a model."""

import inspect
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from predict import Predictor
from sdxl.command_line import run_command_line
from sdxl.errors import UserInputError
from sdxl.serving.no_effect import without_effect
from sdxl.serving.request import (
    CHOICES,
    RANGES,
    DeliveryOptions,
    DrawingOptions,
    FineTuneOptions,
    GenerationRequest,
    LayoutOptions,
)
from tests.conftest import REPOSITORY, call

SIGNATURE = {
    name: one.default for name, one in inspect.signature(Predictor.run).parameters.items() if name != "self"
}
FIELDS = {
    field.name: field
    for options in (DrawingOptions, LayoutOptions, FineTuneOptions, DeliveryOptions)
    for field in fields(options)
}


def test_every_input_is_a_field_and_the_reverse():
    assert SIGNATURE.keys() == FIELDS.keys()


def test_the_defaults_are_those_of_the_fields():
    without = {name for name, field in FIELDS.items() if field.default is MISSING}
    assert without == {"prompt", "seed"}, "the entry point has an example prompt, and makes a seed"
    for name in FIELDS.keys() - without:
        declared, ours = SIGNATURE[name].default, FIELDS[name].default
        assert (type(declared), declared) == (type(ours), ours), name
    assert SIGNATURE["seed"].default is None


def test_the_choices_are_those_of_the_tables():
    declared = {name: tuple(one.choices) for name, one in SIGNATURE.items() if one.choices}
    assert declared == CHOICES


def test_the_ranges_are_those_of_the_table():
    declared = {name: (one.ge, one.le) for name, one in SIGNATURE.items() if one.ge is not None}
    assert declared.pop("seed") == (RANGES["seed"][0], None), "the largest seed is checked by the options"
    lists = {"extra_lora_scale", "extra_lora_text_encoder_scale"}
    assert declared == {name: limits for name, limits in RANGES.items() if name not in lists | {"seed"}}


def test_help_and_wrong_inputs_need_no_torch():
    heavy = {"torch", "diffusers", "transformers", "pandas"}
    code = f"import predict, sys; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["mask=@MASK"], "mask is given without image"),
        (
            ["extra_lora=http://x/a.tar", "extra_lora_scale=0.5", "extra_lora_scale=0.5"],
            "extra_lora_scale has 2 numbers",
        ),
        (["extra_lora=http://x/a.tar", "extra_lora_scale=2.5"], "extra_lora_scale is 2.5"),
        (
            ["extra_lora=http://x/a.tar", "extra_lora_text_encoder_scale=3"],
            "extra_lora_text_encoder_scale is 3",
        ),
        (["extra_lora_text_encoder_scale=0"], "extra_lora_text_encoder_scale has 1 numbers for 0 LoRAs"),
        (["replicate_weights=out/trained_model.tar"], "out/trained_model.tar, which does not exist: give"),
        (["extra_lora=style.safetensors"], "extra_lora is style.safetensors, which does not exist: give"),
        (["extra_lora_scale=0.5"], "extra_lora_scale has 1 numbers for 0 LoRAs"),
        (["aspect_ratio=1:1", "width=512"], "give one or the other"),
        (["image=@MASK", "width=512"], "Only one of width and height"),
        (["width=100"], "width is 100"),
        ([f"seed={2**32}"], "seed is 4294967296"),
    ],
)
def test_contradictions_are_refused_before_the_base_is_loaded(
    inputs: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(Predictor, "setup", lambda self: pytest.fail("the base must not be loaded"))
    Image.new("L", (64, 64)).save(tmp_path / "mask.png")
    given = [f"-i{one.replace('MASK', str(tmp_path / 'mask.png'))}" for one in inputs]
    code = run_command_line(
        Predictor().run, description="Draw.", argv=[*given, "-o", str(tmp_path / "pictures")]
    )
    assert code == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "pictures").exists()
    assert list((tmp_path / "workspace").iterdir()) == []


def test_what_is_told_of_pictures_is_seen_although_no_base_is_loaded(tmp_path: Path):
    picture = Image.new("RGBA", (64, 64), "red")
    picture.paste((0, 0, 0, 0), (8, 8, 32, 32))
    picture.save(tmp_path / "hole.png")
    given = [f"-iimage={tmp_path}/hole.png", "-iwidth=100"]
    done = subprocess.run(
        [sys.executable, "predict.py", *given], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    told, error = done.stderr.splitlines()
    assert told.startswith("image has transparent areas") and error.startswith("Error: Only one of width")


def test_every_picture_has_a_seed_that_the_input_takes():
    largest = RANGES["seed"][1]
    options = DrawingOptions(prompt="a fish", seed=largest - 1, num_outputs=4)
    assert [options.seed_of(i) for i in range(4)] == [largest - 1, largest, 0, 1]
    assert DrawingOptions(prompt="a fish", seed=7).seed_of(3) == 10


@pytest.mark.parametrize(
    ("loras", "scales", "meant"),
    [
        (None, None, []),
        (["a", "b"], None, [("a", 1.0), ("b", 1.0)]),
        (["a", "b"], [0.5, 0.25], [("a", 0.5), ("b", 0.25)]),
        ([""], None, []),
        ([""], [], []),
        ([" ", "b"], [0.25], [("b", 0.25)]),
        (["", "b"], [0.5, 0.25], [("b", 0.25)]),
        (["", "b"], [0.25], [("b", 0.25)]),
        (["", "b"], None, [("b", 1.0)]),
    ],
)
def test_empty_loras_are_none(loras: Any, scales: Any, meant: list):
    assert FineTuneOptions(extra_lora=loras, extra_lora_scale=scales).extra == [(*one, None) for one in meant]
    both = FineTuneOptions(
        extra_lora=loras, extra_lora_scale=scales, extra_lora_text_encoder_scale=scales
    ).extra
    assert both == [(lora, scale, scale if scales else None) for lora, scale in meant]


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        (DrawingOptions, {"num_outputs": 5}, "num_outputs is 5, but must be from 1 to 4"),
        (
            DrawingOptions,
            {"scheduler": "LCM", "num_inference_steps": 51},
            "num_inference_steps is 51, but LCM",
        ),
        (
            DrawingOptions,
            {"scheduler": "TCD", "refine_steps": 60},
            "refine_steps is 60, but TCD takes at most",
        ),
        (DrawingOptions, {"guidance_scale": float("nan")}, "guidance_scale is nan"),
        (DrawingOptions, {"scheduler": "EULER"}, "scheduler is 'EULER', but must be one of DDIM"),
        (GenerationRequest, {"width": 68, "height": 64}, "width is 68"),
        (GenerationRequest, {"width": 64, "height": 2056}, "height is 2056"),
        (
            GenerationRequest,
            {"width": 64, "height": 64, "mask": Image.new("L", (64, 64))},
            "mask is given without image",
        ),
        (DeliveryOptions, {"output_quality": 0}, "output_quality is 0"),
        (DeliveryOptions, {"output_format": "gif"}, "must be one of png, webp, jpg"),
    ],
)
def test_options_check_themselves(options: Any, given: dict[str, Any], message: str):
    needed = {"prompt": "a fish", "seed": 0} if issubclass(options, DrawingOptions) else {}
    with pytest.raises(UserInputError, match=message):
        options(**needed, **given)


PICTURE = Image.new("RGB", (64, 64))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, None),
        ({"prompt_strength": 0.5}, "prompt_strength has no effect without image."),
        ({"prompt_strength": 0.5, "image": PICTURE}, None),
        (
            {"prompt_strength": 1.0, "image": PICTURE},
            "image gives at most the size, because prompt_strength is 1.",
        ),
        ({"prompt_strength": 1.0, "image": PICTURE, "mask": PICTURE}, None),
        (
            {"mask_blur": 4, "image": PICTURE},
            "mask_blur has no effect without mask or transparent areas of image.",
        ),
        ({"mask_invert": True}, "mask_invert has no effect without mask or transparent areas of image."),
        ({"only_masked": True}, "only_masked has no effect without mask or transparent areas of image."),
        ({"mask_blur": 4, "mask_invert": True, "only_masked": True, "image": PICTURE, "mask": PICTURE}, None),
        (
            {"mask_padding": 64, "image": PICTURE, "mask": PICTURE},
            "mask_padding has no effect without only_masked and a mask.",
        ),
        ({"mask_padding": 64, "only_masked": True, "image": PICTURE, "mask": PICTURE}, None),
        ({"high_noise_frac": 0.5}, "high_noise_frac has no effect without refine=expert_ensemble_refiner."),
        ({"high_noise_frac": 0.5, "refine": "expert_ensemble_refiner"}, None),
        (
            {"high_noise_frac": 1.0, "refine": "expert_ensemble_refiner"},
            "The refiner has nothing to do, because high_noise_frac is 1.",
        ),
        ({"refine_steps": 9}, "refine_steps has no effect without refine=base_image_refiner."),
        (
            {"refine_steps": 9, "refine": "expert_ensemble_refiner"},
            "refine_steps has no effect without refine=base_image_refiner.",
        ),
        ({"refine_steps": 9, "refine": "base_image_refiner"}, None),
        (
            {"guidance_scale": 1.0, "negative_prompt": "fog"},
            "negative_prompt has no effect, because guidance_scale is 1.",
        ),
        (
            {"guidance_scale": 0.0, "negative_prompt": "fog"},
            "negative_prompt has no effect, because guidance_scale is 0.",
        ),
        ({"guidance_scale": 1.5, "negative_prompt": "fog"}, None),
        ({"scheduler": "LCM", "guidance_scale": 2.0}, None),
        (
            {"scheduler": "LCM"},
            "guidance_scale is 7.5, but LCM is for weights that need 0 to 2: more overexposes.",
        ),
        (
            {"scheduler": "TCD", "guidance_scale": 1.0, "timestep_spacing": "trailing"},
            "timestep_spacing has no effect on TCD, which has its own.",
        ),
        ({"timestep_spacing": "trailing"}, None),
        ({"speed": "fast"}, None),
        (
            {"speed": "fast", "num_inference_steps": 8},
            "speed=fast saves little with 8 steps: it is for 23 and more.",
        ),
        ({"num_inference_steps": 8}, None),
        ({"speed": "fast", "num_inference_steps": 8, "scheduler": "HeunDiscrete"}, None),
        ({"output_quality": 50}, "output_quality has no effect on png, which is lossless."),
        ({"output_quality": 50, "output_format": "webp"}, None),
    ],
)
def test_options_without_effect_are_told(given: dict[str, Any], told: str | None):
    def made(kind: Any, **needed: Any) -> Any:
        names = {one.name for one in fields(kind)}
        return kind(**needed, **{name: value for name, value in given.items() if name in names})

    sentences = without_effect(
        made(DrawingOptions, prompt="a fish", seed=0), made(LayoutOptions), made(DeliveryOptions)
    )
    assert list(sentences) == ([] if told is None else [told])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompt": "x" * 20_001}, "prompt has 20,001 characters, but may have at most 20,000: shorten it"),
        ({"negative_prompt": "x" * 10**6}, "negative_prompt has 1,000,000 characters"),
        ({"extra_lora": ["someone/style"] * 17}, "extra_lora has 17 entries, but may have at most 16"),
    ],
)
def test_texts_and_lists_have_limits(inputs: dict[str, Any], message: str):
    with pytest.raises(UserInputError, match=message):
        call(Predictor().run, **inputs)
