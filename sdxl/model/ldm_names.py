"""The names and shapes of SDXL's weights in single-file checkpoints.

Stability AI's own code, built on latent diffusion (LDM), gives other names to the parts that diffusers has: its UNet
numbers all residual blocks and samplers of a side consecutively, its second text encoder is open_clip's. Knows names and
shapes; does not know files.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
"""What the names of each part begin with."""

_UNET_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_CLIP_G_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_CLIP_G_REST = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_FUSED = re.compile(r"(?P<layer>transformer\.resblocks\.\d+\.attn\.in_proj_)(?P<kind>weight|bias)")
_Q_K_V = re.compile(
    r"encoder\.layers\.(?P<layer>\d+)\.self_attn\.(?P<which>[qkv])_proj\.(?P<kind>weight|bias)"
)


def unet_names(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Name of a UNet's layer or parameter in diffusers, such as "down_blocks.1.attentions.0.proj_in" → its name in LDM,
    here "input_blocks.4.1.proj_in". Names of no block are left out.

    config: the UNet's configuration in diffusers.
    """
    return _renamed(names, _unet_blocks(config), lambda block: _UNET_RESNET if ".resnets." in block else {})


def vae_names(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The same for the autoencoder: "decoder.mid_block.resnets.0.conv1" → "decoder.mid.block_1.conv1"."""

    def inner(block: str) -> Mapping[str, str]:
        return _VAE_ATTENTION if ".attentions." in block else {"conv_shortcut": "nin_shortcut"}

    return _renamed(names, _vae_blocks(config), inner)


def _renamed(
    names: Iterable[str], blocks: Mapping[str, str], inner: Callable[[str], Mapping[str, str]]
) -> dict[str, str]:
    """Name → the alias of its block, with the alias of the layer inside it."""
    found = {}
    for name in names:
        block = next((block for block in _beginnings(name) if block in blocks), None)
        if block is None:
            continue
        rest = name[len(block) :].removeprefix(".")
        for layer, alias in inner(block).items():
            if rest == layer or rest.startswith(f"{layer}."):
                rest = alias + rest[len(layer) :]
                break
        found[name] = f"{blocks[block]}.{rest}".removesuffix(".")
    return found


def _beginnings(name: str) -> Iterable[str]:
    """`name`, and each shorter name of a module around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _unet_blocks(config: Mapping[str, Any]) -> dict[str, str]:
    blocks, layers = len(config["block_out_channels"]), config["layers_per_block"]
    aliases = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    index = 1
    for block in range(blocks):
        for layer in range(layers):
            aliases[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{index}.0"
            aliases[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{index}.1"
            index += 1
        aliases[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
        index += 1
    index = 0
    for block, kind in enumerate(config["up_block_types"]):
        for layer in range(layers + 1):
            aliases[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{index}.0"
            aliases[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{index}.1"
            index += 1
        place = 2 if "Attn" in kind else 1  # an upsampler follows the attention, if there is any
        aliases[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{index - 1}.{place}.conv"
    return aliases


def _vae_blocks(config: Mapping[str, Any]) -> dict[str, str]:
    aliases = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    blocks, layers = len(config["block_out_channels"]), config["layers_per_block"]
    for side in ("encoder", "decoder"):
        aliases |= {
            f"{side}.conv_in": f"{side}.conv_in",
            f"{side}.conv_norm_out": f"{side}.norm_out",
            f"{side}.conv_out": f"{side}.conv_out",
            f"{side}.mid_block.resnets.0": f"{side}.mid.block_1",
            f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1",
            f"{side}.mid_block.resnets.1": f"{side}.mid.block_2",
        }
    for block in range(blocks):
        down, up = f"encoder.down.{block}", f"decoder.up.{blocks - 1 - block}"
        aliases[f"encoder.down_blocks.{block}.downsamplers.0.conv"] = f"{down}.downsample.conv"
        aliases[f"decoder.up_blocks.{block}.upsamplers.0.conv"] = f"{up}.upsample.conv"
        for layer in range(layers):
            aliases[f"encoder.down_blocks.{block}.resnets.{layer}"] = f"{down}.block.{layer}"
        for layer in range(layers + 1):
            aliases[f"decoder.up_blocks.{block}.resnets.{layer}"] = f"{up}.block.{layer}"
    return aliases


# Values --------------------------------------------------------------------------------------------------------------


def vae_to_ldm(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """An autoencoder's weights with LDM's names. Its attention has convolutions there: [out, in] becomes [out, in, 1, 1]."""
    found = {}
    for name, alias in vae_names(weights, config).items():
        value = weights[name]
        found[alias] = value[:, :, None, None] if _is_vae_matrix(name) else value
    return found


def vae_from_ldm(
    weights: Mapping[str, Tensor], names: Iterable[str], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The inverse of `vae_to_ldm`, for the parameters `names` of diffusers; those that are missing are left out."""
    return {
        name: weights[alias].flatten(1) if _is_vae_matrix(name) else weights[alias]
        for name, alias in vae_names(names, config).items()
        if alias in weights
    }


def _is_vae_matrix(name: str) -> bool:
    return ".attentions." in name and re.search(r"\.to_(q|k|v|out\.0)\.weight$", name) is not None


def clip_g_to_ldm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The second text encoder's weights as open_clip has them: q, k and v fused, and the projection transposed.

    weights: parameters of transformers' `CLIPTextModelWithProjection`, with or without its level `text_model`.
    """
    found = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for full, value in weights.items():
        name = full.removeprefix("text_model.")
        if match := _Q_K_V.fullmatch(name):
            alias = f"transformer.resblocks.{match['layer']}.attn.in_proj_{match['kind']}"
            fused.setdefault(alias, {})[match["which"]] = value
        elif name == "text_projection.weight":
            found["text_projection"] = value.T.contiguous()
        elif alias := _clip_g_name(name):
            found[alias] = value
    return found | {alias: torch.cat([parts[which] for which in "qkv"]) for alias, parts in fused.items()}


def clip_g_from_ldm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `clip_g_to_ldm`, without the level `text_model`. Names of no parameter are left out."""
    names = {alias: name for name, alias in _CLIP_G_REST.items()}
    inner = {alias: name for name, alias in _CLIP_G_LAYER.items()}
    found = {}
    for alias, value in weights.items():
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)", alias)
        if match := _FUSED.fullmatch(alias):
            prefix = (
                match["layer"]
                .removesuffix("attn.in_proj_")
                .replace("transformer.resblocks", "encoder.layers")
            )
            for which, part in zip("qkv", value.chunk(3), strict=True):
                found[f"{prefix}self_attn.{which}_proj.{match['kind']}"] = part.contiguous()
        elif alias == "text_projection":
            found["text_projection.weight"] = value.T.contiguous()
        elif alias in names:
            found[names[alias]] = value
        elif layer and layer[2] in inner:
            found[f"encoder.layers.{layer[1]}.{inner[layer[2]]}.{layer[3]}"] = value
    return found


def _clip_g_name(name: str) -> str | None:
    if name in _CLIP_G_REST:
        return _CLIP_G_REST[name]
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None or match[2] not in _CLIP_G_LAYER:
        return None
    return f"transformer.resblocks.{match[1]}.{_CLIP_G_LAYER[match[2]]}.{match[3]}"
