"""Run a UNet on a GPU with fewer and faster kernels: compile its transformer blocks, and fuse the other blocks by hand.

The transformer blocks repeat, so compiling only them takes seconds instead of minutes and brings most of the gain. Knows
torch.compile; does not know training or requests.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from sdxl.speed.triton_here import triton_runs


def compile_blocks(unet: UNet2DConditionModel, *, fullgraph: bool = True, dynamic: bool = False) -> None:
    """Compile the transformer blocks when they first see a shape. Equal blocks share their kernels.

    By default, torch raises an error after 8 compilations of one class. It counts all blocks and shapes together, and each
    picture size takes several compilations, so this function raises the limit.

    dynamic: one compilation serves all sizes of pictures and prompts, and any number of rows above 1; one row is another.
    """
    config: Any = torch._dynamo.config  # type: ignore[attr-defined]
    config.recompile_limit = 1024
    config.accumulated_recompile_limit = 4096
    if dynamic:  # tensors that a module holds, such as a prompt's keys, have any size too
        config.force_nn_module_property_static_shapes = False
    unet.compile_repeated_blocks(fullgraph=fullgraph, dynamic=dynamic)


def uncompiled() -> AbstractContextManager[None]:
    """In this context compiled blocks run uncompiled. A training uses it for calls without gradients, and of other shapes than its
    own, for which blocks would compile anew."""
    return torch.compiler.set_stance("force_eager")


def fuse_blocks(model: nn.Module) -> None:
    """Call `fused_blocks.fuse` if the model is on CUDA and Triton's kernels run there."""
    if next(model.parameters()).is_cuda and triton_runs():
        from sdxl.speed.fused_blocks import fuse

        fuse(model)
