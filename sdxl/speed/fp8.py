"""The linear layers of a UNet's transformer blocks in 8-bit floating point, for drawing on GPUs that multiply it.

Numbers are e4m3 (arXiv:2209.05433): weights with one factor a layer, inputs with a fixed one, so that rounding them costs no
pass over memory of its own. What they cannot hold is clipped; sums are in higher precision. The layers keep their
half-precision weights, in which fine-tunes come and go. Knows layers; does not know requests.
"""

from collections.abc import Collection
from types import MethodType

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

_KIND = torch.float8_e4m3fn
_LARGEST = torch.finfo(_KIND).max
_MULTIPLE = 16
"""What the matrix units want the sides of a weight to be a multiple of."""
_INPUT_SCALE = 4.0
"""Inputs up to 1792 are held; below 1/16, a layer's normalised inputs being about 1, the rounding becomes coarser."""


def is_supported(device: torch.device) -> bool:
    """Whether the GPU multiplies 8-bit floating point: from compute capability 8.9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class Fp8Layers:
    """The layers of a UNet that multiply in fp8 from now on: on a GPU where they are compiled, which makes rounding the
    inputs part of the work before."""

    def __init__(self, unet: UNet2DConditionModel, *, besides: Collection[nn.Module] = ()) -> None:
        """All but `besides`."""
        self._layers = [
            layer
            for block in unet.modules()
            if isinstance(block, BasicTransformerBlock)
            for layer in block.modules()
            if isinstance(layer, nn.Linear)
            and layer not in besides
            and not any(side % _MULTIPLE for side in layer.weight.shape)
        ]
        for layer in self._layers:
            values, scale = quantise(layer.weight.detach())
            layer.register_buffer("fp8_weight", values, persistent=False)
            layer.register_buffer("fp8_scale", scale, persistent=False)
            layer.register_buffer("fp8_input_scale", torch.full_like(scale, _INPUT_SCALE), persistent=False)
            layer.forward = MethodType(_forward, layer)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the layers' weights, which have changed; the fp8 ones stay at their addresses."""
        for layer in self._layers:
            values, scale = quantise(layer.weight)
            layer.fp8_weight.copy_(values)  # type: ignore[operator]
            layer.fp8_scale.copy_(scale)  # type: ignore[operator]


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` in fp8, and the factor, a tensor of no dimensions, that gives it back."""
    scale = weight.abs().amax().float().clamp_min(1e-12) / _LARGEST
    return _rounded(weight.float(), scale), scale


def _rounded(x: Tensor, scale: Tensor | float) -> Tensor:
    return (x / scale).clamp(-_LARGEST, _LARGEST).to(_KIND)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if x.is_cuda and not torch.compiler.is_compiling():
        return F.linear(x, layer.weight, layer.bias)
    product = torch._scaled_mm(
        _rounded(x.flatten(0, -2), _INPUT_SCALE),
        layer.fp8_weight.t(),  # type: ignore[operator]
        scale_a=layer.fp8_input_scale,  # type: ignore[arg-type]
        scale_b=layer.fp8_scale,  # type: ignore[arg-type]
        bias=layer.bias,
        out_dtype=x.dtype,
        use_fast_accum=x.is_cuda,
    )
    return product.unflatten(0, x.shape[:-1])
