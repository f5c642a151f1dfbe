"""LoRA layers without their wrapper's cost: peft's parameters and formula, in the base's precision and fewer passes.

peft casts each layer's input to the matrices' fp32 and back again, and adds the change in passes of its own. Knows peft's
layers; does not know training.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn


def make_lean(module: nn.Module) -> None:
    """Have every LoRA layer in `module` compute W x + s B (A x) in the dtype of its input.

    The matrices stay fp32 parameters; only what they are multiplied as is cast. For one adapter without dropout.
    """
    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.forward = MethodType(_linear, layer)
        elif isinstance(layer, Conv2d):
            layer.forward = MethodType(_convolution, layer)


def _matrices(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A, and B times the scale."""
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight.to(dtype), (layer.lora_B[name].weight * layer.scaling[name]).to(dtype)


def _linear(layer: Any, x: Tensor, *_: Any) -> Tensor:
    base = layer.base_layer
    plain = F.linear(x, base.weight, base.bias)
    if layer.disable_adapters:
        return plain
    down, up = _matrices(layer, x.dtype)
    return plain + F.linear(F.linear(x, down), up)


def _convolution(layer: Any, x: Tensor, *_: Any) -> Tensor:
    base = layer.base_layer
    plain = base(x)
    if layer.disable_adapters:
        return plain
    down, up = _matrices(layer, x.dtype)
    low = F.conv2d(x, down, None, base.stride, base.padding, base.dilation, base.groups)
    return plain + F.conv2d(low, up)
