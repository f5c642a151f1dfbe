"""Compile a UNet's repeated blocks instead of all of it: seconds in the place of minutes, for most of the gain.

Knows torch.compile; does not know training or requests.
"""

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D


def compile_blocks(unet: UNet2DConditionModel, *, fullgraph: bool = True) -> None:
    """Have the transformer and residual blocks compiled when they are first called with a shape.

    Blocks that are alike share their kernels. torch counts the shapes of all blocks of a class together and gives up, with
    an error, at its limit of 8; here every shape of pictures takes several.
    """
    torch._dynamo.config.recompile_limit = 1024  # type: ignore[attr-defined]
    torch._dynamo.config.accumulated_recompile_limit = 4096  # type: ignore[attr-defined]
    unet.compile_repeated_blocks(fullgraph=fullgraph, dynamic=False)
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.compile(fullgraph=fullgraph, dynamic=False)
