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
from sdxl.training.config import TrainingConfig, TrainingOptions, choices
from sdxl.training.inputs import TrainInputs, train_inputs
from sdxl.training.memory_plan import _PLANS
from sdxl.training.optimizers import OPTIMIZERS
from sdxl.training.trainable import LORA_TARGETS
from tests.conftest import REPOSITORY

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
    assert fields | OPTIONS.keys() == DECLARED.keys() - DEPRECATED
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
            assert name in own | DEPRECATED
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
        4,
        7,
        512,
    )  # 3 · 10 / (4 · 2), rounded up
    assert inputs.training_config(resolution=512, images=10, seed=8).seed == 8
    preprocess = inputs.preprocess_config(512)
    assert (preprocess.target_size, preprocess.bucketing, preprocess.mask_temperature) == (512, True, 0.5)
    assert preprocess.token_map == inputs.token_map


def test_without_a_seed_each_run_gets_its_own():
    one, other = (train_inputs(defaults(input_images="x.zip")).seed for _ in range(2))
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


def test_the_entry_point_imports_nothing_heavy():
    done = python("-c", f"import train, sys; print(*({HEAVY!r} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
