"""The products of LoRA layers that share an input: W x + b + B (A x), with few passes over memory.

torch.compile computes W x and B (A x) apart and adds them: it writes and reads the large result once more than needed. As an
operator of ours they are added inside the second product, in place; so are the parts of the gradient of x. Knows matrices;
does not know layers or models.

Forward, for each layer: y = W x + b + B l with l = A x. Backward, with g = ∂L/∂y and h = Bᵀ g: ∂L/∂x = Σ Wᵀ g + Aᵀ h,
∂L/∂A = h xᵀ and ∂L/∂B = g lᵀ. W and b are frozen, and W may be held in int8 or multiply in fp8.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdxl.speed import fp8_products
from sdxl.speed.int8_weights import restored


def lora_products(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    down: Tensor,
    ups: Sequence[Tensor],
    scales: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
) -> list[Tensor]:
    """The outputs [..., out] of several layers for x [..., in], in the dtype of all other tensors.

    weights: W of each layer [out, in], frozen. biases: b of each layer [out], or None for all layers.
    scales: for weights in int8, the scale of each row of each layer [out].
    copies: for products in fp8, `fp8_products.copies_of` of each layer.
    down: the A matrices of all layers below each other [layers · rank, in]. ups: B of each layer [out, rank].
    """
    x = x.to(down.dtype)  # under autocast, a norm's result is fp32
    if x.is_cuda or scales or copies:
        given = [bias for bias in biases if bias is not None]
        return _products(x, list(weights), list(scales), list(copies), given, down, list(ups))[:-1]
    low = F.linear(x, down).split([up.shape[1] for up in ups], dim=-1)
    return [
        F.linear(x, weight, bias) + F.linear(part, up)
        for weight, bias, part, up in zip(weights, biases, low, ups, strict=True)
    ]


# These are operators and not a torch.autograd.Function: torch caches compiled code with operators on disk, but code with an
# autograd.Function only until the process ends.
@torch.library.custom_op("sdxl::lora_products", mutates_args=())
def _products(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    copies: Sequence[Tensor],
    biases: Sequence[Tensor],
    down: Tensor,
    ups: Sequence[Tensor],
) -> list[Tensor]:
    """The outputs, then l [..., layers · rank]. `scales`, `copies` and `biases` are empty if the layers have none."""
    flat = x.reshape(-1, x.shape[-1])
    low = flat @ down.t()
    in_fp8 = fp8_products.rounded(flat) if copies else None
    outputs = []
    for number, part in enumerate(_parts(low, ups)):
        bias = biases[number] if biases else None
        if in_fp8 is not None:
            rows, _ = fp8_products.rows_and_columns(copies, number)
            output = fp8_products.product(in_fp8, rows, bias, x.dtype)
        else:
            output = F.linear(flat, _whole(weights, scales, number), bias)
        outputs.append(output.addmm_(part, ups[number].t()))
    return [tensor.view(*x.shape[:-1], -1) for tensor in (*outputs, low)]


@torch.library.custom_op("sdxl::lora_products_gradient", mutates_args=())
def _gradient(
    grads: Sequence[Tensor],
    x: Tensor,
    low: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    copies: Sequence[Tensor],
    down: Tensor,
    ups: Sequence[Tensor],
    of_x: bool,
) -> list[Tensor]:
    """∂L/∂A, ∂L/∂B of each layer, and if `of_x` ∂L/∂x."""
    flats = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
    flat, low = x.reshape(-1, x.shape[-1]), low.reshape(-1, low.shape[-1])
    lows = [grad @ up for grad, up in zip(flats, ups, strict=True)]
    h = torch.cat(lows, dim=1) if len(lows) > 1 else lows[0]
    of_ups = [grad.t() @ part for grad, part in zip(flats, _parts(low, ups), strict=True)]
    found = [h.t() @ flat, *of_ups]
    if of_x:
        total = _through(flats[0], weights, scales, copies, 0)
        for number in range(1, len(flats)):
            if copies:
                total += _through(flats[number], weights, scales, copies, number)
            else:
                total.addmm_(flats[number], _whole(weights, scales, number))
        found.append(total.addmm_(h, down).view(x.shape))
    return found


def _through(
    grad: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    copies: Sequence[Tensor],
    number: int,
) -> Tensor:
    """Wᵀ g of one layer, for its gradient [rows, out]."""
    if not copies:
        return grad @ _whole(weights, scales, number)
    _, columns = fp8_products.rows_and_columns(copies, number)
    return fp8_products.product(fp8_products.rounded(grad.contiguous()), columns, None, grad.dtype)


def _parts(low: Tensor, ups: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """l of each layer [rows, rank], as views."""
    return low.split([up.shape[1] for up in ups], dim=1)


def _whole(weights: Sequence[Tensor], scales: Sequence[Tensor], number: int) -> Tensor:
    """W of one layer."""
    return restored(weights[number], scales[number]) if scales else weights[number]


# What torch.compile needs to know of the results: their shapes.
_products.register_fake(
    lambda x, weights, scales, copies, biases, down, ups: [
        x.new_empty(*x.shape[:-1], len(matrix)) for matrix in (*weights, down)
    ]
)
_gradient.register_fake(
    lambda grads, x, low, weights, scales, copies, down, ups, of_x: [
        x.new_empty(tensor.shape) for tensor in ((down, *ups, x) if of_x else (down, *ups))
    ]
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, scales, copies, biases, down, ups = inputs
    ctx.layers, ctx.scales, ctx.copies, ctx.biases = len(weights), len(scales), len(copies), len(biases)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[-1], down, *weights, *ups, *scales, *copies)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, low, down, *matrices = ctx.saved_tensors
    weights, ups = matrices[: ctx.layers], matrices[ctx.layers : 2 * ctx.layers]
    given = [
        x.new_zeros(*x.shape[:-1], len(weight)) if grad is None else grad
        for grad, weight in zip(grads[:-1], weights, strict=True)
    ]
    rest = matrices[2 * ctx.layers :]
    scales, copies = rest[: ctx.scales], rest[ctx.scales :]
    of_down, *found = _gradient(given, x, low, weights, scales, copies, down, ups, ctx.needs_input_grad[0])
    of_x = found[ctx.layers] if ctx.needs_input_grad[0] else None
    frozen = [None] * ctx.layers, [None] * ctx.scales, [None] * ctx.copies, [None] * ctx.biases
    return of_x, *frozen, of_down, found[: ctx.layers]


_products.register_autograd(_backward, setup_context=_save)
