"""Run diffusers' residual and transformer blocks on CUDA with fewer passes over memory.

These blocks are limited by memory bandwidth, not by arithmetic: each pass that is saved is time that is saved. A UNet's
residual blocks have a dozen shapes, which would dominate the time of torch.compile; these hand-written kernels serve every
shape. Knows diffusers' blocks; does not know training or requests.
"""

from types import MethodType
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from sdxl.speed.geglu import geglu
from sdxl.speed.group_norm import group_norm
from sdxl.speed.residual_sum import residual_sum


def fuse(model: nn.Module) -> None:
    """Use channels-last convolutions and hand-written kernels in a UNet or an autoencoder.

    Replaces only the forward methods of blocks: modules, parameters and names stay.
    """
    # Convolutions on tensor cores compute with channels last. A model in that layout needs no transposes around them.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # peft's DoRA needs contiguous matrices, also for convolutions
            parameter.data = parameter.data.contiguous()

    for module in model.modules():
        if isinstance(module, ResnetBlock2D) and _is_plain(module):
            module.forward = MethodType(_residual_block, module)
        elif isinstance(module, Transformer2DModel) and isinstance(
            getattr(module, "norm", None), nn.GroupNorm
        ):
            module.norm.forward = MethodType(_norm_without_silu, module.norm)
            if module.use_linear_projection:
                module._get_output_for_continuous_inputs = MethodType(_transformer_output, module)
        elif isinstance(module, GEGLU):
            module.forward = MethodType(_geglu, module)
        # The model itself, or an autoencoder's encoder and decoder.
        elif isinstance(norm := getattr(module, "conv_norm_out", None), nn.GroupNorm):
            norm.forward = MethodType(_norm_without_silu, norm)


def _is_plain(block: ResnetBlock2D) -> bool:
    """Whether the block is of SDXL's kind; `_residual_block` supports no other."""
    return (
        block.upsample is None
        and not block.skip_time_act
        and block.downsample is None
        and (block.time_emb_proj is None or block.time_embedding_norm == "default")
        and isinstance(block.nonlinearity, nn.SiLU)
    )


def _residual_block(block: Any, x: Tensor, temb: Tensor | None = None) -> Tensor:
    """The forward of `ResnetBlock2D`, for x [n, c, h, w] and the time embedding temb [n, dim]."""
    hidden, added = group_norm(x, block.norm1, silu=True), None

    # The time embedding and the bias of conv1 add one number to each channel. Add them to each other first, as [n, c], and
    # let the second norm add the sum while it reads its input: two passes over [n, c, h, w] fewer.
    if temb is not None and block.time_emb_proj is not None:
        added = block.time_emb_proj(block.nonlinearity(temb))
    hidden, bias = _without_bias(block.conv1, hidden)
    if bias is not None:
        added = bias.expand(len(x), -1) if added is None else added + bias
    hidden = block.dropout(group_norm(hidden, block.norm2, silu=True, added=added))

    # The same for the biases of conv2 and of the shortcut: they are added with the two branches.
    hidden, bias = _without_bias(block.conv2, hidden)
    if block.conv_shortcut is not None:
        x, another = _without_bias(block.conv_shortcut, x)
        bias = another if bias is None else bias if another is None else bias + another
    total = x + hidden if bias is None else residual_sum(hidden, x, bias)
    return total / block.output_scale_factor if block.output_scale_factor != 1 else total


def _without_bias(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The convolution's result without its bias, and the bias that the caller must add; None if it is added already."""
    # A convolution that peft has wrapped in a LoRA adds its bias itself.
    if isinstance(layer, nn.Conv2d) and layer.bias is not None:
        return layer._conv_forward(x, layer.weight, None), layer.bias
    return layer(x), None


def _norm_without_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return group_norm(x, norm, silu=False)


def _transformer_output(
    block: Any,
    *,
    hidden_states: Tensor,
    residual: Tensor,
    batch_size: int,
    height: int,
    width: int,
    inner_dim: int,
) -> Tensor:
    """The end of `Transformer2DModel.forward`, for hidden_states [n, h·w, c].

    Its result stays in channels-last layout; diffusers' own version copies it to channels first.
    """
    hidden = block.proj_out(hidden_states)
    return hidden.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2) + residual


def _geglu(layer: Any, x: Tensor) -> Tensor:
    return geglu(layer.proj(x))
