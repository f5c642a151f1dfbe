"""Settings of a training that contradict each other, or have no effect.

Knows names, values and defaults; does not know files or models. An input that is left out looks like one that was given
with its default, so only values that differ from their defaults are looked at.

A contradiction that trains something else than was asked for is refused. A setting that merely has no effect is told.
"""

from collections.abc import Iterator

from dataset_and_utils import TokenMap
from sdxl.errors import UserInputError
from sdxl.training.config import TrainingConfig, TrainingOptions

_OF_LORA = ("use_dora", "lora_rank", "lora_alpha", "lora_targets", "lora_lr", "text_encoder_lora")
_OF_PRIOR = ("prior_images", "prior_weight")
_WHOLE_FP32 = ("adafactor", "prodigy")
"""Optimizers that would lose small updates of bf16 weights, and that compute with means over whole weights."""
_OWN_RATE = 0.01
"""prodigy multiplies the rate that it finds by the given one, which should be 1. Less than this trains next to nothing."""


def refuse_contradictions(
    options: TrainingOptions, *, max_train_steps: int | None, num_train_epochs: int | None
) -> None:
    """Refuse settings of which one would be ignored, although the user expects another training from it.

    Raises:
        UserInputError: names both settings.
    """
    if max_train_steps is not None and num_train_epochs is not None:
        raise UserInputError("max_train_steps and num_train_epochs are both given: give one of them.")
    for name in () if options.is_lora else _changed(options, *_OF_LORA):
        raise UserInputError(
            f"{name} is {getattr(options, name)}, but with is_lora=false the whole UNet is trained: leave out is_lora or "
            f"{name}."
        )
    if not options.text_encoder_lora and _changed(options, "text_encoder_lr"):
        raise UserInputError(
            f"text_encoder_lr is {options.text_encoder_lr:g}, but without text_encoder_lora the text encoders are not trained: "
            "set text_encoder_lora to true, or leave out text_encoder_lr."
        )
    if options.text_encoder_lora and options.pivot_fraction == 0:
        raise UserInputError(
            "text_encoder_lora is true, but pivot_fraction is 0, so the text encoders would not be trained: raise "
            "pivot_fraction, or leave out text_encoder_lora."
        )
    for name in () if options.prior_prompts else _changed(options, *_OF_PRIOR):
        raise UserInputError(
            f"{name} is {getattr(options, name)}, but without prior_prompts the base draws no pictures to repeat: give "
            f"prior_prompts, or leave out {name}."
        )
    if options.preservation_prompts and not options.preservation:
        raise UserInputError(
            "preservation_prompts is given, but preservation is 0: set it to 1, or leave out preservation_prompts."
        )
    if options.preview_prompts and not options.checks:
        raise UserInputError(
            "preview_prompts is given, but checks is 0, so no previews are drawn: raise checks, or leave out preview_prompts."
        )
    if options.keep_checked and not options.checks:
        raise UserInputError(
            "keep_checked is true, but checks is 0, so there is nothing to keep: raise checks, or leave out keep_checked."
        )
    token_map = TokenMap.parse(options.token_map)
    for name, prompt in _prompts(options):
        if token_map.named_in(prompt):
            raise UserInputError(
                f'{name} contains "{prompt.strip()}", but the base, which draws it, does not know the new tokens: '
                "name what it knows, such as a photo of a dog."
            )
    if options.is_lora:
        _refuse_in_lora(options)
    else:
        _refuse_in_full(options)


def _refuse_in_lora(options: TrainingOptions) -> None:
    """Refuse contradictions in the settings of a LoRA's training."""
    if options.lora_lr == 0 and options.pivot_fraction == 0:
        raise UserInputError("lora_lr and pivot_fraction are both 0, so nothing would be trained: raise one.")
    if options.precision == "int8" and options.use_dora:
        raise UserInputError("use_dora needs the base's weights as they are: leave out precision=int8.")


def _refuse_in_full(options: TrainingOptions) -> None:
    """Refuse contradictions in the settings of full training."""
    if options.single_file and _changed(options, "full_result"):
        raise UserInputError(
            f"single_file writes a whole SDXL, beside which full_result={options.full_result} saves little: leave out one of them."
        )
    if options.shard and options.optimizer in _WHOLE_FP32:
        raise UserInputError(
            f"optimizer {options.optimizer} needs whole weights, which shard=true shares: use adamw or adamw_8bit, or leave out "
            "shard."
        )
    if options.precision == "int8":
        raise UserInputError(
            "precision=int8 is for a LoRA, whose base stays as it is: leave it out, or leave out is_lora=false."
        )
    if options.precision == "bf16" and options.optimizer in _WHOLE_FP32:
        raise UserInputError(
            f"optimizer {options.optimizer} would lose small updates of bf16 weights: use adamw_8bit, or precision fp32."
        )


def _prompts(options: TrainingOptions) -> Iterator[tuple[str, str]]:
    """The prompts that are for the base, each with its setting."""
    for name in ("prior_prompts", "preservation_prompts"):
        for prompt in getattr(options, name).split("|"):
            yield name, prompt


def without_effect(options: TrainingOptions) -> Iterator[str]:
    """A sentence for each setting that has no effect, whatever the pictures are."""
    if options.is_lora:
        if _changed(options, "unet_learning_rate"):
            yield "unet_learning_rate has no effect on a LoRA, whose rate is lora_lr: set is_lora=false to train the whole UNet."
        if options.precision in ("fp32", "bf16"):
            yield f"precision={options.precision} has no effect on a LoRA: it is for full training, is_lora=false."
        if options.shard:
            yield "shard has no effect on a LoRA: it is for full training, is_lora=false."
        if options.single_file:
            yield "single_file has no effect on a LoRA, which is always written for web UIs, and which export.py adds to a base."
        if _changed(options, "full_result"):
            yield "full_result has no effect on a LoRA, which is small anyway: it is for full training, is_lora=false."
        if options.lora_lr == 0 and options.pivot_fraction < 1:
            yield "lora_lr is 0, so nothing is trained after the pivot: set pivot_fraction to 1."
    if options.pivot_fraction == 0 and _changed(options, "ti_lr"):
        yield "ti_lr has no effect, because pivot_fraction is 0: the token rows stay as they start."
    if options.prior_prompts and options.prior_weight == 0:
        yield "prior_prompts has no effect, because prior_weight is 0."
    name = "lora_lr" if options.is_lora else "unet_learning_rate"
    rate = getattr(options, name)
    if options.optimizer == "prodigy" and rate is not None and 0 < rate < _OWN_RATE:
        yield f"prodigy finds its own rate and multiplies it by {name}, {rate:g}: leave {name} out."


def without_effect_here(config: TrainingConfig, *, masks: bool, cuda: bool) -> Iterator[str]:
    """A sentence for each setting that has no effect on these pictures or this device.

    masks: whether any picture has a mask.
    """
    for name in () if masks else _changed(config, "mask_floor", "mask_base_target"):
        yield f"{name} has no effect, because no picture has a mask."
    if config.checkpointing_steps > config.max_train_steps:
        yield f"checkpointing_steps has no effect, because the run has only {config.max_train_steps} steps."
    if config.gradient_checkpointing and not cuda:
        yield "gradient_checkpointing has no effect on a CPU."


def _changed(options: TrainingOptions, *names: str) -> list[str]:
    """Those of `names` whose values differ from their defaults."""
    return [name for name in names if getattr(options, name) != getattr(TrainingOptions, name)]
