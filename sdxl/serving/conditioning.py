"""Prompts and sizes as the base's and the refiner's UNet take them.

Knows text encoders and SDXL's time ids; does not know latents or samplers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sdxl.errors import WeightsError
from sdxl.serving.denoising import Conditioning

AESTHETIC_SCORES = (2.5, 6.0)
"""The aesthetic score that the refiner gets with the negative prompt and with the prompt (arXiv:2307.01952)."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What to encode for a batch of pictures."""

    prompt: str
    """The prompt, with its tokens replaced by placeholder tokens."""
    negative_prompt: str
    """May be empty."""
    guidance_scale: float
    guidance_rescale: float
    count: int
    """Pictures in the batch."""
    size: tuple[int, int]
    """(height, width) in pixels."""
    device: torch.device


def for_base(pipeline: Any, prompts: Prompts) -> Conditioning:
    """The conditioning of the base. An empty negative prompt becomes zeros, as in the training of SDXL."""
    sizes = (*prompts.size, 0, 0, *prompts.size)
    return _encode(pipeline, prompts, prompts.negative_prompt or None, (sizes, sizes))


def for_refiner(pipeline: Any, refiner: UNet2DConditionModel, prompts: Prompts) -> Conditioning:
    """The conditioning of the refiner: hidden states of only the second text encoder, and time ids that end with an
    aesthetic score.

    The refiner was not trained with zeroed prompts: an empty negative prompt is encoded as text.

    Raises:
        WeightsError: the refiner takes hidden states of another width.
    """
    width, given = int(refiner.config["cross_attention_dim"]), pipeline.text_encoder_2.config.hidden_size
    if width != given:
        raise WeightsError(
            f"The refiner takes prompts of width {width}, but this base gives {given}: "
            "set SDXL_REFINER to the refiner of this base."
        )
    scores = [(*prompts.size, 0, 0, score) for score in AESTHETIC_SCORES]
    conditioning = _encode(pipeline, prompts, prompts.negative_prompt, scores)
    return replace(conditioning, embeds=conditioning.embeds[..., -width:])


def _encode(
    pipeline: Any, prompts: Prompts, negative_prompt: str | None, time_ids: Sequence[Sequence[float]]
) -> Conditioning:
    """Encode both prompts.

    time_ids: those of the negative prompt and those of the prompt.
    """
    count, guided = prompts.count, prompts.guidance_scale > 1
    embeds, negative_embeds, pooled, negative_pooled = pipeline.encode_prompt(
        prompts.prompt,
        device=prompts.device,
        num_images_per_prompt=count,
        do_classifier_free_guidance=guided,
        negative_prompt=negative_prompt,
    )
    rows = torch.tensor(time_ids if guided else time_ids[1:], dtype=embeds.dtype, device=embeds.device)
    return Conditioning(
        embeds=torch.cat([negative_embeds, embeds]) if guided else embeds,
        pooled=torch.cat([negative_pooled, pooled]) if guided else pooled,
        time_ids=rows.repeat_interleave(count, 0),
        guidance_scale=prompts.guidance_scale,
        guidance_rescale=prompts.guidance_rescale,
    )
