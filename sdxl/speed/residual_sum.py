"""The sum at the end of a residual block, with the biases of its convolutions, in one pass over memory (Triton).

torch adds a convolution's bias in a pass of its own over the convolution's result, and the shortcut in another. Knows the
function; does not know models.
"""

# Triton comes with torch for CUDA only.
# pyright: reportMissingImports=false, reportIndexIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
"""Numbers that one program adds."""


def residual_sum(one: Tensor, other: Tensor, bias: Tensor) -> Tensor:
    """one + other + bias on CUDA, in the first's dtype and with channels last.

    one, other: [n, c, h, w]. bias: [c], a number for each channel.
    """
    return _Sum.apply(one, other, bias)  # type: ignore[return-value]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor, bias: Tensor) -> Tensor:
        one = one.contiguous(memory_format=torch.channels_last)
        other = other.contiguous(memory_format=torch.channels_last)
        result = torch.empty_like(one)
        _add[(triton.cdiv(one.numel(), _BLOCK),)](
            one, other, bias.contiguous(), result, one.numel(), one.shape[1], BLOCK=_BLOCK
        )
        ctx.dtypes = other.dtype, bias.dtype
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        of_other, of_bias = ctx.dtypes
        bias = grad.sum((0, 2, 3), dtype=torch.float32).to(of_bias) if ctx.needs_input_grad[2] else None
        return grad, grad.to(of_other), bias


@triton.jit
def _add(one, other, bias, result, count, channels, BLOCK: tl.constexpr):
    """BLOCK numbers of the sum; channels are next to each other in memory. Adds in fp32."""
    # int64: large batches of large pictures have more than 2³¹ numbers.
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = where < count
    total = tl.load(one + where, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(other + where, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(bias + where % channels, mask=mask, other=0.0).to(tl.float32)
    tl.store(result + where, total.to(result.dtype.element_ty), mask=mask)
