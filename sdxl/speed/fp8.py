"""Multiply the linear layers of a UNet's transformer blocks in 8-bit floating point, to draw faster.

The numbers are e4m3 (arXiv:2209.05433). Weights have one scale per layer. Inputs have a fixed scale: finding their maximum
would cost another pass over memory. Values out of range are clipped, and sums are in higher precision.

The layers keep their half-precision weights too, because fine-tunes are applied to those. Knows layers; does not know
requests.
"""

from collections.abc import Collection
from types import MethodType

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdxl.speed.linear_layers import linear_layers

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
_MULTIPLE = 16
"""Both sides of a weight must be a multiple of this for fp8 products on the GPU."""
_INPUT_SCALE = 4.0
"""Covers inputs up to 4 · 448 = 1792. Rounding becomes coarser below 4 / 64 = 1/16; normalised inputs are about 1."""


def is_supported(device: torch.device) -> bool:
    """Whether the GPU can multiply in fp8, as compute capability 8.9 and higher can."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def layers_for_fp8(unet: UNet2DConditionModel, except_layers: Collection[nn.Module]) -> list[nn.Linear]:
    """The linear layers in transformer blocks whose sizes allow fp8, except `except_layers`."""
    return [
        layer
        for layer in linear_layers(unet)
        if layer not in except_layers and not any(side % _MULTIPLE for side in layer.weight.shape)
    ]


class Fp8Layers:
    """The linear layers of a UNet that multiply in fp8 from now on.

    On a GPU they do so only inside compiled blocks: the compiler fuses the rounding of an input with the operation that
    produces it. Eager calls keep half precision.
    """

    def __init__(self, unet: UNet2DConditionModel, *, except_layers: Collection[nn.Module] = ()) -> None:
        """Replace the forward of all linear layers in transformer blocks except `except_layers`."""
        self._layers = layers_for_fp8(unet, except_layers)
        for layer in self._layers:
            values, scale = quantise(layer.weight.detach())
            layer.register_buffer("fp8_weight", values, persistent=False)
            layer.register_buffer("fp8_scale", scale, persistent=False)
            layer.register_buffer("fp8_input_scale", torch.full_like(scale, _INPUT_SCALE), persistent=False)
            layer.forward = MethodType(_forward, layer)

    @torch.no_grad()
    def refresh(self) -> None:
        """Quantise the layers' weights again after they changed, in place because CUDA graphs hold the addresses."""
        for layer in self._layers:
            values, scale = quantise(layer.weight)
            layer.fp8_weight.copy_(values)  # type: ignore[operator]
            layer.fp8_scale.copy_(scale)  # type: ignore[operator]


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return `weight` / scale in fp8, and the scale, a tensor without dimensions."""
    scale = weight.abs().amax().float().clamp_min(1e-12) / LARGEST
    return _to_fp8(weight.float(), scale), scale


def _to_fp8(x: Tensor, scale: Tensor | float) -> Tensor:
    """Divide by `scale`, clip and round; the cast itself would turn large values into NaN."""
    return (x / scale).clamp(-LARGEST, LARGEST).to(FP8)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if x.is_cuda and not torch.compiler.is_compiling():
        return F.linear(x, layer.weight, layer.bias)
    product = torch._scaled_mm(
        _to_fp8(x.flatten(0, -2), _INPUT_SCALE),
        layer.fp8_weight.t(),  # type: ignore[operator]
        scale_a=layer.fp8_input_scale,  # type: ignore[arg-type]
        scale_b=layer.fp8_scale,  # type: ignore[arg-type]
        bias=layer.bias,
        out_dtype=x.dtype,
        use_fast_accum=x.is_cuda,  # faster, and exact enough for pictures
    )
    return product.unflatten(0, x.shape[:-1])
