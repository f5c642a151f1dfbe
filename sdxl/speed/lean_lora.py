"""Compute peft's LoRA layers faster: with peft's parameters and formula, but in the base's precision and in fewer passes.

peft casts each layer's input from half precision to the fp32 of the matrices and the result back. Here the small matrices
are cast instead. In self-attention, queries, keys and values share one input, so their three A matrices are multiplied as
one. On CUDA, `lora_products` adds to large tensors in place. On a CPU a small layer computes (W + s B A) x instead, where that
is less work. Knows peft's layers and diffusers' attention; does not know training.
"""

import math
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn

from sdxl.speed.fp8_products import copies_of
from sdxl.speed.int8_weights import product_dtype, scale_of
from sdxl.speed.lora_products import lora_products

_THIN_COSTS = 2
"""How many times as long a CPU takes for a multiplication in a product with A or B as in one with W, because these are thin."""


def make_lean(module: nn.Module) -> None:
    """Make every LoRA layer in `module` compute W x + s B (A x) in the dtype of W, or of its scale.

    The matrices stay fp32 parameters; each product uses cast copies. Supports one adapter without dropout.
    """
    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.forward = MethodType(_linear, layer)
        elif isinstance(layer, Conv2d):
            layer.forward = MethodType(_convolution, layer)
        elif isinstance(layer, Attention) and not layer.is_cross_attention and _all_lora(layer):
            layer.set_processor(_SelfAttention())  # type: ignore[arg-type]


def _matrices(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [rank, in] and s · B [out, rank]. Scaling B here saves a pass over the much larger result."""
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight.to(dtype), (layer.lora_B[name].weight * layer.scaling[name]).to(dtype)


def _sum_is_faster(layer: Any, rows: int, x: Tensor) -> bool:
    """Whether W + s B A, multiplied with `rows` vectors of `x`, takes a CPU less time in a training step than B (A x) beside W x.

    The sum is then a trained weight, whose gradient is a product of the size of W x. Each of B and A takes part in three
    products: forward, and in the gradients of itself and of what it is multiplied with.
    """
    (name,) = layer.active_adapters
    weight, rank = layer.base_layer.weight, layer.r[name]
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return False
    height, width = len(weight), weight[0].numel()
    apart = 3 * _THIN_COSTS * rank * (height + width) * rows
    return height * width * (rows + 3 * rank) < apart


def _sum(layer: Any) -> Tensor:
    """W + s B A, in the shape of W."""
    (name,) = layer.active_adapters
    weight, down, up = (one.weight for one in (layer.base_layer, layer.lora_A[name], layer.lora_B[name]))
    added = torch.addmm(weight.flatten(1), up.flatten(1), down.flatten(1), alpha=layer.scaling[name])
    return added.view_as(weight)


def _linear(layer: Any, x: Tensor, *_: Any) -> Tensor:
    return _linears([layer], x)[0]


def _linears(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    """The outputs of LoRA layers that share the input x [..., in]. All or none of them have a bias."""
    bases = [layer.base_layer for layer in layers]
    if layers[0].disable_adapters:
        return [base(x) for base in bases]
    if all(_sum_is_faster(layer, x.numel() // x.shape[-1], x) for layer in layers):
        return [F.linear(x, _sum(layer), layer.base_layer.bias) for layer in layers]
    matrices = [_matrices(layer, product_dtype(layer.base_layer)) for layer in layers]
    downs, ups = [down for down, _ in matrices], [up for _, up in matrices]
    # Stack the A matrices [rank, in]: reading x takes longer than these thin products, so read it once for all layers.
    down = torch.cat(downs) if len(downs) > 1 else downs[0]  # cat would copy even a single matrix
    # No `:=` here: before Python 3.12, torch.compile cannot trace one in a comprehension.
    scales = [scale for scale in map(scale_of, bases) if scale is not None]
    copies = [copy for base in bases for copy in copies_of(base)]
    weights, biases = [base.weight for base in bases], [base.bias for base in bases]
    return lora_products(x, weights, biases, down, ups, scales, copies)


def _all_lora(attention: Attention) -> bool:
    """Whether queries, keys and values all have an adapter, and `_SelfAttention` covers everything else in the layer."""
    projections = (attention.to_q, attention.to_k, attention.to_v)
    extra = (attention.group_norm, attention.spatial_norm, attention.norm_q, attention.norm_k)
    return (
        all(isinstance(layer, Linear) for layer in projections)
        and all(norm is None for norm in extra)
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
    )


class _SelfAttention:
    """diffusers' `AttnProcessor2_0` with stacked projections, for hidden_states [b, tokens, dim] without a mask."""

    def __call__(self, attention: Attention, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        layers = (attention.to_q, attention.to_k, attention.to_v)
        projected = _linears(layers, hidden_states)
        query, key, value = (y.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for y in projected)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        assert attention.to_out is not None
        return attention.to_out[1](attention.to_out[0](mixed))  # the projection, then dropout


def _convolution(layer: Any, x: Tensor, *_: Any) -> Tensor:
    """The LoRA of a convolution: A has the base's kernel, stride and padding; B is a convolution with kernel 1."""
    base = layer.base_layer
    rows = x[:, 0].numel() // math.prod(base.stride)
    if not layer.disable_adapters and _sum_is_faster(layer, rows, x):
        return base._conv_forward(x, _sum(layer), base.bias)
    plain = base(x)
    if layer.disable_adapters:
        return plain
    down, up = _matrices(layer, x.dtype)
    low = F.conv2d(x, down, None, base.stride, base.padding, base.dilation, base.groups)
    return plain + F.conv2d(low, up)
