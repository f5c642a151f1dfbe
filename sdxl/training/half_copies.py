"""bf16 copies of fp32 weights: a UNet computes with the copies, while the weights train.

Autocast casts every weight to bf16 in each step, and every gradient from bf16. With copies neither is needed: the update writes
the copies in the same pass over memory, and reads gradients in bf16, in which autocast computes them anyway. The numbers are
the same. This is mixed precision with master weights (arXiv:1710.03740).

Knows parameters; does not know optimizers or what the module computes.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from sdxl.training.sharding import set_whole

ROW = 256
"""Numbers in a row, where kernels see a tensor as rows: it can be read without looking for its end."""


class HalfCopies:
    """The fp32 weights of a module whose matrices and convolutions are bf16 copies of them."""

    def __init__(self, module: nn.Module) -> None:
        """Replace the fp32 matrices and convolutions of `module` by copies. Biases and norms stay: autocast computes norms in
        fp32, and they are small."""
        held = list(module.parameters())
        self.parameters = [_with_copy(p) if p.dim() > 1 and p.numel() % ROW == 0 else p for p in held]
        """What trains, fp32, in the order of the module's parameters."""
        self._copies = {
            weight: copy for weight, copy in zip(self.parameters, held, strict=True) if weight is not copy
        }
        self.share = torch.ones((), device=held[0].device)
        """What the update multiplies the copies' gradients by."""

    def of(self, weight: nn.Parameter) -> nn.Parameter:
        """The copy of a weight: where the backward pass leaves its gradient. The weight itself if it has none."""
        return self._copies.get(weight, weight)

    def collect(self) -> None:
        """After the backward pass: let each weight have the gradient of its copy, bf16."""
        for weight, copy in self._copies.items():
            weight.grad = copy.grad

    def forget_gradients(self) -> None:
        """Remove the copies' gradients."""
        for copy in self._copies.values():
            copy.grad = None

    def clip(self, max_norm: float) -> Tensor:
        """Clip all gradients together to `max_norm`, and return their norm before. Those of copies are scaled by `share` in the
        update, which saves two passes over memory."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        # As torch's get_total_norm does, but in fp32: the norm of bf16 gradients would be rounded to bf16.
        norm = torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).norm()
        self.share.copy_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        nn.utils.clip_grads_with_norm_([p for p in self.parameters if p not in self._copies], max_norm, norm)
        return norm

    @torch.no_grad()
    def renew(self) -> None:
        """Make the copies equal to the weights, which something other than an update has set."""
        for weight, copy in self._copies.items():
            copy.copy_(weight)


def exact(weight: Tensor) -> Tensor:
    """The fp32 weight of which a module's parameter is a copy; if it is none, the parameter itself."""
    return getattr(weight, "_weight_of_copy", weight)


@torch.no_grad()
def set_exactly(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter of a module, shared or not, to the whole `value`; if it is a copy, also the weight."""
    weight = exact(parameter)
    set_whole(weight, value)
    if weight is not parameter:
        parameter.copy_(weight)


def as_rows(values: Tensor, weight: nn.Parameter) -> Tensor:
    """`values`, of the shape of `weight`, in its memory order: [rows, 256], or [n] if they do not make whole rows."""
    row = values.permute(sorted(range(weight.dim()), key=weight.stride, reverse=True))
    # The weight itself must be a view, never a copy: an update writes into it.
    row = row.view(-1) if values.data_ptr() == weight.data_ptr() else row.reshape(-1)
    return row.view(-1, ROW) if row.numel() % ROW == 0 else row


def _with_copy(parameter: nn.Parameter) -> nn.Parameter:
    """The weight that `parameter` was. The parameter is a bf16 copy of it from now on."""
    weight = nn.Parameter(parameter.data)
    parameter.data = parameter.data.bfloat16()
    for one in (weight, parameter):
        one.grad_dtype = torch.bfloat16
    cast(Any, parameter)._weight_of_copy = weight
    return weight
