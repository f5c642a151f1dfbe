"""What the log says before a training starts.

Knows settings and devices; does not know how training works.
"""

import logging
from collections.abc import Iterator

import torch

from sdxl.gpu import capability_of, told_of_fp32
from sdxl.training.config import TrainingConfig
from sdxl.training.contradictions import without_effect_here

log = logging.getLogger(__name__)

_FEWEST, _MOST = 150, 300
"""Repeats of a picture that suit most subjects, as guides to SDXL fine-tuning name them."""


def announce(
    config: TrainingConfig,
    device: torch.device,
    *,
    images: int,
    masks: bool,
    processes: int = 1,
    by_epochs: bool = False,
) -> None:
    """Log what is trained, how often each picture is seen, and which settings have no effect.

    images: how many pictures are learned. masks: whether any of them has a mask. processes: how many train together.
    by_epochs: whether the steps follow from epochs, and so from the number of processes.
    """
    for told in without_effect_here(config, masks=masks, cuda=device.type == "cuda"):
        log.warning("%s", told)
    if told := told_of_fp32(capability_of(device)):
        log.warning("%s", told)
    what = f"a LoRA of rank {config.lora_rank}" if config.is_lora else "the whole UNet"
    and_text, and_encoders = "", ""
    if config.text_encoder_lora:
        and_text, and_encoders = " and a LoRA on both text encoders", " and the text encoders"
    log.info(
        "Training %s of %s and the tokens of %s%s on %s: %d steps of %d pictures at %d×%d pixels, with seed %d. "
        "The tokens%s freeze after step %d.",
        *(
            what,
            config.base,
            config.token_map,
            and_text,
            device,
            config.max_train_steps,
            _seen_in_a_step(config),
        ),
        *(config.resolution, config.resolution, config.seed, and_encoders, config.pivot_step),
    )
    for told in seen(config, images=images, processes=processes, by_epochs=by_epochs):
        log.info("%s", told)


def seen(config: TrainingConfig, *, images: int, processes: int, by_epochs: bool = False) -> Iterator[str]:
    """Sentences on how often each of `images` pictures is seen."""
    draws = config.max_train_steps * _seen_in_a_step(config) * processes
    if processes > 1 and not by_epochs:
        yield (
            f"{processes} GPUs see {processes} times as many pictures in a step as one: for as many in all as one GPU would "
            f"see, set max_train_steps to {-(-config.max_train_steps // processes)}."
        )
    times = round(draws / images)
    views = f", {config.random_views} random crops of it included" if config.random_views else ""
    advice = "" if _FEWEST <= times <= _MOST else f": {_FEWEST} to {_MOST} times suit most subjects"
    yield f"Each picture is seen {times} times{views}{advice}."


def _seen_in_a_step(config: TrainingConfig) -> int:
    """Pictures of a step in one process."""
    return config.train_batch_size * config.gradient_accumulation_steps
