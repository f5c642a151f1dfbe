"""Prompts and sizes as the base's and the refiner's UNet take them.

Knows text encoders and SDXL's time ids; does not know latents or samplers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from dataset_and_utils import TokenMap
from sdxl.errors import WeightsError
from sdxl.model.prompt_chunks import States, Weighted, encode, states_of, weighted_ids
from sdxl.model.prompt_weights import parts_of
from sdxl.serving.denoising import Conditioning

AESTHETIC_SCORES = (2.5, 6.0)
"""The aesthetic score that the refiner gets with the negative prompt and with the prompt (arXiv:2307.01952)."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What to encode for a batch of pictures."""

    prompt: str
    negative_prompt: str
    """May be empty."""
    token_map: TokenMap
    """The new words that both may name."""
    prompt_weights: bool = False
    """Whether brackets in both are weights."""
    guidance_scale: float
    guidance_rescale: float
    count: int
    """Pictures in the batch."""
    size: tuple[int, int]
    """(height, width) in pixels."""
    device: torch.device
    states: States = states_of
    """Runs the text encoders."""


def for_base(pipeline: Any, prompts: Prompts) -> Conditioning:
    """The conditioning of the base. An empty negative prompt becomes zeros, as in the training of SDXL."""
    sizes = (*prompts.size, 0, 0, *prompts.size)
    return _encode(pipeline, prompts, (sizes, sizes), zeros_for_empty=True)


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
    conditioning = _encode(pipeline, prompts, scores, zeros_for_empty=False)
    return replace(conditioning, embeds=conditioning.embeds[..., -width:])


def _encode(
    pipeline: Any, prompts: Prompts, time_ids: Sequence[Sequence[float]], *, zeros_for_empty: bool
) -> Conditioning:
    """Encode both prompts, in equally many chunks.

    time_ids: those of the negative prompt and those of the prompt.
    zeros_for_empty: an empty negative prompt becomes zeros, if the base was trained so.
    """
    count, guided = prompts.count, prompts.guidance_scale > 1
    tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
    texts = [prompts.prompt, *([prompts.negative_prompt] if guided else [])]
    parts = [parts_of(text, weights=prompts.prompt_weights) for text in texts]
    read = weighted_ids(parts, tokenizers, prompts.token_map)

    embeds, pooled = _encoded(pipeline, read[0], prompts)
    rows = [(embeds, pooled)]
    if guided:
        zeros = (
            zeros_for_empty and not prompts.negative_prompt and pipeline.config.force_zeros_for_empty_prompt
        )
        negative = (torch.zeros_like(embeds), torch.zeros_like(pooled))
        rows.insert(0, negative if zeros else _encoded(pipeline, read[1], prompts))
    times = torch.tensor(time_ids if guided else time_ids[1:], dtype=embeds.dtype, device=embeds.device)
    return Conditioning(
        embeds=torch.cat([one for one, _ in rows]).repeat_interleave(count, 0),
        pooled=torch.cat([one for _, one in rows]).repeat_interleave(count, 0),
        time_ids=times.repeat_interleave(count, 0),
        guidance_scale=prompts.guidance_scale,
        guidance_rescale=prompts.guidance_rescale,
    )


def _encoded(pipeline: Any, read: Weighted, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """One prompt's hidden states [1, 77·n, dim] and pooled prompt [1, dim], in the precision of the encoders' weights."""
    device = prompts.device
    first, second = (one[None].to(device) for one in read.ids)
    # Without weights the states are not touched: not even rounded anew.
    weights = [one[None] for one in read.weights] if any((one != 1).any() for one in read.weights) else None
    encoders = pipeline.text_encoder, pipeline.text_encoder_2
    embeds, pooled = encode(encoders, (first, second), weights, states=prompts.states)
    return embeds.to(device, pipeline.text_encoder_2.dtype), pooled
