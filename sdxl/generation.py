"""Request → pictures.

Knows what a request may ask for; does not know where weights come from, or cog.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image

from dataset_and_utils import TokenMap
from sdxl.errors import UserInputError
from sdxl.pipelines import SCHEDULERS, make_scheduler

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What to draw, validated."""

    prompt: str
    negative_prompt: str = ""
    """What to keep out; the empty string for nothing."""
    width: int
    """Pixels; a multiple of 8 from 64 to 2048."""
    height: int
    """Pixels; a multiple of 8 from 64 to 2048."""
    num_outputs: int = 1
    """Pictures, 1 to 4."""
    scheduler: str = "K_EULER"
    """A key of `pipelines.SCHEDULERS`."""
    num_inference_steps: int = 50
    """1 to 500."""
    guidance_scale: float = 7.5
    """Classifier-free guidance (arXiv:2207.12598), 1 (off) to 50."""
    seed: int
    """Picture i is drawn from the seed `seed + i`, whatever the number of pictures; 0 to 2³²−1."""
    lora_scale: float = 1.0
    """Strength of a LoRA fine-tune, 0 to 1."""

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            value = getattr(self, name)
            if not 64 <= value <= 2048 or value % 8:
                raise UserInputError(
                    f"{name} is {value}, but must be a multiple of 8 from 64 to 2048, such as 1024."
                )
        ranges = {
            "num_outputs": (1, 4),
            "num_inference_steps": (1, 500),
            "guidance_scale": (1, 50),
            "seed": (0, 2**32 - 1),
            "lora_scale": (0, 1),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise UserInputError(f"{name} is {getattr(self, name)}, but must be from {low} to {high}.")
        if self.scheduler not in SCHEDULERS:
            raise UserInputError(
                f"scheduler is {self.scheduler!r}, but must be one of {', '.join(SCHEDULERS)}."
            )


@torch.inference_mode()
def generate(
    pipeline: "StableDiffusionXLPipeline", request: GenerationRequest, token_map: TokenMap
) -> list[Image.Image]:
    """Draw the request's pictures with the weights that are in `pipeline`; the map's words become its tokens."""
    prompt = token_map.substitute(request.prompt)
    negative = token_map.substitute(request.negative_prompt)
    if prompt != request.prompt:
        log.info("Prompt with the trained tokens put in: %s", prompt)
    device = pipeline.device
    base_scheduler = pipeline.scheduler
    pipeline.scheduler = make_scheduler(request.scheduler, pipeline)
    try:
        output = pipeline(
            prompt=[prompt] * request.num_outputs,
            negative_prompt=[negative] * request.num_outputs if negative else None,
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=[
                torch.Generator(device).manual_seed(request.seed + i) for i in range(request.num_outputs)
            ],
        )
        return list(output.images)  # type: ignore[union-attr]
    finally:
        pipeline.scheduler = base_scheduler
