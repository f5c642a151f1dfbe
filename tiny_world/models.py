"""The miniature's parts in diffusers' and transformers' classes, and its folder layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tiny_world.tokens import build_tokenizers, vocabulary

IMAGE_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Widths and depths of the parts."""

    text: tuple[int, int] = (96, 128)
    text_layers: tuple[int, int] = (3, 4)
    vae: tuple[int, ...] = (32, 48, 96, 128)
    unet: tuple[int, int, int] = (64, 96, 144)
    transformers: tuple[int, int, int] = (1, 2, 1)
    refiner: tuple[int, int, int] = (32, 48, 80)
    time_embed: int = 32


FULL = Sizes()
SMOKE = Sizes(
    text=(32, 48),
    text_layers=(3, 3),
    vae=(8, 8, 16, 16),
    unet=(16, 16, 32),
    transformers=(1, 1, 1),
    refiner=(16, 16, 16),
)


def build_text_encoders(sizes: Sizes) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Both text encoders. The second keeps SDXL's published `eos_token_id=2`, so it pools its output at the highest id."""
    size = len(vocabulary())

    def config(i: int, **ids) -> CLIPTextConfig:
        width = sizes.text[i]
        return CLIPTextConfig(
            vocab_size=size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=sizes.text_layers[i],
            num_attention_heads=max(width // 32, 1),
            max_position_embeddings=77,
            hidden_act=("quick_gelu", "gelu")[i],
            projection_dim=sizes.text[1],
            **ids,
        )

    first = CLIPTextModel(config(0, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1))
    second = CLIPTextModelWithProjection(config(1, bos_token_id=0, eos_token_id=2, pad_token_id=1))
    for model in (first, second):
        # CLIP's own initialisation of embeddings, 0.02, is right for 512 and more channels; narrow models
        # need more.
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    return first, second


def build_unet(sizes: Sizes, *, refiner: bool = False) -> UNet2DConditionModel:
    """The UNet: three levels, the first without attention. The refiner takes the second text encoder only and 5 time ids."""
    channels = sizes.refiner if refiner else sizes.unet
    width = sizes.text[1] if refiner else sum(sizes.text)
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=sizes.transformers if not refiner else (1, 1, 1),
        attention_head_dim=tuple(max(c // 16, 1) for c in channels),
        cross_attention_dim=width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=sizes.time_embed,
        projection_class_embeddings_input_dim=(5 if refiner else 6) * sizes.time_embed + sizes.text[1],
        norm_num_groups=8 if min(channels) < 32 else 16,
    )


def build_vae(sizes: Sizes) -> AutoencoderKL:
    """The autoencoder: 8x downsampling to 4 channels."""
    return AutoencoderKL(
        block_out_channels=sizes.vae,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        force_upcast=False,
    )


def scheduler() -> EulerDiscreteScheduler:
    """SDXL's scheduler configuration."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
        interpolation_type="linear",
    )


def base_pipeline(vae, first, second, unet) -> StableDiffusionXLPipeline:
    """The parts as diffusers' pipeline."""
    tokenizer, tokenizer_2 = build_tokenizers()
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def refiner_pipeline(vae, second, unet) -> StableDiffusionXLImg2ImgPipeline:
    """The refiner as diffusers' pipeline, without the first text encoder."""
    return StableDiffusionXLImg2ImgPipeline(
        vae=vae,
        text_encoder=None,
        text_encoder_2=second,
        tokenizer=None,
        tokenizer_2=build_tokenizers()[1],
        unet=unet,
        scheduler=scheduler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def save_half(pipeline, folder: Path) -> int:
    """Save in half precision as variant fp16. Returns the folder's size in bytes."""
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder, variant="fp16", safe_serialization=True)
    # transformers would load these halves as half precision, and diffusers the others as single, when none is asked for.
    for config in folder.glob("text_encoder*/config.json"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
