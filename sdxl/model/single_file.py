"""Write a whole SDXL as one file, with the names of Stability AI's own code (LDM): UNet, autoencoder, both text encoders.

Knows how parts are named and stored in such a checkpoint; does not know how a fine-tune came about.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdxl.files.weight_writing import write_weights
from sdxl.model.components import incomplete_base_named, weights_variant_of
from sdxl.model.ldm_names import CLIP_G, CLIP_L, UNET, VAE, clip_g_to_ldm, unet_names, vae_to_ldm
from sdxl.model.web_ui_metadata import About, checkpoint_metadata


def write_checkpoint(
    path: Path,
    unet: Mapping[str, Tensor],
    unet_config: Mapping[str, Any],
    base: Path,
    about: About,
    *,
    vae: Path,
    encoders: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the checkpoint `path`, in fp16, atomically. Token rows have no place in it.

    unet: every parameter of the UNet, under diffusers' names.
    unet_config: the UNet's configuration in diffusers.
    base: folder in diffusers' layout, from which the text encoders are taken as they are stored.
    vae: folder of the autoencoder.
    encoders: parameters of text encoders that differ from the base's, such as
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.weight" → value.

    Raises:
        WeightsError: a part of the base is missing or damaged.
    """
    changed = encoders or {}
    with incomplete_base_named(base):
        autoencoder = _part(AutoencoderKL, vae)
        first = _part(CLIPTextModel, base / "text_encoder")
        second = _part(CLIPTextModelWithProjection, base / "text_encoder_2")
    aliases = unet_names(unet, unet_config)
    assert aliases.keys() == unet.keys(), "every parameter of SDXL's UNet has a name in LDM"
    tensors = {UNET + alias: unet[name] for name, alias in aliases.items()}
    tensors |= {
        VAE + name: value for name, value in vae_to_ldm(autoencoder.state_dict(), autoencoder.config).items()
    }
    tensors |= {CLIP_L + name: value for name, value in _encoder(first, "text_encoder", changed).items()}
    tensors |= {
        CLIP_G + name: value
        for name, value in clip_g_to_ldm(_encoder(second, "text_encoder_2", changed)).items()
    }
    tensors = {name: value.to("cpu", torch.float16) for name, value in tensors.items()}

    # Readers take the mere presence of these as a statement about the model.
    if about.v_prediction:
        tensors["v_pred"] = torch.tensor([])
    if about.zero_snr:
        tensors["ztsnr"] = torch.tensor([])
    write_weights(path, tensors, checkpoint_metadata(about))


def _part(kind: Any, folder: Path) -> Any:
    """One part of the base, on the CPU in half precision."""
    return kind.from_pretrained(
        folder,
        variant=weights_variant_of(folder),
        dtype=torch.float16,
        use_safetensors=True,
    )


def _encoder(encoder: Any, part: str, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's weights without the level `text_model`, which transformers uses in only one of them."""
    weights = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    for full, value in changed.items():
        owner, _, name = full.partition(".")
        if owner == part:
            weights[name.removeprefix("text_model.")] = value
    return {name: value for name, value in weights.items() if not name.endswith("position_ids")}
