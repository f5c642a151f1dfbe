"""Samples of held-out prompts as a sheet, and the share of right colours in them."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tiny_world.captions import held_out_prompts
from tiny_world.models import base_pipeline
from tiny_world.scenes import Scene
from tiny_world.sheets import save_grid
from tiny_world.training import Run
from tiny_world.words import COLOURS


def sample_sheet(
    run: Run, vae: AutoencoderKL, parts: dict[str, nn.Module], *, name: str, n: int, guidance: float = 5.0
) -> dict[str, float]:
    """Sample n held-out prompts in 25 Euler steps, save `<name>.png` and return the shares of right colours."""
    dtype = torch.float16 if run.cuda else torch.float32
    pipeline = base_pipeline(vae, parts["text_encoder"], parts["text_encoder_2"], parts["unet"])
    pipeline = pipeline.to(run.device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    pairs = held_out_prompts(n, seed=0)
    images = pipeline(
        prompt=[prompt for prompt, _ in pairs],
        num_inference_steps=25 if not run.smoke else 2,
        guidance_scale=guidance,
        height=256,
        width=256,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="pt",
    ).images.float()
    save_grid(images, run.fetch / f"{name}.png", columns=8, captions=[prompt for prompt, _ in pairs])
    return colour_shares(images, [scene for _, scene in pairs])


def colour_shares(images: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """The share of pictures with the right background colour at the border, and with the object's colour elsewhere.

    images: [n, 3, h, w] in 0..1. This is a crude measure. Every pixel counts as the nearest of the 12 named colours, so
    shades in patterns count as their neighbours. Only plain backgrounds count.
    """
    names = list(COLOURS)
    table = torch.tensor([COLOURS[name] for name in names])
    background, thing, counted = 0, 0, 0
    for image, scene in zip(images.cpu(), scenes, strict=True):
        if scene.texture != "plain" or scene.colour is None:
            continue
        counted += 1
        nearest = torch.cdist(image.permute(1, 2, 0).reshape(-1, 3), table).argmin(1).view(image.shape[1:])
        border = torch.cat([nearest[:8].flatten(), nearest[-8:].flatten(), nearest[:, :8].flatten()])
        background += names[int(border.bincount().argmax())] == scene.background
        rest = nearest[nearest != names.index(scene.background)]
        thing += len(rest) > 0 and int(rest.bincount().argmax()) == names.index(scene.colour)
    share = max(counted, 1)
    return {
        "plain": counted,
        "background_colour": round(background / share, 3),
        "object_colour": round(thing / share, 3),
    }
