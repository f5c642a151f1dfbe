"""The inputs of train.py: their defaults have one home, and wrong ones are answered before torch is imported."""

import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import train
from preprocess import PreprocessConfig
from sdxl.errors import UserInputError
from sdxl.settings import resolve_seed
from sdxl.training.config import TrainingConfig, TrainingOptions, choices
from sdxl.training.contradictions import _WHOLE_FP32, without_effect, without_effect_here
from sdxl.training.inputs import TrainInputs, train_inputs
from sdxl.training.memory_plan import _PLANS
from sdxl.training.optimizers import OPTIMIZERS
from sdxl.training.trainable import LORA_TARGETS
from tests.conftest import REPOSITORY, png, write_zip

HEAVY = {"torch", "diffusers", "transformers", "pandas"}
"""Packages that take long to import."""
DECLARED: dict[str, Any] = {
    name: parameter.default for name, parameter in inspect.signature(train.train).parameters.items()
}
DEPRECATED = {"input_data_tar_or_zip", "ti_learning_rate_multiplier", "token_string", "temp"}
OPTIONS = {entry.name: entry for entry in dataclasses.fields(TrainingOptions)}
PREPROCESS = {entry.name: entry for entry in dataclasses.fields(PreprocessConfig)}
RENAMED = {"clipseg_temperature": "mask_temperature"}
"""Input → the field of `PreprocessConfig` that it becomes, if their names differ."""


def defaults(**inputs: Any) -> dict[str, Any]:
    """All arguments of `train`: its own defaults, changed by `inputs`."""
    return {name: declared.default for name, declared in DECLARED.items()} | inputs


def test_every_input_is_a_field_of_the_typed_inputs():
    fields = {entry.name for entry in dataclasses.fields(TrainInputs)} - {"options"}
    assert fields | OPTIONS.keys() == DECLARED.keys() - DEPRECATED - {"config"}
    assert not fields & OPTIONS.keys()
    assert {name for name, declared in DECLARED.items() if declared.deprecated} == DEPRECATED


def test_defaults_are_those_of_the_configs():
    own = {entry.name for entry in dataclasses.fields(TrainInputs)}
    for name, declared in DECLARED.items():
        if name in OPTIONS:
            home = OPTIONS[name].default
        elif RENAMED.get(name, name) in PREPROCESS:
            home = PREPROCESS[RENAMED.get(name, name)].default
        else:
            assert name in own | DEPRECATED | {"config"}
            home = None  # the base, the pictures or chance decides
        assert (type(declared.default), declared.default) == (type(home), home), name


def test_choices_are_those_of_the_config():
    for name, declared in DECLARED.items():
        home = choices(TrainingOptions, name) if name in OPTIONS else None
        assert (tuple(declared.choices) if declared.choices else None) == home, name


def test_choices_are_those_that_are_implemented():
    assert choices(TrainingOptions, "optimizer") == tuple(OPTIMIZERS) == tuple(_PLANS)
    assert choices(TrainingOptions, "lora_targets") == tuple(LORA_TARGETS)


def ranges() -> Iterator[tuple[str, dict[str, float | None]]]:
    """Every input that is a field → the limits of that field."""
    for kind in (TrainInputs, TrainingConfig):
        for entry in dataclasses.fields(kind):
            if entry.name in DECLARED and entry.metadata:
                yield entry.name, dict(entry.metadata)


def test_ranges_are_those_of_the_configs():
    homes = dict(ranges())
    # The signature leaves these limits to the configs, as it does every `gt`, which Cog does not have.
    del homes["resolution"]
    homes["seed"]["le"] = homes["lora_lr"]["ge"] = None
    for name, declared in DECLARED.items():
        limits = homes.get(name, {})
        assert (declared.ge, declared.le) == (limits.get("ge"), limits.get("le")), name


@pytest.mark.parametrize(("name", "limits"), list(ranges()))
def test_values_outside_a_range_are_refused(name: str, limits: dict[str, float | None]):
    for limit, beyond in (("ge", -1), ("gt", 0), ("le", 1)):
        edge = limits[limit]
        if edge is None:
            continue
        with pytest.raises(UserInputError, match=f"^{name} is |A picture size of"):
            train_inputs(defaults(input_images="x.zip", **{name: edge + beyond}))


def test_inputs_become_both_configs():
    inputs = train_inputs(
        defaults(input_images="x.zip", resolution=512, num_train_epochs=3, bucketing=True, temp=0.5, seed=7)
    )
    config = inputs.training_config(resolution=512, images=10, processes=2)
    assert (config.max_train_steps, config.seed, config.resolution) == (
        5,
        7,
        512,
    )  # 3 · 10 / ((4 - 1) · 2), since the base teaches one of 4
    assert inputs.training_config(resolution=512, images=10, seed=8).seed == 8
    preprocess = inputs.preprocess_config(512)
    assert (preprocess.target_size, preprocess.bucketing, preprocess.mask_temperature) == (512, True, 0.5)
    assert preprocess.token_map == inputs.token_map


FULL = {"is_lora": False}
FULL_NEEDS = "with is_lora=false the whole UNet is trained: leave out is_lora or "


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({**FULL, "use_dora": True}, f"^use_dora is True, but {FULL_NEEDS}use_dora.$"),
        ({**FULL, "lora_rank": 8}, f"^lora_rank is 8, but {FULL_NEEDS}"),
        ({**FULL, "lora_alpha": 8}, f"^lora_alpha is 8, but {FULL_NEEDS}"),
        ({**FULL, "lora_targets": "all"}, f"^lora_targets is all, but {FULL_NEEDS}"),
        ({**FULL, "lora_lr": 1e-4}, f"^lora_lr is 0.0001, but {FULL_NEEDS}"),
        ({"max_train_steps": 9, "num_train_epochs": 9}, "both given: give one of them"),
        ({"prior_images": 9}, "^prior_images is 9, but without prior_prompts"),
        ({"prior_weight": 0.5}, "^prior_weight is 0.5, but without prior_prompts"),
        ({"prior_prompts": "a dog|my TOK"}, '^prior_prompts contains "my TOK", but the base'),
        ({"lora_lr": 0.0, "pivot_fraction": 0.0}, "nothing would be trained"),
        (
            {**FULL, "precision": "bf16", "optimizer": "prodigy"},
            "^optimizer prodigy would lose small updates",
        ),
        ({**FULL, "precision": "bf16", "optimizer": "adafactor"}, "^optimizer adafactor would lose"),
        ({**FULL, "precision": "int8"}, "^precision=int8 is for a LoRA"),
        ({"use_dora": True, "precision": "int8"}, "^use_dora needs the base's weights"),
        ({**FULL, "shard": True, "optimizer": "adafactor"}, "^optimizer adafactor needs whole weights"),
        ({"temp": 0.5, "clipseg_temperature": 2.0}, "^temp is the old name"),
        ({"ti_learning_rate_multiplier": 9.0, "ti_lr": 1e-2}, "^ti_learning_rate_multiplier is the old form"),
    ],
)
def test_contradictions_are_refused(inputs: dict[str, Any], message: str):
    with pytest.raises(UserInputError, match=message):
        train_inputs(defaults(input_images="x.zip", **inputs))


@pytest.mark.parametrize(
    "inputs",
    [
        {"use_dora": True, "lora_rank": 8, "lora_alpha": 8, "lora_targets": "all", "lora_lr": 1e-3},
        {"prior_prompts": "a dog", "prior_images": 9, "prior_weight": 0.5},
        {"lora_lr": 0.0, "pivot_fraction": 1.0},
        {**FULL, "precision": "bf16", "optimizer": "adamw_8bit"},
        {"precision": "int8"},
        {**FULL, "shard": True},
        {**FULL, "shard": False, "optimizer": "prodigy"},
        {"optimizer": "prodigy"},
        {"temp": 0.5, "mask_target_prompts": "a dog"},
        {"temp": 0.5, "clipseg_temperature": 0.5, "use_face_detection_instead": True},
        {"ti_learning_rate_multiplier": 100.0, "unet_learning_rate": 6e-6},
        {**FULL, "ti_learning_rate_multiplier": 100.0, "unet_learning_rate": 6e-6},
        {"ti_learning_rate_multiplier": 100.0, "preset": "quick"},
    ],
)
def test_settings_that_go_together_are_neither_refused_nor_told(inputs: dict[str, Any]):
    accepted = train_inputs(defaults(input_images="x.zip", **inputs))
    assert list(without_effect(accepted.options)) == []
    assert list(accepted.preprocess_config(1024).without_effect()) == []
    if "ti_learning_rate_multiplier" in inputs:
        assert accepted.options.ti_lr == pytest.approx(6e-4)


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        (
            {"unet_learning_rate": 1e-5},
            "unet_learning_rate has no effect on a LoRA, whose rate is lora_lr: set is_lora=false to train the whole UNet.",
        ),
        (
            {"precision": "fp32"},
            "precision=fp32 has no effect on a LoRA: it is for full training, is_lora=false.",
        ),
        ({"shard": True}, "shard has no effect on a LoRA: it is for full training, is_lora=false."),
        (
            {"lora_lr": 0.0},
            "lora_lr is 0, so nothing is trained after the pivot: set pivot_fraction to 1.",
        ),
        (
            {"pivot_fraction": 0.0, "ti_lr": 1e-2},
            "ti_lr has no effect, because pivot_fraction is 0: the token rows stay as they start.",
        ),
        (
            {"prior_prompts": "a dog", "prior_weight": 0.0},
            "prior_prompts has no effect, because prior_weight is 0.",
        ),
        (
            {**FULL, "optimizer": "prodigy", "unet_learning_rate": 1e-6},
            "prodigy finds its own rate and multiplies it by unet_learning_rate, 1e-06: leave unet_learning_rate out.",
        ),
        (
            {"temp": 0.5},
            "The temperature of masks, 0.5, has no effect without mask_target_prompts or use_face_detection_instead.",
        ),
        (
            {"use_face_detection_instead": True, "mask_target_prompts": "a dog"},
            "mask_target_prompts has no effect with use_face_detection_instead.",
        ),
    ],
)
def test_settings_without_effect_are_told(inputs: dict[str, Any], told: str):
    accepted = train_inputs(defaults(input_images="x.zip", **inputs))
    sentences = [*without_effect(accepted.options), *accepted.preprocess_config(1024).without_effect()]
    assert sentences == [told]


def test_settings_without_effect_on_these_pictures_are_told():
    given = {
        "mask_floor": 0.5,
        "mask_base_target": False,
        "checkpointing_steps": 9,
        "gradient_checkpointing": True,
    }
    inputs = train_inputs(defaults(input_images="x.zip", max_train_steps=8, **given))
    config = inputs.training_config(resolution=64, images=4)
    assert list(without_effect_here(config, masks=False, cuda=False)) == [
        "mask_floor has no effect, because no picture has a mask.",
        "mask_base_target has no effect, because no picture has a mask.",
        "checkpointing_steps has no effect, because the run has only 8 steps.",
        "gradient_checkpointing has no effect on a CPU.",
    ]
    config = dataclasses.replace(config, checkpointing_steps=8)
    assert list(without_effect_here(config, masks=True, cuda=True)) == []


def test_optimizers_without_bf16_are_those_without_a_plan_for_it():
    assert {name for name, plans in _PLANS.items() if all(plan.weights.itemsize == 4 for plan in plans)} == {
        *_WHOLE_FP32
    }


def test_without_a_seed_each_run_gets_its_own():
    one, other = (resolve_seed(train_inputs(defaults(input_images="x.zip")).seed) for _ in range(2))
    assert one != other


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def imported(stderr: str) -> set[str]:
    """The packages that `python -X importtime` reports."""
    lines = [line for line in stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 100
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--help"], 0, "token_map (str; default 'TOK:2')"),
        (["-i", "token_mpa=TOK:2"], 2, "did you mean token_map?"),
        (["-i", "lora_rank=many"], 2, "lora_rank is 'many'"),
        (["-i", "input_images=@/nowhere.zip"], 2, "does not exist"),
        ([], 1, "input_images is missing"),
        (["-i", "input_images=@README.md"], 1, "README.md is a text file: give a .zip"),
        (["-i", "input_data_tar_or_zip=@README.md"], 1, "README.md is a text file: give a .zip"),
        (["-i", "init_from=out/trained_model.tar"], 1, "init_from is out/trained_model.tar, which does not"),
        (["-i", "input_images=http://x/y.zip", "-i", "token_map=TOK"], 1, "token_map 'TOK' is wrong"),
        (["-i", "input_images=http://x/y.zip", "-i", "token_init=CAT:dog"], 1, "token_init 'CAT:dog'"),
        (["-i", "input_images=http://x/y.zip", "-i", "resolution=100"], 1, "multiple of 8"),
        (["-i", "input_images=http://x/y.zip", "-i", "caption_prefix=a <s0>"], 1, "<s0>"),
        (
            ["-i", "input_images=http://x/y.zip", "-i", "prior_prompts=|"],
            1,
            "prior_prompts contains no prompt",
        ),
        (
            ["-i", "input_images=http://x/y.zip", "-i", "max_train_steps=5", "-i", "lr_warmup_steps=5"],
            1,
            "lr_warmup_steps is 5, but must be below the 5 steps",
        ),
        (
            ["-i", "input_images=http://x/y.zip", "-i", "input_data_tar_or_zip=http://x/y.zip"],
            1,
            "old name of input_images",
        ),
    ],
)
def test_answers_come_before_heavy_imports(arguments: list[str], code: int, message: str, tmp_path: Path):
    done = python("-X", "importtime", "train.py", *arguments, "-o", str(tmp_path / "out"))
    assert done.returncode == code, done.stderr[-2000:]
    assert message in done.stdout + done.stderr
    assert not HEAVY & imported(done.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("entry_point", "name"), [("train.py", "input_images"), ("preprocess.py", "files")])
@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"notes.md": b"none"}, "x.zip holds no pictures"),
        ({"1.png": png(1), "captions.csv": b"image_file,caption\n2.png,TOK\n"}, "names 2.png, but"),
    ],
)
def test_wrong_pictures_are_told_before_heavy_imports_and_before_the_base(
    entry_point: str, name: str, members: dict[str, bytes], told: str, tmp_path: Path
):
    archive = write_zip(tmp_path / "x.zip", members)
    done = python("-X", "importtime", entry_point, "-i", f"{name}=@{archive}", "-o", str(tmp_path / "out"))
    assert done.returncode == 1
    assert told in done.stderr
    assert not HEAVY & imported(done.stderr)


def test_a_caption_without_a_token_is_told_before_heavy_imports(tmp_path: Path):
    archive = write_zip(tmp_path / "x.zip", {"1.png": png(1), "1.txt": b"a photo of a dog"})
    done = python("-X", "importtime", "train.py", "-i", f"input_images=@{archive}", "-o", str(tmp_path))
    assert "names no token of token_map" in done.stderr
    assert not HEAVY & imported(done.stderr)


def test_the_entry_point_imports_nothing_heavy():
    done = python("-c", f"import train, sys; print(*({HEAVY!r} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
