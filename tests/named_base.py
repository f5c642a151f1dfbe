"""A random SDXL with the names of the real one: as many blocks and layers, each as narrow as possible.

The miniature has fewer blocks and layers, so its layers have other names in the files of other tools.
"""

import functools
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl.serving.tuned_pipeline import TunedPipeline
from tests.conftest import TINY_BASE

WIDTHS = (32, 48)
"""Width of each text encoder."""


@functools.lru_cache(maxsize=2)
def base_of(tuned: TunedPipeline) -> dict[str, Tensor]:
    """A copy of the base's parameters: call it once before anything is applied."""
    assert not tuned._changed
    return {name: value.detach().clone() for name, value in tuned._parameters.items()}


def changed(tuned: TunedPipeline) -> dict[str, Tensor]:
    """Copies of the parameters that are not those of the base now."""
    return {
        name: value.detach().clone()
        for name, value in tuned._parameters.items()
        if not torch.equal(value, base_of(tuned)[name])
    }


def write_named_base(folder: Path) -> Path:
    """Save it in diffusers' layout, in fp16 without a variant, for pictures of 64 pixels."""
    torch.manual_seed(0)
    vocabulary = len(json.loads((TINY_BASE / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"])
    first, second = (
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            hidden_act=activation,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,  # as SDXL publishes it
        )
        for width, layers, activation in zip(WIDTHS, (12, 32), ("quick_gelu", "gelu"), strict=True)
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(2, 2, 2),
        cross_attention_dim=sum(WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTHS[1] + 6 * 8,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        scaling_factor=0.13025,
        sample_size=64,
    )
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    parts = {
        "unet": unet,
        "vae": vae,
        "text_encoder": CLIPTextModel(first),
        "text_encoder_2": CLIPTextModelWithProjection(second),
    }
    for name, part in parts.items():
        part.half().save_pretrained(folder / name)
    scheduler.save_pretrained(folder / "scheduler")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(TINY_BASE / name, folder / name)
    shutil.copy(TINY_BASE / "model_index.json", folder)
    return folder
