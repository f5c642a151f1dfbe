"""The optimizers that a training may use, each from a library that maintains it.

Knows parameters, learning rates and state; does not know models, losses or schedules.

| name         | weights         | state, bytes a weight   | in a captured CUDA graph                          |
|--------------|-----------------|-------------------------|---------------------------------------------------|
| adamw        | fp32            | 8                       | yes; with bf16 copies, after one step             |
| adamw_8bit   | fp32 or bf16    | 2                       | yes, after one step has compiled its kernels      |
| adafactor    | fp32            | 0.4 (SDXL's UNet)       | no: counts its steps on the CPU                   |
| prodigy      | fp32            | 8.7                     | no: copies its statistics to the CPU in each step |

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
from transformers.optimization import Adafactor

from sdxl.errors import UserInputError
from sdxl.speed.triton_here import triton_runs
from sdxl.training.half_copies import HalfCopies
from sdxl.training.optimizer_8bit import EightBitAdamW, UncompiledEightBitAdamW
from sdxl.training.optimizer_with_copies import AdamWWithCopies
from sdxl.training.sharding import Shards

CAPTURABLE = frozenset({"adamw", "adamw_8bit"})
"""Optimizers whose step never waits for the GPU: a CUDA graph may contain it, and still reads new learning rates."""

SHAREABLE = frozenset({"adamw", "adamw_8bit"})
"""Optimizers that need only a part of each weight: they compute nothing over a whole weight, or over all weights."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that train alike."""

    params: list[nn.Parameter]
    lr: float
    """Learning rate, at least 0. Prodigy multiplies the rate that it finds by this: use 1."""
    weight_decay: float = 0.0
    """Decoupled decay, at least 0: every step shrinks weights by `lr` times this."""
    shards: Shards | None = None
    """If processes share these parameters: what knows it, and `params` are the parts of this process."""
    copies: HalfCopies | None = None
    """If the UNet computes with bf16 copies of these parameters: what knows the copies. Only for "adamw"."""
    state_on_host: bool = False
    """Whether what the optimizer remembers of them lies in the CPU's memory, and visits the GPU in each update. Only for
    "adamw_8bit"."""


class Optimizers:
    """The optimizers of a run, addressed by what they train: `weights` (the UNet's or LoRA's), token `rows`, and the LoRA
    matrices of the text `encoders`.

    "adamw" trains all in one optimizer, so that on CUDA the whole update is one fused kernel, if weights have no copies.
    Every other name trains the weights, and a second optimizer, AdamW, trains the rest.
    """

    def __init__(
        self, name: str, *, weights: Group, rows: Group, encoders: Group | None = None, device: torch.device
    ) -> None:
        """See `make_optimizers` for the arguments and errors."""
        self.shards = weights.shards
        """Not None if several processes share the weights."""
        self.copies = weights.copies
        """Not None if the UNet computes with bf16 copies of the weights."""
        self.capturable = name in CAPTURABLE and self.shards is None and not weights.state_on_host
        """Whether a CUDA graph may contain `step`."""
        text = [rows, encoders] if encoders and encoders.params else [rows]
        self._optimizers = make_optimizers(name, weights, *text, device=device)
        by_parameter = {id(group["params"][0]): group for group in self._groups()}
        self._weights, *self._text = (by_parameter[id(group.params[0])] for group in (weights, *text))
        self.all = tuple(self._optimizers)
        """The torch optimizers: one or two."""
        self.parameters = tuple(p for group in self._groups() for p in group["params"])
        """Everything that trains, also after it is frozen."""
        self.count_of_weights = len(weights.params)
        """How many of them are `weights`: they come first."""

    @property
    def rows_train(self) -> bool:
        """Whether the token rows still train."""
        return any(group is self._text[0] for group in self._groups())

    def set_rates(self, *, weights: float, rows: float, encoders: float = 0.0) -> None:
        """Set the learning rates of the next step."""
        for group, rate in zip((self._weights, *self._text), (weights, rows, encoders), strict=False):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # in place: a captured step reads this tensor
            else:
                group["lr"] = rate

    def freeze_text(self) -> None:
        """Stop training the token rows and the text encoders' matrices, for good."""
        frozen = {id(group) for group in self._text}
        for optimizer in self._optimizers:
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if id(group) not in frozen]

    @property
    def held(self) -> list[nn.Parameter]:
        """The parameters that modules hold: where the backward pass leaves gradients. Copies, where weights have them."""
        copies = self.copies
        return [*self.parameters] if copies is None else [copies.of(p) for p in self.parameters]

    def to_average(self) -> list[Tensor]:
        """After the backward pass: the gradients that are still to be averaged over all processes."""
        groups = self._groups()
        collected = []
        if self.copies is not None:
            self.copies.collect()
        if self.shards is not None:
            collected = self.shards.collect()
            groups = [group for group in groups if group is not self._weights]
        return collected + [p.grad for group in groups for p in group["params"] if p.grad is not None]

    def clip(self, max_norm: float) -> list[Tensor]:
        """Scale the gradients down to `max_norm`, and return their norms before: of the weights, then of the rows and
        the text encoders' matrices while they train.

        Each kind is clipped on its own: large gradients of the rows must not shrink the UNet's step, or the reverse.
        """
        special = self.shards or self.copies
        return [
            special.clip(max_norm)
            if special is not None and group is self._weights
            else nn.utils.clip_grad_norm_(group["params"], max_norm)
            for group in self._groups()
        ]

    def zero_grad(self, *, set_to_none: bool) -> None:
        """Remove all gradients, or fill them with zeros where they are."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Update everything that trains."""
        for optimizer in self._optimizers:
            optimizer.step()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]


def make_optimizers(name: str, weights: Group, *text: Group, device: torch.device) -> list[Optimizer]:
    """The one or two torch optimizers of a run. Each group of parameters has its own learning rate.

    Args:
        name: a key of `OPTIMIZERS`.
        weights: the UNet's weights or LoRA matrices, the first group of the first optimizer. fp32, or with
            "adamw_8bit" also bf16, which is then rounded stochastically.
        text: the token rows, and the text encoders' matrices if they train, fp32, the last groups of the last optimizer.
            They always train with AdamW: small state saves little on few numbers, and their rates must not depend on
            what Prodigy finds for the weights. May be empty.
        device: the parameters' device.

    Returns:
        `[optimizer]` with all groups for "adamw", else `[the weights' optimizer, the text's AdamW]`. An empty group gets
        no optimizer. On CUDA the rates of capturable optimizers are fp32 tensors on the device. Change them in place, as
        torch's schedulers do (`group["lr"].fill_(rate)`).

    Raises:
        UserInputError: unknown name, or the optimizer would lose updates of such weights.
    """
    if name not in OPTIMIZERS:
        raise UserInputError(f"optimizer is {name!r}, but must be one of {', '.join(OPTIMIZERS)}.")
    if name != "adamw_8bit" and any(p.dtype is not torch.float32 for p in weights.params):
        raise UserInputError(
            f"optimizer {name} loses small updates of bf16 weights: use adamw_8bit, or precision fp32."
        )
    if name == "adamw":
        return [adamw([group for group in (weights, *text) if group.params], device)]
    optimizers = [OPTIMIZERS[name]([weights], device)] if weights.params else []
    text = tuple(group for group in text if group.params)
    return optimizers + ([adamw(text, device)] if text else [])


def adamw(groups: Iterable[Group], device: torch.device) -> Optimizer:
    """AdamW with fp32 state, fused. Capturable: on CUDA it is one kernel, with its step count and rates on the device.

    Its kernel requires gradients of the weights' dtype. Weights with `copies` have bf16 gradients and a kernel each.
    """
    cuda, groups = device.type == "cuda", list(groups)
    copies = next((group.copies for group in groups if group.copies is not None), None)
    if copies is not None:
        return AdamWWithCopies(_as_dicts(groups, device if cuda else None), copies)
    return torch.optim.AdamW(_as_dicts(groups, device if cuda else None), fused=True, capturable=cuda)


def adamw_8bit(groups: Iterable[Group], device: torch.device) -> Optimizer:
    """AdamW with 8-bit state in blocks of 256, computed in fp32. bf16 weights are rounded stochastically.

    Accepts bf16 gradients. Tensors with fewer than 4096 values, or not made of whole blocks, keep state in their own
    dtype. Capturable once a first step has compiled its few kernels, which needs a C compiler. On a CPU, and
    where Triton does not run, the same operations run uncompiled, several times slower than AdamW.
    """
    groups = list(groups)
    made = EightBitAdamW if device.type == "cuda" and triton_runs() else UncompiledEightBitAdamW
    on_host = any(group.state_on_host for group in groups)
    return made(_as_dicts(groups, device), bf16_stochastic_round=True, state_on_host=on_host)


def adafactor(groups: Iterable[Group], device: torch.device) -> Optimizer:
    """Adafactor without momentum, with second moments factored into rows and columns (fp32), at the given rates.

    Accepts bf16 gradients. Clips updates to a root mean square of 1 before it applies the rate, so that rates mean
    about the same as for AdamW. Not capturable.
    """
    return Adafactor(_as_dicts(groups), relative_step=False, scale_parameter=False)


def prodigy(groups: Iterable[Group], device: torch.device) -> Optimizer:
    """Prodigy: Adam at a rate that it estimates from how far the weights have moved. All groups share one estimate.

    Uses the settings that its authors recommend for diffusion models: bias correction, and a safeguard for warm-up.
    To save memory the estimate uses every 11th weight. Not capturable.

    Raises:
        UserInputError: a rate is above 0 and below 0.1, so it was most likely meant for another optimizer.
    """
    groups = list(groups)
    for group in groups:
        if 0 < group.lr < 0.1:
            raise UserInputError(
                f"The learning rate is {group.lr}, but prodigy finds its own rate and multiplies it by this: use 1."
            )
    return Prodigy(_as_dicts(groups), safeguard_warmup=True, use_bias_correction=True, slice_p=11)


OPTIMIZERS: dict[str, Callable[[Iterable[Group], torch.device], Optimizer]] = {
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
    "adafactor": adafactor,
    "prodigy": prodigy,
}
"""Public name → function that makes it from groups and the device of their parameters."""


def _as_dicts(groups: Iterable[Group], rates_on: torch.device | None = None) -> list[dict[str, Any]]:
    """`groups` as torch expects them. Rates are floats, or fp32 tensors on the device `rates_on`."""

    def rate(lr: float) -> float | Tensor:
        return lr if rates_on is None else torch.tensor(lr, dtype=torch.float32, device=rates_on)

    return [{"params": g.params, "lr": rate(g.lr), "weight_decay": g.weight_decay} for g in groups]
