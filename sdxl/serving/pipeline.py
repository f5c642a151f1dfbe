"""Load the base and the refiner for serving.

Knows diffusers' pipelines and their layout on disk; does not know requests, samplers or fine-tunes.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel

from dataset_and_utils import eos_id, pool_at_eos
from sdxl.model.components import incomplete_base_named, load_unet, weights_variant
from sdxl.serving.placement import Placement, place

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

log = logging.getLogger(__name__)


def load_pipeline(folder: Path, device: torch.device | Placement) -> "StableDiffusionXLPipeline":
    """The text-to-image pipeline of the base in `folder`: fp16 on CUDA, fp32 on a CPU.

    Prompts are pooled at the end of the text, whatever the encoders' configuration says. If the autoencoder's
    configuration says `force_upcast`, it encodes and decodes in bf16 on CUDA.

    Raises:
        WeightsError: a part is missing or is not from an SDXL.
    """
    from diffusers import (
        StableDiffusionXLPipeline,  # here: it takes a second to import, and warns before logging is configured
    )

    placement = device if isinstance(device, Placement) else Placement(name=device.type, device=device)
    dtype = torch.float16 if placement.device.type == "cuda" else torch.float32
    with incomplete_base_named(folder):
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            folder,
            unet=load_unet(folder, dtype, torch.device("cpu") if placement.offloaded else placement.device),
            variant=weights_variant(folder),
            dtype=dtype,
            use_safetensors=True,
            add_watermarker=False,
        )
    for encoder, tokenizer in (
        (pipeline.text_encoder, pipeline.tokenizer),
        (pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pool_at_eos(encoder, eos_id(tokenizer))
    pipeline.set_progress_bar_config(desc="Sampling", unit="step", mininterval=0.5)
    place(pipeline, placement)
    return pipeline


def load_refiner(folder: Path, like: "StableDiffusionXLPipeline") -> UNet2DConditionModel:
    """The UNet of the refiner in `folder`, with the dtype and on the device of the base `like`.

    A refiner needs no other part of its own: its text encoder and autoencoder are the base's.

    Raises:
        WeightsError: the files are missing or damaged.
    """
    return load_unet(folder, like.unet.dtype, like.unet.device)
