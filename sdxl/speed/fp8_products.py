"""Multiply by the frozen linear layers of a UNet's transformer blocks in 8-bit floats, forward and backward, to train faster.

The numbers are e4m3 (arXiv:2209.05433), and sums are in higher precision. Each row of an input, of a gradient and of a weight
has a scale of its own, so gradients of any size are rounded alike. The backward pass multiplies by the weight's columns: these
are rounded once more, because a scale must not vary along a sum.

The layers keep their weights too, because everything else that reads a weight expects it in its own precision. Knows layers;
does not know what trains.
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdxl.speed.fp8 import FP8, LARGEST, layers_for_fp8
from sdxl.speed.linear_layers import transformer_blocks

_NAMES = "fp8_rows", "fp8_row_scales", "fp8_columns", "fp8_column_scales"


class Rounded(NamedTuple):
    """A matrix in e4m3."""

    values: Tensor
    """[rows, columns]"""
    scales: Tensor
    """What each row is multiplied by, [rows, 1] in fp32."""


def multiply_in_fp8(unet: UNet2DConditionModel) -> None:
    """Let all linear layers in transformer blocks multiply in fp8, before any of them gets LoRA matrices.

    Keys and values of prompts are left out: a prompt has few tokens, so these products take no time.
    """
    for layer in _layers(unet):
        give_copies(layer)
        layer.forward = MethodType(_forward, layer)


def copies_bytes(unet: UNet2DConditionModel) -> int:
    """The memory that `multiply_in_fp8` takes: two bytes for each weight, beside the scales."""
    return sum(2 * layer.weight.numel() for layer in _layers(unet))


def _layers(unet: UNet2DConditionModel) -> list[nn.Linear]:
    """All but the keys and values of prompts."""
    attentions = [block.attn2 for block in transformer_blocks(unet) if block.attn2 is not None]
    prompts = [layer for one in attentions for layer in (one.to_k, one.to_v) if layer is not None]
    return layers_for_fp8(unet, set(prompts))


def give_copies(layer: nn.Linear) -> None:
    """Register a layer's weight in e4m3 as buffers, which are not saved with it."""
    weight = layer.weight.detach()
    for name, tensor in zip(_NAMES, (*rounded(weight), *rounded(weight.t().contiguous())), strict=True):
        layer.register_buffer(name, tensor, persistent=False)


def copies_of(layer: nn.Linear) -> list[Tensor]:
    """A layer's weight in e4m3: its rows [out, in] and their scales, its columns [in, out] and theirs. Empty if it has none."""
    return [getattr(layer, name) for name in _NAMES] if hasattr(layer, _NAMES[0]) else []


def rounded(matrix: Tensor) -> Rounded:
    """A contiguous `matrix` [rows, columns] in e4m3, in one pass over memory on CUDA."""
    if matrix.is_cuda:
        from sdxl.speed.fp8_rows import rounded_rows

        return Rounded(*rounded_rows(matrix))
    wide = matrix.float()
    scales = wide.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / LARGEST
    return Rounded((wide / scales).clamp(-LARGEST, LARGEST).to(FP8), scales)


def product(x: Rounded, weight: Rounded, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x Wᵀ + b in `dtype`, for x [n, in] and W [out, in]. Of the columns of W it is the gradient of an input."""
    return torch._scaled_mm(
        x.values,
        weight.values.t(),
        scale_a=x.scales,
        scale_b=weight.scales.t(),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=x.values.is_cuda,  # sums of 14 bits: coarse, but finer than what is added
    )


def rows_and_columns(copies: Sequence[Tensor], number: int) -> tuple[Rounded, Rounded]:
    """The rows and the columns of one layer's weight, of the `copies` of several layers after each other."""
    rows, row_scales, columns, column_scales = copies[4 * number : 4 * number + 4]
    return Rounded(rows, row_scales), Rounded(columns, column_scales)


def _forward(layer: Any, x: Tensor) -> Tensor:
    return _product(x.to(layer.weight.dtype), copies_of(layer), layer.bias)


# Operators, so that what stands between rounding and product is not torch.compile's to rearrange.
@torch.library.custom_op("sdxl::fp8_product", mutates_args=())
def _product(x: Tensor, copies: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    rows, _ = rows_and_columns(copies, 0)
    flat = x.reshape(-1, x.shape[-1])
    return product(rounded(flat), rows, bias, x.dtype).view(*x.shape[:-1], -1)


@torch.library.custom_op("sdxl::fp8_product_gradient", mutates_args=())
def _gradient(grad: Tensor, copies: Sequence[Tensor]) -> Tensor:
    _, columns = rows_and_columns(copies, 0)
    flat = grad.reshape(-1, grad.shape[-1])
    return product(rounded(flat), columns, None, grad.dtype).view(*grad.shape[:-1], -1)


@_product.register_fake
def _(x: Tensor, copies: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(copies[0]))


@_gradient.register_fake
def _(grad: Tensor, copies: Sequence[Tensor]) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], len(copies[2]))


def _save(ctx: Any, inputs: tuple[Tensor, Sequence[Tensor], Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    of_x = _gradient(grad, list(ctx.saved_tensors)) if ctx.needs_input_grad[0] else None
    return of_x, [None] * len(ctx.saved_tensors), None


_product.register_autograd(_backward, setup_context=_save)
