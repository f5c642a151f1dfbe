"""Which layers of a UNet may multiply in 8 bits. Knows diffusers' UNet; does not know how they multiply."""

from collections.abc import Iterator

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import nn


def transformer_blocks(unet: UNet2DConditionModel) -> Iterator[BasicTransformerBlock]:
    """All transformer blocks."""
    return (block for block in unet.modules() if isinstance(block, BasicTransformerBlock))


def linear_layers(unet: UNet2DConditionModel) -> Iterator[nn.Linear]:
    """All linear layers in transformer blocks, which have 85 % of SDXL's weights."""
    for block in transformer_blocks(unet):
        yield from (layer for layer in block.modules() if isinstance(layer, nn.Linear))
