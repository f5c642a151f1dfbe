"""What the log says before a training starts.

Knows settings and devices; does not know how training works.
"""

import logging
from collections.abc import Collection, Iterator

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
    given: Collection[str] = (),
) -> None:
    """Log what is trained, how often each picture is seen, and which settings have no effect.

    images: how many pictures are learned. masks: whether any of them has a mask. processes: how many train together.
    given: the inputs that were given instead of what the preset decides.
    """
    for told in without_effect_here(config, masks=masks, cuda=device.type == "cuda"):
        log.warning("%s", told)
    if told := told_of_fp32(capability_of(device)):
        log.warning("%s", told)
    pictures = config.train_batch_size * config.gradient_accumulation_steps
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
            pictures,
        ),
        *(config.resolution, config.resolution, config.seed, and_encoders, config.pivot_step),
    )
    log.info("%s", preset_line(config, given))
    for told in seen(config, images=images, processes=processes, given=given):
        log.info("%s", told)


def preset_line(config: TrainingConfig, given: Collection[str]) -> str:
    """A sentence with the preset, what it decided and which of `given` replaced it."""
    rates = ("lora_rank", "lora_targets", "lora_lr") if config.is_lora else ("unet_learning_rate",)
    names = ["max_train_steps", *rates, "ti_lr", "lr_warmup_steps"]
    epochs = ["num_train_epochs"] if "num_train_epochs" in given else []
    replaced = [*epochs, *(name for name in names if name in given)]
    decided = [f"{name}={getattr(config, name)}" for name in names]
    return f"Preset {config.preset}: {', '.join(decided)}. Given, not from the preset: {', '.join(replaced) or 'nothing'}."


def seen(
    config: TrainingConfig, *, images: int, processes: int, given: Collection[str] = ()
) -> Iterator[str]:
    """Sentences on how often each of `images` pictures is seen. `given` is as in `announce`."""
    draws = config.max_train_steps * _seen_in_a_step(config) * processes
    if (
        processes > 1 and "max_train_steps" in given
    ):  # otherwise the steps follow from the number of processes
        yield (
            f"{processes} GPUs see {processes} times as many pictures in a step as one: for as many in all as one GPU would "
            f"see, set max_train_steps to {-(-config.max_train_steps // processes)}."
        )
    times = round(draws / images)
    views = f", {config.random_views} random crops of it included" if config.random_views else ""
    advice = "" if _FEWEST <= times <= _MOST else f": {_FEWEST} to {_MOST} times suit most subjects"
    if times > _MOST and not {"max_train_steps", "num_train_epochs"} & {*given}:
        keeps = "preservation keeps" if config.preservation else "preservation=1 would keep"
        advice = f", as preset {config.preset} does with {images}: {keeps} other prompts as they are"
    yield f"Each picture is seen {times} times{views}{advice}."


def _seen_in_a_step(config: TrainingConfig) -> int:
    """Pictures that show the subject, in a step of one process."""
    return config.learned_at_once * config.gradient_accumulation_steps
