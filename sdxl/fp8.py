"""The linear layers of a UNet's transformer blocks in 8-bit floating point, for drawing on GPUs that multiply it.

Weights are scaled by row once, inputs by row as they come (e4m3; arXiv:2209.05433), sums are in higher precision. The
layers keep their half-precision weights, in which fine-tunes come and go. Knows layers; does not know requests.
"""

from types import MethodType

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

_KIND = torch.float8_e4m3fn
_LARGEST = torch.finfo(_KIND).max
_MULTIPLE = 16
"""What the matrix units want the sides of a weight to be a multiple of."""


def is_supported(device: torch.device) -> bool:
    """Whether the GPU multiplies 8-bit floating point: from compute capability 8.9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class Fp8Layers:
    """The layers of a UNet that multiply in fp8 from now on."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._layers = [
            layer
            for block in unet.modules()
            if isinstance(block, BasicTransformerBlock)
            for layer in block.modules()
            if isinstance(layer, nn.Linear) and not any(side % _MULTIPLE for side in layer.weight.shape)
        ]
        for layer in self._layers:
            values, scale = quantise(layer.weight.detach())
            layer.register_buffer("fp8_weight", values, persistent=False)
            layer.register_buffer("fp8_scale", scale, persistent=False)
            layer.forward = MethodType(_forward, layer)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the layers' weights, which have changed; the fp8 ones stay at their addresses."""
        for layer in self._layers:
            values, scale = quantise(layer.weight)
            layer.fp8_weight.copy_(values)  # type: ignore[operator]
            layer.fp8_scale.copy_(scale)  # type: ignore[operator]


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`rows` [n, k] in fp8, and the factors [n, 1] that give them back."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / _LARGEST
    return (rows / scale).clamp(-_LARGEST, _LARGEST).to(_KIND), scale


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    values, scale = quantise(x.flatten(0, -2))
    product = torch._scaled_mm(
        values,
        layer.fp8_weight.t(),  # type: ignore[operator]
        scale_a=scale,
        scale_b=layer.fp8_scale.t(),  # type: ignore[operator]
        out_dtype=torch.bfloat16,  # the only one there is for scales by row
        use_fast_accum=x.device.type == "cuda",
    )
    product = product.to(x.dtype).unflatten(0, x.shape[:-1])
    return product if layer.bias is None else product + layer.bias
