"""The gradient of the GEGLU in transformer blocks' feed-forward layers, in one pass over memory (Triton).

torch.compile computes both halves of the gradient for every number of it and keeps one, at half of memory's speed. Knows the
function; does not know models.

y = a · gelu(b) for x = [a, b] (arXiv:2002.05202): ∂L/∂a = g gelu(b), ∂L/∂b = g a (Φ(b) + b φ(b)), Φ and φ the normal
distribution and its density.
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


def geglu(both: Tensor) -> Tensor:
    """a · gelu(b) on CUDA for [..., 2n] = [a, b], with the gradient that is written here."""
    return _geglu(both) if torch.is_grad_enabled() else _product(both)


def _product(both: Tensor) -> Tensor:
    plain, gate = both.chunk(2, dim=-1)
    return plain * F.gelu(gate)


# As operators, not as an autograd.Function: what torch has compiled of those it forgets when the process ends.
@torch.library.triton_op("sdxl::geglu", mutates_args=())
def _geglu(both: Tensor) -> Tensor:
    return _product(both)


@torch.library.triton_op("sdxl::geglu_gradient", mutates_args=())
def _geglu_gradient(both: Tensor, grad: Tensor) -> Tensor:
    both, grad = both.contiguous(), grad.contiguous()
    result = torch.empty_like(both)
    width = grad.shape[-1]
    torch.library.wrap_triton(_gradient)[(grad.numel() // width, triton.cdiv(width, _BLOCK))](
        both,
        grad,
        result,
        width,
        BLOCK=_BLOCK,  # CUDA's second axis ends at 65535
    )
    return result


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return _geglu_gradient(ctx.saved_tensors[0], grad)


_geglu.register_autograd(_backward, setup_context=_keep)


@triton.jit
def _gradient(both, grad, result, width, BLOCK: tl.constexpr):
    """One row's stretch of both halves."""
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    there = cols < width
    g = tl.load(grad + row * width + cols, mask=there, other=0.0).to(tl.float32)
    first = row * 2 * width + cols
    a = tl.load(both + first, mask=there, other=0.0).to(tl.float32)
    b = tl.load(both + first + width, mask=there, other=0.0).to(tl.float32)
    below = 0.5 * (1 + tl.erf(b * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * b * b)
    tl.store(result + first, (g * b * below).to(result.dtype.element_ty), mask=there)
    tl.store(result + first + width, (g * a * (below + b * density)).to(result.dtype.element_ty), mask=there)
