"""AdamW (arXiv:1711.05101) that reads bf16 gradients and writes fp32 weights, their state and their bf16 copies in one pass over
memory.

Knows parameters and their state; does not know what they belong to.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sdxl.training.half_copies import HalfCopies
from sdxl.training.memory_order import as_rows


class AdamWWithCopies(torch.optim.AdamW):
    """torch's fused AdamW, but a kernel for each weight with a copy, compiled on CUDA. The state has the names and types of
    torch's, so that either can go on where the other stopped. Capturable once a first step has compiled the kernel."""

    def __init__(self, groups: list[dict[str, Any]], copies: HalfCopies) -> None:
        """groups: as torch takes them, with rates that are tensors on CUDA. The weights are `copies.parameters`."""
        on_cuda = copies.share.is_cuda
        super().__init__(groups, fused=True, capturable=on_cuda)
        self._copies = copies
        for weight in (p for group in self.param_groups for p in group["params"]):
            self.state[weight] = {
                "step": torch.zeros((), device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Remove all gradients, or fill them with zeros where they are."""
        super().zero_grad(set_to_none)
        if set_to_none:
            self._copies.forget_gradients()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all weights that have a gradient, and their copies."""
        groups = [(group, self._taken(group)) for group in self.param_groups]
        super().step()  # everything else
        for group, taken in groups:
            if taken:
                self._update(group, taken)
            for weight, gradient in taken.items():
                weight.grad = gradient

    def _taken(self, group: dict[str, Any]) -> dict[nn.Parameter, Tensor]:
        """The gradients of weights with copies, which they no longer have."""
        taken = {}
        for weight in group["params"]:
            if weight.grad is not None and self._copies.of(weight) is not weight:
                taken[weight], weight.grad = weight.grad, None
        return taken

    def _update(self, group: dict[str, Any], gradients: dict[nn.Parameter, Tensor]) -> None:
        steps = [self.state[weight]["step"] for weight in gradients]
        torch._foreach_add_(steps, 1)
        first, second = group["betas"]
        # All weights take their steps together, so their corrections are equal.
        size = group["lr"] / (1 - first ** steps[0])
        root = (1 - second ** steps[0]).sqrt()
        kept = 1 - group["lr"] * group["weight_decay"]
        compiled = self._copies.share.is_cuda
        update: Callable[..., None] = torch.compile(_update, fullgraph=True) if compiled else _update
        for weight, gradient in gradients.items():
            state = self.state[weight]
            held = (weight.detach(), self._copies.of(weight).detach(), state["exp_avg"], state["exp_avg_sq"])
            rows = [as_rows(one, weight) for one in held]
            read = as_rows(gradient, weight, written=False)
            update(*rows, read, self._copies.share, size, root, kept, first, second, group["eps"])


def _update(
    weight: Tensor,
    copy: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    share: Tensor,
    size: Tensor,
    root: Tensor,
    kept: Tensor | float,
    first: float,
    second: float,
    eps: float,
) -> None:
    """One weight's step, all [rows, 256]: m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², w ← kept·w − size·m / (√v / root + ε)."""
    gradient = gradient.float() * share
    new_mean = first * mean + (1 - first) * gradient
    new_square = second * square + (1 - second) * gradient * gradient
    new = kept * weight - size * new_mean / (new_square.sqrt() / root + eps)
    mean.copy_(new_mean)
    square.copy_(new_square)
    weight.copy_(new)
    copy.copy_(new)
