"""How full training holds the UNet's weights: chosen from the memory there is.

Knows bytes and dtypes; does not know devices, files or the loop.

Small updates must add up: bf16 numbers as large as most weights of a UNet lie up to 120 times further apart than a
step at a rate of 1e-6, and 98 % of such weights never move. fp32 weights lose nothing, also not with 8-bit or factored
state. bf16 weights that are rounded stochastically move rightly on average, but each with noise about as large as its
way of 200 steps: they are for where nothing else fits.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from sdxl.errors import NotEnoughMemoryError, UserInputError

PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class WeightPrecision:
    """How weights, gradients and the optimizer's state are held in full training."""

    weights: torch.dtype
    """fp32, trained under bf16 autocast (with `cache_enabled=False`: else a bf16 copy of all weights is kept); or
    bf16, rounded stochastically by the optimizer."""
    gradients: torch.dtype
    """bf16 where the optimizer takes it: under autocast the gradient of a weight is computed in bf16 anyway."""
    optimizer: str
    """A key of `OPTIMIZERS`: the one asked for, or the same with smaller state."""
    bytes_per_weight: float
    """Of the weight, its gradient and its state."""
    checkpointing: bool = True
    """Whether activations are computed again in the backward pass."""
    reason: str = ""
    """One sentence for the log."""
    tight: bool = False
    """It may not fit: `reason` is a warning."""

    def apply(self, module: nn.Module) -> None:
        """Cast `module` in place, and have the gradients of its parameters accumulate in their dtype."""
        nn.Module.to(
            module, self.weights
        )  # diffusers' own warns of parts to keep in fp32, of which there are none
        for parameter in module.parameters():
            parameter.grad_dtype = self.gradients


FP32_ADAMW = WeightPrecision(
    weights=torch.float32, gradients=torch.float32, optimizer="adamw", bytes_per_weight=16
)
FP32_ADAMW_8BIT = WeightPrecision(
    weights=torch.float32, gradients=torch.bfloat16, optimizer="adamw_8bit", bytes_per_weight=8
)
BF16_ADAMW_8BIT = WeightPrecision(
    weights=torch.bfloat16, gradients=torch.bfloat16, optimizer="adamw_8bit", bytes_per_weight=6
)
FP32_ADAFACTOR = WeightPrecision(
    weights=torch.float32, gradients=torch.bfloat16, optimizer="adafactor", bytes_per_weight=6.4
)
FP32_PRODIGY = WeightPrecision(
    weights=torch.float32, gradients=torch.float32, optimizer="prodigy", bytes_per_weight=16.7
)
_CHOICES = {
    "adamw": [FP32_ADAMW, FP32_ADAMW_8BIT, BF16_ADAMW_8BIT],
    "adamw_8bit": [FP32_ADAMW_8BIT, BF16_ADAMW_8BIT],
    "adafactor": [FP32_ADAFACTOR],
    "prodigy": [FP32_PRODIGY],
}
"""Optimizer asked for → what may be chosen, best first. Adafactor and Prodigy have no stochastic rounding in any
library that is kept, and fp32 with Adafactor is about as small as bf16 with 8-bit AdamW."""

_SDXL_WEIGHTS = 2.567e9
_ACTIVATION_BYTES = 6 * 2**30
"""Of one 1024×1024 picture in SDXL's UNet: steps of four took 4.5 GiB for each, and 5.6 GiB launched one by one (H100)."""
_CHECKPOINTED_BYTES = 2 * 2**30
"""The same with gradient checkpointing: counted 0.55 GiB, and one block computed again. An estimate."""
_RESERVE_BYTES = 2 * 2**30
"""CUDA libraries' workspaces, and memory lost between blocks. An estimate."""


def choose_precision(
    *,
    free_bytes: int,
    parameters: int,
    optimizer: str,
    batch: int,
    resolution: int,
    precision: str = "auto",
    checkpointing: bool | None = True,
) -> WeightPrecision:
    """The best way to hold the weights that fits in memory, with the reason in a sentence.

    Precision comes before speed: without a wish, activations are kept only where the best precision leaves room.

    Args:
        free_bytes: memory free for the UNet's weights and its training: without the UNet, with all else that stays.
        parameters: number of weights that train.
        optimizer: the name asked for.
        batch: pictures in a step.
        resolution: side of the pictures, in pixels.
        precision: "auto", or "fp32" or "bf16" to have weights of that kind whether it fits or not.
        checkpointing: activations are computed again in the backward pass; None: as memory allows.

    Raises:
        UserInputError: a name is not known, or the optimizer has no such precision.
        NotEnoughMemoryError: the weights, gradients and state alone do not fit.
    """
    if precision not in PRECISIONS:
        raise UserInputError(f"precision is {precision!r}, but must be one of {', '.join(PRECISIONS)}.")
    if optimizer not in _CHOICES:
        raise UserInputError(f"optimizer is {optimizer!r}, but must be one of {', '.join(_CHOICES)}.")
    choices = [choice for choice in _CHOICES[optimizer] if precision in ("auto", name_of(choice.weights))]
    if not choices:
        raise UserInputError(
            f"optimizer {optimizer} would lose small updates of bf16 weights: use adamw_8bit, or precision fp32."
        )
    ways = (False, True) if checkpointing is None else (checkpointing,)
    activations = 0
    for choice in choices:
        for again in ways:
            activations = activation_bytes(
                parameters, batch=batch, resolution=resolution, checkpointing=again
            )
            need = int(choice.bytes_per_weight * parameters) + activations
            if need <= free_bytes:
                return _because(replace(choice, checkpointing=again), optimizer, need, free_bytes)
    choice = replace(choices[-1], checkpointing=ways[-1])
    state = int(choice.bytes_per_weight * parameters)
    if state > free_bytes:
        smaller = ", or precision auto with optimizer adamw_8bit" if choice.bytes_per_weight > 7 else ""
        raise NotEnoughMemoryError(
            f"Full training of {parameters / 1e9:.2f} billion weights needs {_gib(state)} for weights, gradients and "
            f"optimizer state alone, but {_gib(free_bytes)} are free: use is_lora or a larger GPU{smaller}."
        )
    return _because(choice, optimizer, state + activations, free_bytes, tight=True)


def activation_bytes(weights: int, *, batch: int, resolution: int, checkpointing: bool) -> int:
    """About what a step takes beside weights, gradients and state, for a UNet of so many weights."""
    per_picture = _CHECKPOINTED_BYTES if checkpointing else _ACTIVATION_BYTES
    # Activations grow with a UNet's width, its weights with the square of it.
    narrower = min(weights / _SDXL_WEIGHTS, 1.0) ** 0.5
    return _RESERVE_BYTES + int(per_picture * narrower * batch * (resolution / 1024) ** 2)


def name_of(dtype: torch.dtype) -> str:
    """ "fp32" or "bf16"."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _because(
    choice: WeightPrecision, asked: str, need: int, free: int, *, tight: bool = False
) -> WeightPrecision:
    """`choice` with its reason: `need` bytes are estimated, `free` are there."""
    rounding = ", rounded stochastically (noisier than fp32)" if choice.weights is torch.bfloat16 else ""
    instead = f" in place of {asked}" if choice.optimizer != asked else ""
    remedy = ": should it run out, use is_lora, a smaller batch or a lower resolution" if tight else ""
    return replace(
        choice,
        tight=tight,
        reason=f"The UNet's weights train in {name_of(choice.weights)}{rounding}, with {choice.optimizer}{instead}: "
        f"about {_gib(need)} needed, {_gib(free)} free{remedy}.",
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
