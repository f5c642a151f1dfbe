"""Hold the frozen linear layers of a UNet's transformer blocks in 8-bit integers: half the memory of bf16.

Each row of a weight has a scale, as in LLM.int8() (arXiv:2208.07339), but inputs stay as they are: a product multiplies by
the weight in the input's precision, which exists only during the product. Knows layers; does not know what trains.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdxl.speed.linear_layers import linear_layers

_LARGEST = 127


def hold_in_int8(unet: UNet2DConditionModel) -> None:
    """Replace the weights of all linear layers in transformer blocks, before any of them gets LoRA matrices.

    The layers keep their names and their forward's dtype. Nothing in them takes gradients any longer.
    """
    for layer in linear_layers(unet):
        values, scale = rounded(layer.weight.detach())
        layer.weight = nn.Parameter(values, requires_grad=False)
        layer.register_buffer("int8_scale", scale, persistent=False)
        layer.forward = MethodType(_forward, layer)


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as integers of int8, and the scale [out] in the weight's dtype that each row is multiplied by."""
    # The scale is rounded first, so that its rounding does not become an error of whole rows.
    scale = (weight.abs().amax(dim=1).float().clamp_min(1e-12) / _LARGEST).to(weight.dtype)
    values = (weight.float() / scale.float()[:, None]).round_().clamp_(-_LARGEST, _LARGEST)
    return values.to(torch.int8), scale


def scale_of(layer: nn.Linear) -> Tensor | None:
    """The scale of a layer that is held in int8; None if it is not."""
    return getattr(layer, "int8_scale", None)


def product_dtype(layer: nn.Linear) -> torch.dtype:
    """The dtype in which the layer multiplies."""
    scale = scale_of(layer)
    return layer.weight.dtype if scale is None else scale.dtype


def restored(weight: Tensor, scale: Tensor) -> Tensor:
    """The weight [out, in] in the dtype of its scale [out]."""
    return weight * scale[:, None]


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    scale: Any = layer.int8_scale
    product = _product(x.to(scale.dtype), layer.weight, scale)
    return product if layer.bias is None else product + layer.bias


# Operators, so that autograd keeps the integers for the backward pass and not the restored weight.
@torch.library.custom_op("sdxl::int8_product", mutates_args=())
def _product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, restored(weight, scale))


@torch.library.custom_op("sdxl::int8_product_gradient", mutates_args=())
def _gradient(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return grad @ restored(weight, scale)


@_product.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@_gradient.register_fake
def _(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_x = _gradient(grad, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
    return of_x, None, None


_product.register_autograd(_backward, setup_context=_save)
