"""bf16 copies of fp32 weights: a UNet computes with the copies, while the weights train.

Autocast casts every weight to bf16 in each step, and every gradient back to fp32. Copies save both: the update writes them
together with the weights, and reads gradients in bf16, as they are computed. In one backward pass on one GPU the numbers are
those of autocast. Gradients of several passes or processes would be added in bf16. This is mixed precision with master weights
(arXiv:1710.03740).

Knows parameters; does not know optimizers or what the module computes.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from sdxl.training.memory_order import ROW
from sdxl.training.sharding import set_whole


class HalfCopies:
    """The fp32 weights of a module whose matrices and convolutions are bf16 copies of them."""

    def __init__(self, module: nn.Module) -> None:
        """Replace the matrices and convolutions of `module`, which is fp32, by copies, if they make whole rows of 256 numbers.

        Biases and norms stay: they are small, and autocast computes norms in fp32.
        """
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
        others = [p for p in self.parameters if p not in self._copies]
        # As torch's get_total_norm does, but in fp32: it would round the norms of bf16 gradients to bf16.
        norms = [
            norm
            for some in (self._copies, others)
            if (gradients := [p.grad for p in some if p.grad is not None])
            for norm in torch._foreach_norm(gradients, 2, torch.float32)
        ]
        total = torch.stack(norms).norm()
        self.share.copy_((max_norm / (total + 1e-6)).clamp(max=1.0))
        nn.utils.clip_grads_with_norm_(others, max_norm, total)
        return total

    @torch.no_grad()
    def renew(self) -> None:
        """Make the copies equal to the weights, which something other than an update has set."""
        for weight, copy in self._copies.items():
            copy.copy_(weight)


def exact(weight: Tensor) -> Tensor:
    """The fp32 weight of which a module's parameter is a copy; if it is none, the parameter itself."""
    return getattr(weight, "_weight_of_copy", weight)


def input_dtype(unet: nn.Module) -> torch.dtype:
    """The dtype of what a training shows the UNet, that of its weights: fp32 also where it computes with copies, so that gradients
    of captions add up in fp32."""
    return exact(next(unet.parameters())).dtype


@torch.no_grad()
def set_exactly(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter of a module, shared or not, to the whole `value`; if it is a copy, also the weight."""
    weight = exact(parameter)
    set_whole(weight, value)
    if weight is not parameter:
        parameter.copy_(weight)


def _with_copy(parameter: nn.Parameter) -> nn.Parameter:
    """The weight that `parameter` was. The parameter is a bf16 copy of it from now on."""
    weight = nn.Parameter(parameter.data)
    parameter.data = parameter.data.bfloat16()
    for one in (weight, parameter):
        one.grad_dtype = torch.bfloat16
    cast(Any, parameter)._weight_of_copy = weight
    return weight
