"""Single-file checkpoints for tests, made from a base in diffusers' layout."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl.files.part_files import present
from sdxl.model.ldm_names import CLIP_G, CLIP_L, UNET, VAE, clip_g_to_ldm, unet_names, vae_to_ldm


def weights_of(part: Path) -> dict[str, Tensor]:
    """All tensors of one part, without the level `text_model` that some versions of transformers write."""
    files = present(part)
    assert files is not None
    tensors: dict[str, Tensor] = {}
    for file in files.weights:
        tensors |= load_file(part / file)
    return {name.removeprefix("text_model."): value for name, value in tensors.items()}


def checkpoint(base: Path) -> dict[str, Tensor]:
    """The tensors of the single-file checkpoint of a base."""
    unet, vae = weights_of(base / "unet"), weights_of(base / "vae")
    configs = {part: json.loads((base / part / "config.json").read_text()) for part in ("unet", "vae")}
    parts: dict[str, Mapping[str, Tensor]] = {
        UNET: {alias: unet[name] for name, alias in unet_names(unet, configs["unet"]).items()},
        VAE: vae_to_ldm(vae, configs["vae"]),
        CLIP_L: weights_of(base / "text_encoder"),
        CLIP_G: clip_g_to_ldm(weights_of(base / "text_encoder_2")),
    }
    return {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}


def write(target: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Save tensors, some of which may share memory."""
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, target, metadata)
    return target


EXTRA = {
    f"{CLIP_L}embeddings.position_ids": torch.arange(77)[None],
    f"{CLIP_G}logit_scale": torch.tensor(4.6),
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.diffusion_modelout2weight": torch.zeros(4, 32, 3, 3),
    "cond_stage_model.logit_scale": torch.tensor(4.6),
    "alphas_cumprod": torch.linspace(1, 0, 1000),
    "denoiser.sigmas": torch.zeros(1000),
}
"""Tensors that checkpoints carry and no part has."""
