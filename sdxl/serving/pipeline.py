"""Load the base for serving, and name its samplers.

Knows diffusers' pipelines and schedulers; does not know requests or fine-tunes.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
)
from safetensors import SafetensorError

from dataset_and_utils import eos_id, pool_at_eos
from sdxl.errors import WeightsError
from sdxl.model.components import load_unet, weights_variant
from sdxl.serving.placement import Placement, place

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

log = logging.getLogger(__name__)

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DDIM": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "DPMSolverMultistep": (DPMSolverMultistepScheduler, {}),
    "HeunDiscrete": (HeunDiscreteScheduler, {}),
    "KarrasDPM": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "K_EULER_ANCESTRAL": (EulerAncestralDiscreteScheduler, {}),
    "K_EULER": (EulerDiscreteScheduler, {}),
    "PNDM": (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False}),
}
"""Public name → (diffusers class, settings that differ from the base's).

SDXL's published configuration states those of DDIM and PNDM; a base that was saved with another sampler has lost them,
and diffusers' defaults would clip latents as if they were pixels.
"""


def load_pipeline(folder: Path, device: torch.device | Placement) -> "StableDiffusionXLPipeline":
    """The text-to-image pipeline of the base in `folder`, placed on `device`: fp16 on CUDA, fp32 on a CPU.

    Its pooled prompts are taken at the end of the text. Where the autoencoder's configuration says `force_upcast`,
    pictures are encoded and decoded in bf16 on CUDA.

    Raises:
        WeightsError: a part is missing or is not of SDXL's kind.
    """
    from diffusers import (
        StableDiffusionXLPipeline,  # here: it takes a second, and warns before logging is configured
    )

    placement = device if isinstance(device, Placement) else Placement(name=device.type, device=device)
    dtype = torch.float16 if placement.device.type == "cuda" else torch.float32
    try:
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            folder,
            unet=load_unet(folder, dtype, torch.device("cpu") if placement.offloaded else placement.device),
            variant=weights_variant(folder),
            dtype=dtype,
            use_safetensors=True,
            add_watermarker=False,
        )
    except WeightsError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise WeightsError(
            f"{folder} is not a complete SDXL in diffusers' layout ({error}): fetch it again."
        ) from error
    for encoder, tokenizer in (
        (pipeline.text_encoder, pipeline.tokenizer),
        (pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pool_at_eos(encoder, eos_id(tokenizer))
    pipeline.set_progress_bar_config(desc="Sampling", unit="step", mininterval=0.5)
    place(pipeline, placement)
    return pipeline


def load_refiner(folder: Path, like: "StableDiffusionXLPipeline") -> UNet2DConditionModel:
    """The UNet of the refiner in `folder`, in the precision and on the device of the base `like`.

    It is all that a refiner has of its own: its text encoder and autoencoder are those of the base.

    Raises:
        WeightsError: the files are missing or damaged.
    """
    return load_unet(folder, like.unet.dtype, like.unet.device)


def make_scheduler(name: str, pipeline: "StableDiffusionXLPipeline") -> SchedulerMixin:
    """A fresh sampler of the public `name`, with the noise schedule of the base."""
    kind, settings = SCHEDULERS[name]
    return kind.from_config(pipeline.scheduler.config, **settings)
