"""The optimizers that a training may use, each from the library that keeps it.

Knows parameters, rates and state; does not know models, losses or schedules.

| name         | weights         | state, bytes a weight   | in a captured CUDA graph                     |
|--------------|-----------------|-------------------------|----------------------------------------------|
| adamw        | fp32            | 8                       | yes                                          |
| adamw_8bit   | fp32 or bf16    | 2                       | yes, after one step has compiled its kernels |
| adafactor    | fp32            | 0.4 (SDXL's UNet)       | no: counts its steps on the host             |
| prodigy      | fp32            | 8.7                     | no: reads its statistics back at every step  |

Sources: AdamW (arXiv:1711.05101), 8-bit state (arXiv:2110.02861), Adafactor (arXiv:1804.04235), Prodigy
(arXiv:2306.06101), stochastic rounding of bf16 weights (arXiv:2010.06192).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from prodigyopt import Prodigy
from torch import Tensor, nn
from torch.optim import Optimizer
from torchao.optim import AdamW8bit
from torchao.optim.adam import single_param_adam
from transformers.optimization import Adafactor

from sdxl.errors import UserInputError

CAPTURABLE = frozenset({"adamw", "adamw_8bit"})
"""Optimizers whose step never waits for the device: a CUDA graph may hold it, and then sees new learning rates."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that train alike."""

    params: list[nn.Parameter]
    lr: float
    """Learning rate, at least 0. Prodigy finds its own and multiplies it by this: 1 is meant."""
    weight_decay: float = 0.0
    """Decoupled decay, at least 0: every step shrinks weights by `lr` times this."""


def make_optimizers(name: str, weights: Group, rows: Group, *, device: torch.device) -> list[Optimizer]:
    """The optimizers of a run: one or two, of which every group of parameters knows its rate by itself.

    Args:
        name: a key of `OPTIMIZERS`.
        weights: the UNet's weights or LoRA matrices, the first group of the first optimizer. fp32; with "adamw_8bit"
            bf16 too, which are then rounded stochastically.
        rows: the token rows, fp32, the last group of the last optimizer. They always train with AdamW: a few
            thousand numbers gain nothing from small state, and their rate must not follow what Prodigy finds for the
            weights. May be empty.
        device: where the parameters are.

    Returns:
        `[optimizer]` with two groups for "adamw", else `[weights' optimizer, rows' AdamW]`; no optimizer is made for
        an empty group. On CUDA the rates of capturable ones are fp32 tensors on the device: schedulers of torch
        change them in place, and so should anyone else (`group["lr"].fill_(rate)`).

    Raises:
        UserInputError: the name is not known, or the optimizer would lose updates of such weights.
    """
    if name not in OPTIMIZERS:
        raise UserInputError(f"optimizer is {name!r}, but must be one of {', '.join(OPTIMIZERS)}.")
    if name != "adamw_8bit" and any(p.dtype is not torch.float32 for p in weights.params):
        raise UserInputError(
            f"optimizer {name} loses small updates of bf16 weights: use adamw_8bit, or precision fp32."
        )
    if name == "adamw":
        return [adamw([group for group in (weights, rows) if group.params], device)]
    optimizers = [OPTIMIZERS[name]([weights], device)] if weights.params else []
    return optimizers + ([adamw([rows], device)] if rows.params else [])


def adamw(groups: Iterable[Group], device: torch.device) -> Optimizer:
    """AdamW with fp32 state. Capturable: on CUDA it is one fused kernel with its count and rates on the device.

    Its kernels take gradients of the weights' own dtype only.
    """
    cuda = device.type == "cuda"
    return torch.optim.AdamW(_as_dicts(groups, device if cuda else None), fused=cuda, capturable=cuda)


def adamw_8bit(groups: Iterable[Group], device: torch.device) -> Optimizer:
    """AdamW with 8-bit state in blocks of 256, computed in fp32; bf16 weights are rounded stochastically.

    Takes bf16 gradients. Tensors under 4096 values, or not of whole blocks, have state in their own dtype.
    Capturable once a first step has compiled its few kernels, which needs a C compiler. On a CPU the same operations run
    uncompiled, several times slower than AdamW.
    """
    return (_AdamW8bit if device.type == "cuda" else _UncompiledAdamW8bit)(
        _as_dicts(groups, device), bf16_stochastic_round=True
    )


def adafactor(groups: Iterable[Group], device: torch.device) -> Optimizer:
    """Adafactor without momentum, its second moments factored into rows and columns (fp32), at the rates given.

    Takes bf16 gradients. Updates are clipped to a root mean square of 1 before the rate, so that rates mean about
    what they mean to AdamW. Not capturable.
    """
    return Adafactor(_as_dicts(groups), relative_step=False, scale_parameter=False)


def prodigy(groups: Iterable[Group], device: torch.device) -> Optimizer:
    """Prodigy: Adam at a rate that it estimates from how far the weights have come; one estimate for all groups.

    The settings that its authors advise for diffusion models: bias correction, and a safeguard for warm-up. The
    estimate looks at every 11th weight, to save memory. Not capturable.

    Raises:
        UserInputError: a rate is above 0 and below 0.1, so most likely meant for another optimizer.
    """
    groups = list(groups)
    for group in groups:
        if 0 < group.lr < 0.1:
            raise UserInputError(
                f"The learning rate is {group.lr}, but prodigy finds it itself and multiplies it by this: use 1."
            )
    return Prodigy(_as_dicts(groups), safeguard_warmup=True, use_bias_correction=True, slice_p=11)


OPTIMIZERS: dict[str, Callable[[Iterable[Group], torch.device], Optimizer]] = {
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
    "adafactor": adafactor,
    "prodigy": prodigy,
}
"""Public name → how it is made, from groups and the device of their parameters."""


class _AdamW8bit(AdamW8bit):
    """The library's arithmetic, compiled for kinds of shapes, where the library compiles for each (44 in
    SDXL's UNet), in every run anew: weights are seen as rows of a block each, small ones as one row."""

    def __init__(self, groups: list[dict[str, Any]], *, bf16_stochastic_round: bool) -> None:
        super().__init__(groups, bf16_stochastic_round=bf16_stochastic_round)
        # Made here rather than at the first step, and the count of steps on the device: on the host, where the library
        # keeps it, a captured graph would not see it grow.
        for group in self.param_groups:
            for p in group["params"]:
                seen = self._seen(p, p)
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": self._new_buffer(seen, True),
                    "exp_avg_sq": self._new_buffer(seen, False),
                }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of all weights that have a gradient."""
        update: Callable[..., None] = torch.compile(single_param_adam, fullgraph=True, dynamic=True)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                update(
                    self._seen(p.detach(), p),
                    self._seen(p.grad, p),
                    state["step"],
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    None,
                    group["lr"],
                    *group["betas"],
                    group["weight_decay"],
                    group["eps"],
                    True,
                    p.dtype is torch.bfloat16,
                )

    def _seen(self, values: Tensor, p: nn.Parameter) -> Tensor:
        """`values` of the weight `p` in the order in which it lies in memory: [blocks, 256], or [n] where not of whole blocks."""
        row = values.permute(sorted(range(p.dim()), key=p.stride, reverse=True))
        row = (
            row.view(-1) if values.data_ptr() == p.data_ptr() else row.reshape(-1)
        )  # the weight itself, no copy
        whole = row.numel() >= 4096 and row.numel() % self.block_size == 0
        return row.view(-1, self.block_size) if whole else row


class _UncompiledAdamW8bit(_AdamW8bit):
    """The same, its operations run as they are."""

    step = torch.compiler.set_stance("force_eager")(_AdamW8bit.step)


def _as_dicts(groups: Iterable[Group], rates_on: torch.device | None = None) -> list[dict[str, Any]]:
    """`groups` as torch takes them; rates are numbers, or fp32 tensors on the device `rates_on`."""

    def rate(lr: float) -> float | Tensor:
        return lr if rates_on is None else torch.tensor(lr, dtype=torch.float32, device=rates_on)

    return [{"params": g.params, "lr": rate(g.lr), "weight_decay": g.weight_decay} for g in groups]
