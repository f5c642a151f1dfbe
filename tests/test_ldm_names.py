"""The names of single-file checkpoints, held against diffusers' converters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor

from sdxl.model.components import Components, load_components
from sdxl.model.ldm_names import (
    CLIP_G,
    UNET,
    VAE,
    clip_g_from_ldm,
    clip_g_to_ldm,
    unet_names,
    vae_from_ldm,
    vae_to_ldm,
)


@pytest.fixture(scope="module")
def components(named_base: Path) -> Components:
    return load_components(named_base, is_lora=True, device=torch.device("cpu"))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_unet(components: Components):
    weights = components.unet.state_dict()
    names = unet_names(weights, components.unet.config)
    assert len(set(names.values())) == len(weights)
    theirs = {UNET + alias: weights[name] for name, alias in names.items()}
    assert same(convert_ldm_unet_checkpoint(theirs, dict(components.unet.config)), weights)


def test_autoencoder(components: Components):
    weights = components.vae.state_dict()
    ours = vae_to_ldm(weights, components.vae.config)
    config: Any = dict(components.vae.config)
    theirs = convert_ldm_vae_checkpoint({VAE + name: value for name, value in ours.items()}, config)
    assert same(theirs, weights)
    assert same(vae_from_ldm(ours, weights, components.vae.config), weights)


def test_second_text_encoder(components: Components):
    encoder = components.text_encoders[1]
    weights = encoder.state_dict()
    ours = clip_g_to_ldm(weights)
    theirs = convert_open_clip_checkpoint(encoder, {CLIP_G + n: v for n, v in ours.items()}, CLIP_G)
    assert same(theirs, weights)
    plain = {name.removeprefix("text_model."): value for name, value in weights.items()}
    assert same(clip_g_from_ldm(ours), plain)
