"""Presets: what they decide, and that what is given wins."""

import re
from typing import Any

import pytest

from benchmarks.quality import METHODS
from sdxl.training.config import TrainingConfig
from sdxl.training.inputs import train_inputs
from sdxl.training.presets import PRESETS, relative_to_good
from tests.test_train_inputs import DECLARED, defaults


def config(*, images: int = 6, processes: int = 1, words: str = "", **inputs: Any) -> TrainingConfig:
    wanted = train_inputs(defaults(input_images="x.zip", **inputs))
    return wanted.training_config(resolution=64, images=images, processes=processes, token_init=words)


@pytest.mark.parametrize(
    ("inputs", "images", "processes", "steps"),
    [
        ({}, 1, 1, 400),
        ({}, 8, 1, 400),
        ({}, 12, 1, 600),
        ({}, 20, 1, 1000),
        ({}, 500, 1, 1000),
        ({}, 12, 2, 300),
        ({"train_batch_size": 1, "gradient_accumulation_steps": 3}, 12, 1, 600),
        ({"preservation": 0.0}, 12, 1, 450),
        ({"train_batch_size": 32}, 12, 1, 75),
        ({"preset": "quick"}, 1, 1, 300),
        ({"preset": "quick"}, 500, 1, 300),
        ({"preset": "patient"}, 1, 1, 1000),
        ({"preset": "patient"}, 12, 1, 1500),
        ({"preset": "patient", "num_train_epochs": 2}, 12, 1, 8),
        ({"max_train_steps": 7}, 12, 4, 7),
    ],
)
def test_steps_follow_from_draws(inputs: dict[str, Any], images: int, processes: int, steps: int):
    assert config(images=images, processes=processes, **inputs).max_train_steps == steps


@pytest.mark.parametrize(
    ("inputs", "decided"),
    [
        (
            {},
            {
                "lora_rank": 16,
                "lora_targets": "transformer",
                "lora_lr": 1e-4,
                "ti_lr": 1e-3,
                "lora_alpha": None,
            },
        ),
        ({"is_lora": False}, {"unet_learning_rate": 3e-6, "lr_warmup_steps": 40}),
        ({"preset": "quick"}, {"lora_rank": 16, "lora_lr": 2e-4, "ti_lr": 1e-3, "lr_warmup_steps": 30}),
        ({"preset": "quick", "is_lora": False}, {"unet_learning_rate": 6e-6}),
        (
            {"preset": "patient"},
            {"lora_rank": 32, "lora_targets": "all", "lora_lr": 1e-4, "lr_warmup_steps": 100},
        ),
        ({"max_train_steps": 9}, {"lr_warmup_steps": 0}),
        ({"optimizer": "prodigy"}, {"lora_lr": 1.0, "unet_learning_rate": 1.0, "ti_lr": 1e-3}),
        (
            {"preset": "patient", "lora_rank": 8, "lora_lr": 0.0, "ti_lr": 1e-2, "lr_warmup_steps": 0},
            {"lora_rank": 8, "lora_lr": 0.0, "ti_lr": 1e-2, "lr_warmup_steps": 0, "lora_targets": "all"},
        ),
    ],
)
def test_what_is_given_wins_over_the_preset(inputs: dict[str, Any], decided: dict[str, Any]):
    settings = config(**inputs).as_json()
    assert {name: settings[name] for name in decided} == decided
    assert settings["preset"] == inputs.get("preset", "good")


def test_rows_that_start_at_random_learn_faster():
    assert config(words="TOK:dog").ti_lr == 3e-4
    assert config(token_init="TOK:dog").ti_lr == 1e-3, "words are what the last stage says"
    assert config(token_map="A:2,B:3", words="A:dog").ti_lr == 1e-3
    assert config(token_map="A:2,B:3", words="A:dog,B:cat").ti_lr == 3e-4


def test_the_descriptions_of_inputs_name_what_good_decides():
    decided = config(words="TOK:dog", images=500)
    for name in ("unet_learning_rate", "ti_lr", "lora_rank", "lora_lr", "lr_warmup_steps", "max_train_steps"):
        numbers = re.findall(r"\d+(?:e-\d+)?", DECLARED[name].description)
        assert getattr(decided, name) in map(float, numbers), name
    assert f"{decided.lora_targets} for good" in DECLARED["lora_targets"].description


def test_the_names_of_what_was_given_are_known():
    inputs = train_inputs(defaults(input_images="x.zip", num_train_epochs=2, lora_rank=8, seed=1))
    assert inputs.instead_of_preset == ["num_train_epochs", "lora_rank"]


def test_presets_apply_to_settings_of_another_base():
    settings = {
        "lora_lr": 2e-3,
        "unet_learning_rate": 4e-4,
        "ti_lr": 6e-3,
        "lora_rank": 16,
        "lora_targets": "all",
    }
    changes, steps = relative_to_good("good", settings, images=6)
    assert changes == pytest.approx({name: settings[name] for name in changes}) and steps == 1
    changes, steps = relative_to_good("quick", settings, images=6)
    assert changes == pytest.approx(
        {"lora_lr": 4e-3, "unet_learning_rate": 8e-4, "ti_lr": 2e-2, "lora_rank": 16}
    )
    assert steps == 0.75
    changes, steps = relative_to_good("patient", settings, images=12)
    assert (changes["lora_rank"], changes["lora_targets"], steps) == (32, "all", 2.5)
    assert {"lora_quick", "lora_patient"} <= {method.name for method in METHODS}


def test_quick_is_shortest_and_patient_longest():
    for images in (1, 6, 20, 1000):
        assert (
            PRESETS["quick"].draws(images) < PRESETS["good"].draws(images) < PRESETS["patient"].draws(images)
        )
