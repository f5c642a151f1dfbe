"""How full training holds the UNet's weights, chosen from the free memory.

Knows bytes and dtypes; does not know devices, files or the loop.

Why not simply bf16? Small updates must add up. Neighbouring bf16 numbers of a UNet's size lie up to 120 times further
apart than one step at a learning rate of 1e-6, so 98 % of such weights would never move. fp32 weights lose nothing, even
with 8-bit or factored optimizer state. With stochastic rounding bf16 weights move correctly on average, but after 200
steps the noise of each one is about as large as the distance it moved. That is for GPUs on which nothing else fits.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sdxl.errors import NotEnoughMemoryError, UserInputError
from sdxl.speed.memory import NO_LIMIT


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How full training holds weights, gradients, optimizer state and activations."""

    weights: torch.dtype
    """fp32, multiplied under bf16 autocast, or bf16, rounded stochastically by the optimizer."""
    gradients: torch.dtype
    """bf16 if the optimizer accepts it: under autocast a weight's gradient is computed in bf16 anyway."""
    optimizer: str
    """A key of `OPTIMIZERS`: the requested one, or the same with smaller state."""
    bytes_per_weight: float
    """Bytes of a weight, its gradient and its optimizer state together, on the GPU."""
    state_on_host: bool = False
    """Whether the optimizer state is in the CPU's memory, and visits the GPU in each update."""
    shared_by: int = 1
    """Among how many processes the weights, gradients and optimizer state are shared; 1: each process has all."""
    checkpointing: bool = True
    """Whether the backward pass recomputes activations."""
    reason: str = ""
    """One sentence for the log."""
    tight: bool = False
    """Whether it may not fit: then `reason` is a warning."""

    def apply(self, module: nn.Module) -> None:
        """Cast `module` in place, and let its parameters accumulate gradients in `gradients`."""
        # diffusers' own `to` warns about modules to keep in fp32; SDXL's UNet has none.
        nn.Module.to(module, self.weights)
        for parameter in module.parameters():
            parameter.grad_dtype = self.gradients


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype in which a parameter accumulates its gradient."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


# Bytes per weight: the weight, its gradient, and the state that the optimizer keeps of it.
FP32_ADAMW = MemoryPlan(  # 4 + 4 + 8; with bf16 copies (half_copies.py) 4 + 2 + 2 + 8
    weights=torch.float32, gradients=torch.float32, optimizer="adamw", bytes_per_weight=16
)
FP32_ADAMW_8BIT = MemoryPlan(  # 4 + 2 + 2
    weights=torch.float32, gradients=torch.bfloat16, optimizer="adamw_8bit", bytes_per_weight=8
)
BF16_ADAMW_8BIT = MemoryPlan(  # 2 + 2 + 2
    weights=torch.bfloat16, gradients=torch.bfloat16, optimizer="adamw_8bit", bytes_per_weight=6
)
BF16_ADAMW_8BIT_ON_HOST = replace(BF16_ADAMW_8BIT, bytes_per_weight=4, state_on_host=True)
FP32_ADAFACTOR = MemoryPlan(  # 4 + 2 + 0.4
    weights=torch.float32, gradients=torch.bfloat16, optimizer="adafactor", bytes_per_weight=6.4
)
FP32_PRODIGY = MemoryPlan(  # 4 + 4 + 8.7
    weights=torch.float32, gradients=torch.float32, optimizer="prodigy", bytes_per_weight=16.7
)
_PLANS = {
    "adamw": [FP32_ADAMW, FP32_ADAMW_8BIT, BF16_ADAMW_8BIT, BF16_ADAMW_8BIT_ON_HOST],
    "adamw_8bit": [FP32_ADAMW_8BIT, BF16_ADAMW_8BIT, BF16_ADAMW_8BIT_ON_HOST],
    "adafactor": [FP32_ADAFACTOR],
    "prodigy": [FP32_PRODIGY],
}
"""Requested optimizer → plans to choose from, best first. No maintained library has Adafactor or Prodigy with stochastic
rounding, and Adafactor in fp32 is about as small as 8-bit AdamW in bf16."""

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_SDXL_WEIGHTS = 2.567e9
_ACTIVATION_BYTES = 6 * 2**30
"""For one 1024×1024 picture in SDXL's UNet. Measured on an H100, batch 4: 4.5 GiB a picture with CUDA graphs, 5.6 GiB
with kernels launched one by one."""
_CHECKPOINTED_BYTES = 2 * 2**30
"""The same with gradient checkpointing. An estimate: 0.55 GiB by count, plus one block that is recomputed."""
_GATHERED = 0.55
"""Share of all weights that a process with shared ones holds whole for a moment: two of SDXL's largest transformers, of 14 %
each, with their gradients. An estimate."""
_ON_HOST_BYTES = 2.5
"""Of the CPU's memory for each weight whose state lies there: two bytes, and room for everything else."""
_RESERVE_BYTES = 2 * 2**30
"""For the workspaces of CUDA libraries and fragmentation. An estimate."""


def choose_plan(
    *,
    free_bytes: int,
    parameters: int,
    optimizer: str,
    batch: int,
    resolution: int,
    precision: str = "auto",
    checkpointing: bool | None = True,
    bf16: bool = True,
    shared_by: Sequence[int] = (1,),
    also_shared: int = 0,
    host_bytes: int = 0,
) -> MemoryPlan:
    """The best plan that fits in memory, with the reason in one sentence.

    Precision matters more than speed: with `checkpointing` None, activations are kept only if the best precision leaves
    room for them.

    Args:
        free_bytes: memory for the UNet's weights and its training; what else stays in memory is already subtracted.
        parameters: number of weights that train.
        optimizer: the requested name.
        batch: pictures in a batch.
        resolution: side of the pictures in pixels.
        precision: "auto", or "fp32" or "bf16" to force that precision even if it may not fit.
        checkpointing: whether the backward pass recomputes activations; None: only if memory requires it.
        bf16: whether the GPU computes in bf16. If not, weights, gradients and activations are fp32.
        shared_by: among how many processes the weights may be shared, best first; 1: each process has all.
        also_shared: bytes that are held already, and will be shared with the weights: the base as teacher.
        host_bytes: memory of the CPU that may hold optimizer state.

    Raises:
        UserInputError: an unknown name, or the optimizer does not support the precision.
        NotEnoughMemoryError: weights, gradients and optimizer state alone do not fit.
    """
    if precision not in (known := ("auto", *_NAMES.values())):
        raise UserInputError(f"precision is {precision!r}, but must be one of {', '.join(known)}.")
    if optimizer not in _PLANS:
        raise UserInputError(f"optimizer is {optimizer!r}, but must be one of {', '.join(_PLANS)}.")
    if precision == "bf16" and not bf16:
        raise UserInputError("precision is bf16, which this GPU cannot compute: use fp32, or train a LoRA.")
    plans = [plan for plan in _PLANS[optimizer] if precision in ("auto", name_of(plan.weights))]
    if host_bytes < _ON_HOST_BYTES * parameters or shared_by != (1,):
        plans = [plan for plan in plans if not plan.state_on_host]
    if not bf16:
        plans = [_without_bf16(plan) for plan in plans if plan.weights is torch.float32]
    if not plans:
        raise UserInputError(
            f"optimizer {optimizer} would lose small updates of bf16 weights: use adamw_8bit, or precision fp32."
        )

    # Take the first plan that fits; prefer keeping activations, which is faster.
    ways = (False, True) if checkpointing is None else (checkpointing,)
    state = activations = 0
    for plan, count, recompute in itertools.product(plans, shared_by, ways):
        activations = activation_bytes(
            parameters, batch=batch, resolution=resolution, checkpointing=recompute, bf16=bf16
        )
        state = _state_bytes(plan, parameters, count) - (also_shared - also_shared // count)
        if state + activations <= free_bytes:
            chosen = replace(plan, checkpointing=recompute, shared_by=count)
            return _explained(chosen, optimizer, state + activations, free_bytes)

    # Nothing fits by the estimates. Activations are the uncertain part: try the smallest plan if its weights fit.
    plan = replace(plans[-1], checkpointing=ways[-1], shared_by=shared_by[-1])
    if state > free_bytes:
        smaller = (
            ", or precision auto with optimizer adamw_8bit" if plan.bytes_per_weight > 7 and bf16 else ""
        )
        if also_shared and shared_by == (1,):
            smaller += f", or mask_base_target=false, which frees {_gib(also_shared)}"
        raise NotEnoughMemoryError(
            f"Full training of {parameters / 1e9:.2f} billion weights needs {_gib(state)} for weights, gradients and "
            f"optimizer state alone, but {_gib(free_bytes)} are free: train a LoRA or use a larger GPU{smaller}."
        )
    return _explained(plan, optimizer, state + activations, free_bytes, tight=True)


def _state_bytes(plan: MemoryPlan, parameters: int, shared_by: int) -> int:
    """Bytes of all weights, gradients and optimizer state that one process holds."""
    if shared_by == 1:
        return int(plan.bytes_per_weight * parameters)
    # Gradients of shared weights have the dtype of the weights.
    each = plan.bytes_per_weight + plan.weights.itemsize - plan.gradients.itemsize
    return int((each / shared_by + _GATHERED * plan.weights.itemsize) * parameters)


def _without_bf16(plan: MemoryPlan) -> MemoryPlan:
    """`plan` with fp32 gradients."""
    more = torch.float32.itemsize - plan.gradients.itemsize
    return replace(plan, gradients=torch.float32, bytes_per_weight=plan.bytes_per_weight + more)


def activation_bytes(
    weights: int, *, batch: int, resolution: int, checkpointing: bool, bf16: bool = True
) -> int:
    """An estimate of a step's memory beyond weights, gradients and optimizer state, for a UNet with `weights` weights."""
    per_picture = (_CHECKPOINTED_BYTES if checkpointing else _ACTIVATION_BYTES) * (1 if bf16 else 2)
    # Activations grow with a UNet's width, weights with its square.
    narrower = min(weights / _SDXL_WEIGHTS, 1.0) ** 0.5
    return _RESERVE_BYTES + int(per_picture * narrower * batch * (resolution / 1024) ** 2)


def name_of(dtype: torch.dtype) -> str:
    """ "fp32" or "bf16"."""
    return _NAMES[dtype]


def _explained(plan: MemoryPlan, requested: str, need: int, free: int, *, tight: bool = False) -> MemoryPlan:
    """`plan` with its reason: about `need` bytes are needed, `free` bytes are free."""
    rounding = ", rounded stochastically (noisier than fp32)" if plan.weights is torch.bfloat16 else ""
    shared = f", shared by {plan.shared_by} processes and without CUDA graphs" if plan.shared_by > 1 else ""
    instead = f" instead of {requested}" if plan.optimizer != requested else ""
    where = ", whose state lies in the CPU's memory" if plan.state_on_host else ""
    remedy = (
        ": should it run out of memory, train a LoRA or use a smaller batch or a lower resolution"
        if tight
        else ""
    )
    there_are = "" if free >= NO_LIMIT else f", {_gib(free)} free"
    return replace(
        plan,
        tight=tight,
        reason=f"The UNet's weights train in {name_of(plan.weights)}{rounding} with {plan.optimizer}{instead}{where}{shared}: "
        f"about {_gib(need)} needed{there_are}{remedy}.",
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
