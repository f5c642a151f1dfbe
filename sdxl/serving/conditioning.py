"""What a prompt, a size and a guidance scale make the base's or the refiner's UNet do, beside the latents.

Knows text encoders and SDXL's time ids; does not know latents or samplers.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sdxl.errors import WeightsError
from sdxl.serving.sampling import Conditioning

AESTHETIC_SCORES = (2.5, 6.0)
"""What the refiner is told of the negative prompt's picture and of the prompt's (arXiv:2307.01952 trains it so)."""


def for_base(
    pipeline: Any,
    *,
    texts: tuple[str, str],
    guidance_scale: float,
    count: int,
    size: tuple[int, int],
    device: torch.device,
) -> Conditioning:
    """The base's, of `count` equal pictures of `size` (height, width).

    texts: the prompt, and the negative prompt, which is zeros where it is empty.
    """
    sizes = (*size, 0, 0, *size)
    return _encoded(pipeline, texts[0], texts[1] or None, (sizes, sizes), guidance_scale, count, device)


def for_refiner(
    pipeline: Any,
    refiner: UNet2DConditionModel,
    *,
    texts: tuple[str, str],
    guidance_scale: float,
    count: int,
    size: tuple[int, int],
    device: torch.device,
) -> Conditioning:
    """The refiner's: the hidden states of the second text encoder alone, and a score of beauty in the size's place.

    The refiner knows no zeroed prompt: an empty negative prompt is encoded as text.

    Raises:
        WeightsError: it reads prompts of another width.
    """
    width, given = int(refiner.config["cross_attention_dim"]), pipeline.text_encoder_2.config.hidden_size
    if width != given:
        raise WeightsError(
            f"The refiner reads prompts of width {width}, this base gives {given}: "
            "set SDXL_REFINER to the refiner of this base."
        )
    scores = [(*size, 0, 0, score) for score in AESTHETIC_SCORES]
    told = _encoded(pipeline, *texts, scores, guidance_scale, count, device)
    return replace(told, embeds=told.embeds[..., -width:])


def _encoded(
    pipeline: Any,
    prompt: str,
    negative: str | None,
    time_ids: Sequence[Sequence[float]],
    guidance_scale: float,
    count: int,
    device: torch.device,
) -> Conditioning:
    """Both prompts for `count` pictures; `time_ids` are those of the negative prompt and of the prompt."""
    guided = guidance_scale > 1
    embeds, no_embeds, pooled, no_pooled = pipeline.encode_prompt(
        prompt,
        device=device,
        num_images_per_prompt=count,
        do_classifier_free_guidance=guided,
        negative_prompt=negative,
    )
    told = torch.tensor(time_ids if guided else time_ids[1:], dtype=embeds.dtype, device=embeds.device)
    return Conditioning(
        embeds=torch.cat([no_embeds, embeds]) if guided else embeds,
        pooled=torch.cat([no_pooled, pooled]) if guided else pooled,
        time_ids=told.repeat_interleave(count, 0),
        guidance_scale=guidance_scale,
    )
