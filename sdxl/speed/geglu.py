"""The gradient of GEGLU, which the feed-forward layers of transformer blocks use, in one pass over memory (Triton).

GEGLU (arXiv:2002.05202) is y = a · gelu(b) for x = [a, b], with gelu(b) = b Φ(b). With g = ∂L/∂y, its gradient is
∂L/∂a = g b Φ(b) and ∂L/∂b = g a (Φ(b) + b φ(b)). Φ and φ are the standard normal distribution and its density.

torch.compile's kernel has one thread per number of ∂L/∂x = [∂L/∂a, ∂L/∂b]. Each computes both formulas and discards one,
which reaches only half of the memory's speed. Here each thread reads a, b and g once and writes both numbers. Knows the
function; does not know models.
"""

# Triton comes with torch for CUDA only.
# pyright: reportMissingImports=false, reportIndexIssue=false

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Numbers of each half that one program handles."""


def geglu(x: Tensor) -> Tensor:
    """a · gelu(b) on CUDA for x [..., 2n] = [a, b], with this module's kernel for the gradient."""
    return _geglu(x) if torch.is_grad_enabled() else _forward(x)


def _forward(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return a * F.gelu(b)


# These are operators and not a torch.autograd.Function: torch caches compiled code with operators on disk, but code with an
# autograd.Function only until the process ends.
@torch.library.triton_op("sdxl::geglu", mutates_args=())
def _geglu(both: Tensor) -> Tensor:
    return _forward(both)


@torch.library.triton_op("sdxl::geglu_gradient", mutates_args=())
def _geglu_gradient(both: Tensor, grad: Tensor) -> Tensor:
    both, grad = both.contiguous(), grad.contiguous()
    result = torch.empty_like(both)

    # One program for each row and stretch of `_BLOCK` columns. Rows are on the first axis, since they can be many and
    # CUDA's second axis ends at 65535.
    width = grad.shape[-1]
    grid = (grad.numel() // width, triton.cdiv(width, _BLOCK))
    torch.library.wrap_triton(_gradient)[grid](both, grad, result, width, BLOCK=_BLOCK)
    return result


def _save_input(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return _geglu_gradient(ctx.saved_tensors[0], grad)


_geglu.register_autograd(_backward, setup_context=_save_input)  # type: ignore[attr-defined]


@triton.jit
def _gradient(both, grad, result, width, BLOCK: tl.constexpr):
    """Write both halves of the gradient for BLOCK columns of one row."""
    # Rows are int64: a row times the width can exceed 2³¹ at large batches.
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    mask = cols < width

    # A row of x is [a, b], so b starts `width` numbers after a. Compute in fp32: erf and exp need the precision.
    g = tl.load(grad + row * width + cols, mask=mask, other=0.0).to(tl.float32)
    first = row * 2 * width + cols
    a = tl.load(both + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(both + first + width, mask=mask, other=0.0).to(tl.float32)

    # Φ(b) = (1 + erf(b / √2)) / 2 and φ(b) = exp(−b² / 2) / √(2π).
    cdf = 0.5 * (1 + tl.erf(b * 0.7071067811865476))
    pdf = 0.3989422804014327 * tl.exp(-0.5 * b * b)
    tl.store(result + first, (g * b * cdf).to(result.dtype.element_ty), mask=mask)
    tl.store(result + first + width, (g * a * (cdf + b * pdf)).to(result.dtype.element_ty), mask=mask)
