"""Presets: what a run does where its user gave nothing.

Knows settings and numbers of pictures; does not know files or models. The values are for SDXL; docs/training.md names
their sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataset_and_utils import TokenMap
from sdxl.training.config import LoraTargets, PresetName, TrainingOptions

_WARMUP_SHARE = 10
"""The warm-up takes at most one step in so many."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What one preset decides. A draw is one of the pictures in one step, so that batches of any size learn equally much."""

    repeats: int
    """Draws of each picture, within the next two bounds."""
    fewest_draws: int
    most_draws: int
    lora_rank: int
    lora_targets: LoraTargets
    lora_lr: float
    unet_learning_rate: float
    """In full training."""
    ti_lr: float
    """Of token rows that start from a word."""
    ti_lr_at_random: float
    """Of token rows that start at random, which have a longer way to go."""
    longest_warmup: int
    """Steps."""

    def draws(self, images: int) -> int:
        """How many pictures a run draws in all, if there are `images` different ones."""
        return min(max(self.repeats * images, self.fewest_draws), self.most_draws)


PRESETS: dict[PresetName, Preset] = {
    "quick": Preset(
        repeats=150,
        fewest_draws=900,
        most_draws=900,
        lora_rank=16,
        lora_targets="transformer",
        lora_lr=2e-4,
        unet_learning_rate=6e-6,
        ti_lr=1e-3,
        ti_lr_at_random=1e-3,
        longest_warmup=30,
    ),
    "good": Preset(
        repeats=150,
        fewest_draws=1200,
        most_draws=3000,
        lora_rank=16,
        lora_targets="transformer",
        lora_lr=1e-4,
        unet_learning_rate=3e-6,
        ti_lr=3e-4,
        ti_lr_at_random=1e-3,
        longest_warmup=100,
    ),
    "patient": Preset(
        repeats=375,
        fewest_draws=3000,
        most_draws=7500,
        lora_rank=32,
        lora_targets="all",
        lora_lr=1e-4,
        unet_learning_rate=3e-6,
        ti_lr=3e-4,
        ti_lr_at_random=1e-3,
        longest_warmup=100,
    ),
}


def resolve_steps(
    preset: PresetName, *, max_train_steps: int | None, epochs: int | None, images: int, at_once: int
) -> int:
    """How many optimizer steps to run: `max_train_steps` if given, else enough to show `images` pictures `epochs` times,
    else as many as the preset draws.

    at_once: pictures that show the subject, of a step in all processes.
    """
    if max_train_steps is not None:
        return max_train_steps
    draws = PRESETS[preset].draws(images) if epochs is None else epochs * images
    return -(-draws // at_once)  # rounded up


def resolve(options: TrainingOptions, *, token_init: str, steps: int) -> dict[str, Any]:
    """The settings that a preset decides, by name. Those that `options` has are kept.

    token_init: the words that token rows start from, such as "TOK:dog".
    steps: optimizer steps of the run.
    """
    preset = PRESETS[options.preset]
    token_map = TokenMap.parse(options.token_map)
    from_words = len(token_map.parse_init(token_init)) == len(token_map.new_tokens)
    finds_own_rate = options.optimizer == "prodigy"  # and multiplies it by the given one
    decided = {
        "unet_learning_rate": 1.0 if finds_own_rate else preset.unet_learning_rate,
        "ti_lr": preset.ti_lr if from_words else preset.ti_lr_at_random,
        "lora_rank": preset.lora_rank,
        "lora_targets": preset.lora_targets,
        "lora_lr": 1.0 if finds_own_rate else preset.lora_lr,
        "lr_warmup_steps": min(preset.longest_warmup, steps // _WARMUP_SHARE),
    }
    return decided | given(options)


def given(options: TrainingOptions) -> dict[str, Any]:
    """The settings that a preset would decide, but the user gave."""
    names = ("unet_learning_rate", "ti_lr", "lora_rank", "lora_targets", "lora_lr", "lr_warmup_steps")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def relative_to_good(
    preset: PresetName, settings: Mapping[str, Any], *, images: int
) -> tuple[dict[str, Any], float]:
    """`settings` that are good for another base, changed as `preset` differs from good on SDXL.

    Returns what changes, and the factor of the steps for `images` pictures.
    """
    wanted, good = PRESETS[preset], PRESETS["good"]
    rates = ("lora_lr", "unet_learning_rate", "ti_lr")
    changes: dict[str, Any] = {
        name: settings[name] * getattr(wanted, name) / getattr(good, name) for name in rates
    }
    changes["lora_rank"] = settings["lora_rank"] * wanted.lora_rank // good.lora_rank
    if wanted.lora_targets != good.lora_targets:
        changes["lora_targets"] = wanted.lora_targets
    return changes, wanted.draws(images) / good.draws(images)
