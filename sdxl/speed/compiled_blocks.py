"""Fewer and better kernels on a GPU: a UNet's transformer blocks compiled, the rest of its work fused by hand.

Compiling the repeated blocks instead of all of the UNet takes seconds in the place of minutes, for most of the gain. Knows
torch.compile; does not know training or requests.
"""

import importlib.util

import torch
from diffusers import UNet2DConditionModel
from torch import nn


def compile_blocks(unet: UNet2DConditionModel, *, fullgraph: bool = True) -> None:
    """Have the transformer blocks compiled when they are first called with a shape.

    Blocks that are alike share their kernels. torch counts the shapes of all blocks of a class together and gives up, with
    an error, at its limit of 8; here every shape of pictures takes several.
    """
    torch._dynamo.config.recompile_limit = 1024  # type: ignore[attr-defined]
    torch._dynamo.config.accumulated_recompile_limit = 4096  # type: ignore[attr-defined]
    unet.compile_repeated_blocks(fullgraph=fullgraph, dynamic=False)


def fuse_blocks(model: nn.Module) -> None:
    """`fused_blocks.fuse` for a model on CUDA, where Triton is there: it comes with torch for CUDA on Linux."""
    if next(model.parameters()).is_cuda and importlib.util.find_spec("triton"):
        from sdxl.speed.fused_blocks import fuse

        fuse(model)
