"""Read whole weights, as single-file checkpoints and folders of diffusers hold them: parameter of the base → new value.

Knows what such files hold; does not know LoRAs or pipelines.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor

from sdxl.errors import WeightsError, shortened
from sdxl.model.layer_names import LayerNames
from sdxl.model.ldm_names import CLIP_G, UNET, VAE, clip_g_from_ldm
from sdxl.model.other_models import looks_like

log = logging.getLogger(__name__)

_UNET_PREFIXES = ("", UNET, "unet.", "diffusion_model.")
_FIRST_LAYERS = ("conv_in.weight", "input_blocks.0.0.weight")
"""A parameter that every UNet has, in diffusers and in LDM."""
_PARTS = ("unet.", UNET, "diffusion_model.", "conditioner.", "text_encoder.", "text_encoder_2.")
"""What the names of parameters begin with that are taken from a file of several parts."""
_NO_PARAMETERS = ("position_ids", "logit_scale", "text_model.text_projection")
"""Endings of names that text encoders save, and that are no parameters of them."""


class Shaped(Protocol):
    """A parameter of the base."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def has_unet(keys: Iterable[str]) -> bool:
    """Whether a file with these keys holds a whole UNet, alone or in a checkpoint."""
    known = set(keys)
    return any(prefix + layer in known for prefix in _UNET_PREFIXES for layer in _FIRST_LAYERS)


def read_whole(
    tensors: Mapping[str, Tensor],
    part: str,
    names: LayerNames,
    parameters: Mapping[str, Shaped],
    file: str,
) -> dict[str, Tensor]:
    """Return parameter of the base, such as "unet.conv_in.weight" → its new value.

    An autoencoder in a checkpoint is left out, with a warning: all fine-tunes share the base's.

    part: what names without a prefix belong to: "unet", "text_encoder" or "text_encoder_2".
    parameters: all of the base, by name.
    file: its name in errors.

    Raises:
        WeightsError: a parameter that the base does not have, or has in another shape.
    """
    if any(key.startswith(VAE) for key in tensors):
        log.warning("%s holds an autoencoder, which is not used: the base's decodes all pictures", file)
    whole = {}
    for key, value in _of_parts(tensors, part, file).items():
        name = key if key in parameters else _parameter(key, names)
        if name not in parameters:
            guess = looks_like({key: value.shape for key, value in tensors.items()})
            raise WeightsError(
                f"{file} holds {shortened(key)}, which is no parameter of this base{guess}: give a fine-tune of SDXL."
            )
        shape = parameters[name].shape
        # A projection may be saved as a convolution.
        fitting = (
            value.flatten(1) if value.ndim == 4 and value.shape[2:] == (1, 1) and len(shape) == 2 else value
        )
        if fitting.shape != shape:
            raise WeightsError(
                f"{file} does not fit this base (at {name}){looks_like({key: value.shape})}: use the base that it was "
                "trained on."
            )
        whole[name] = fitting
    return whole


def _of_parts(tensors: Mapping[str, Tensor], part: str, file: str) -> dict[str, Tensor]:
    """The tensors of the UNet and the text encoders, with names that `LayerNames` knows."""
    if not any(key.startswith(_PARTS) for key in tensors):
        return {f"{part}.{key}": value for key, value in tensors.items() if not key.endswith(_NO_PARAMETERS)}
    try:
        second = clip_g_from_ldm(
            {key.removeprefix(CLIP_G): value for key, value in tensors.items() if key.startswith(CLIP_G)}
        )
    except (RuntimeError, ValueError, IndexError) as error:  # of fused weights that cannot be split in three
        raise WeightsError(f"{file} has a damaged second text encoder: download it again.") from error
    found = {f"text_encoder_2.{name}": value for name, value in second.items()}
    for key, value in tensors.items():
        if key.startswith(_PARTS) and not key.startswith(CLIP_G) and not key.endswith(_NO_PARAMETERS):
            found[key] = value
    return found


def _parameter(key: str, names: LayerNames) -> str:
    layer, _, kind = key.rpartition(".")
    return f"{names.find(layer)}.{kind}"
