"""Load the base and the refiner for serving.

Knows diffusers' pipelines and their layout on disk; does not know requests, samplers or fine-tunes.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dataset_and_utils import eos_id, pool_at_eos
from sdxl.model.components import incomplete_base_named, load_part, load_tokenizers, load_unet
from sdxl.model.noise_schedule import read_schedule
from sdxl.serving.placement import Placement, place
from sdxl.settings import Prediction

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

log = logging.getLogger(__name__)


def load_pipeline(
    folder: Path,
    device: torch.device | Placement,
    *,
    vae: Path | None = None,
    prediction: Prediction | None = None,
) -> "StableDiffusionXLPipeline":
    """The text-to-image pipeline of the base in `folder`: fp16 on CUDA, fp32 on a CPU.

    Prompts are pooled at the end of the text, whatever the encoders' configuration says. If the autoencoder's
    configuration says `force_upcast`, it is fp32 on CUDA too, because it overflows in fp16.

    vae: folder of another autoencoder.
    prediction: what the base predicts, instead of what its files say.

    Raises:
        WeightsError: a part is missing or is not from an SDXL.
    """
    from diffusers import (
        StableDiffusionXLPipeline,  # here: it takes a second to import, and warns before logging is configured
    )

    placement = device if isinstance(device, Placement) else Placement(name=device.type, device=device)
    dtype = torch.float16 if placement.device.type == "cuda" else torch.float32
    cpu = torch.device("cpu")
    with incomplete_base_named(folder):
        tokenizers = load_tokenizers(folder)
        scheduler: Any = EulerDiscreteScheduler.from_config(read_schedule(folder, prediction))
        pipeline = StableDiffusionXLPipeline(
            unet=load_unet(folder, dtype, cpu if placement.offloaded else placement.device),
            vae=load_part(
                AutoencoderKL, vae or folder / "vae", _vae_dtype(vae or folder / "vae", dtype), cpu
            ),
            text_encoder=load_part(CLIPTextModel, folder / "text_encoder", dtype, cpu),
            text_encoder_2=load_part(CLIPTextModelWithProjection, folder / "text_encoder_2", dtype, cpu),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            scheduler=scheduler,
            force_zeros_for_empty_prompt=_zeros_for_empty_prompts(folder),
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


def _vae_dtype(folder: Path, dtype: torch.dtype) -> torch.dtype:
    """The precision of the autoencoder in `folder` when the other parts have `dtype`.

    SDXL's own overflows in fp16. bf16 would not, but it shows: its eight bits are as coarse as the levels of a picture.
    """
    config = json.loads((folder / "config.json").read_text())
    return torch.float32 if config.get("force_upcast", True) else dtype


def _zeros_for_empty_prompts(folder: Path) -> bool:
    """Whether an empty negative prompt becomes zeros, as SDXL was trained."""
    return bool(
        json.loads((folder / "model_index.json").read_text()).get("force_zeros_for_empty_prompt", True)
    )


def load_refiner(folder: Path, like: "StableDiffusionXLPipeline") -> UNet2DConditionModel:
    """The UNet of the refiner in `folder`, with the dtype and on the device of the base `like`.

    A refiner needs no other part of its own: its text encoder and autoencoder are the base's.

    Raises:
        WeightsError: the files are missing or damaged.
    """
    return load_unet(folder, like.unet.dtype, like.unet.device)
