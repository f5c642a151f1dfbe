"""SDXL 1.0 at its published size with random weights. Speed and memory do not depend on the weights' values."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dataset_and_utils import Example, ExampleDataset, TokenMap
from sdxl.model import fine_tune_files
from sdxl.model.components import Components, add_placeholder_tokens
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.training.trainable import LORA_TARGETS

DEVICE = "cuda"
TOKENIZERS = Path("base_models/tiny-sdxl")
UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
"""The published configuration of SDXL 1.0's UNet: 2.57 billion parameters."""
ENCODER: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
ENCODER_2: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
    "sample_size": 1024,
}
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def parts(half: torch.dtype, unet_dtype: torch.dtype, *, unet_waits: bool = False) -> dict[str, Any]:
    """The UNet, autoencoder, text encoders and tokenizers, frozen and on `DEVICE`, or the UNet on the CPU if it waits."""
    torch.manual_seed(0)
    # The tokenizers are those of the miniature: fewer words, the same work.
    tokenizers = {
        name: CLIPTokenizer.from_pretrained(TOKENIZERS, subfolder=name)
        for name in ("tokenizer", "tokenizer_2")
    }
    ends = tokenizers["tokenizer"]
    common: dict[str, Any] = {
        "vocab_size": 49408,
        "eos_token_id": ends.eos_token_id,
        "bos_token_id": ends.bos_token_id,
    }
    second = CLIPTextConfig(**ENCODER_2, projection_dim=1280, hidden_act="gelu", **common)
    builders: dict[str, tuple[torch.dtype, Callable[[], Any]]] = {
        "unet": (unet_dtype, lambda: UNet2DConditionModel(**UNET)),
        "vae": (half, lambda: AutoencoderKL(**AUTOENCODER)),
        "text_encoder": (half, lambda: CLIPTextModel(CLIPTextConfig(**ENCODER, **common))),
        "text_encoder_2": (half, lambda: CLIPTextModelWithProjection(second)),
    }
    made: dict[str, Any] = {}
    for name, (dtype, build) in builders.items():
        torch.set_default_dtype(dtype)  # build it in its precision: another might not fit into memory
        try:
            with torch.device(DEVICE):
                made[name] = build()
            if name == "unet" and unet_waits:
                made[name].to("cpu")
                torch.cuda.empty_cache()
        finally:
            torch.set_default_dtype(torch.float32)
    for part in made.values():
        part.requires_grad_(False).eval()
    return made | tokenizers


def components(*, is_lora: bool, unet_waits: bool = False) -> Components:
    """All parts for training, in the precisions that `load_components` chooses on CUDA. The UNet may wait on the CPU."""
    made = parts(torch.bfloat16, torch.bfloat16 if is_lora else torch.float32, unet_waits=unet_waits)
    return Components(
        unet=made["unet"],
        vae=made["vae"].float(),
        text_encoders=(made["text_encoder"], made["text_encoder_2"]),
        tokenizers=(made["tokenizer"], made["tokenizer_2"]),
        noise_scheduler=DDPMScheduler(**SCHEDULE),
        device=torch.device(DEVICE),
    )


def examples(on: Components, count: int, side: int) -> ExampleDataset:
    """Random latents with a caption that names the new tokens."""
    add_placeholder_tokens(on, TokenMap.parse("TOK:2"))
    made = []
    for _ in range(count):
        ids = [
            tokenizer("a photo of <s0><s1>", padding="max_length", max_length=77, return_tensors="pt")
            .input_ids[0]
            .to(on.device)
            for tokenizer in on.tokenizers
        ]
        made.append(
            Example(
                latents=torch.randn(4, side // 8, side // 8, device=on.device),
                mask=torch.ones(1, side // 8, side // 8, device=on.device),
                token_ids=(ids[0], ids[1]),
                time_ids=torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32, device=on.device),
            )
        )
    return ExampleDataset(made)


def forward_tflop(side: int) -> float:
    """How many multiplications and additions the UNet needs for one picture of `side` pixels, in 10¹².

    They are counted on the meta device, without computing anything.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        condition = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(
                torch.zeros(1, 4, side // 8, side // 8),
                torch.zeros(1),
                torch.zeros(1, 77, 2048),
                added_cond_kwargs=condition,
            )
    return counter.get_total_flops() / 1e12


def save_pipeline(folder: Path) -> Path:
    """Write a complete base in diffusers' layout, in fp16 (6.9 GB), unless it exists already."""
    from diffusers import StableDiffusionXLPipeline

    if not (folder / "model_index.json").is_file():
        made = parts(torch.float16, torch.float16)
        made["vae"] = made["vae"].to(torch.float16)
        made["vae"].register_to_config(force_upcast=True)
        pipeline = StableDiffusionXLPipeline(
            **made,
            scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading"),
            add_watermarker=False,
        )
        pipeline.save_pretrained(folder, variant="fp16")
    return folder


def save_checker(folder: Path) -> Path:
    """Write Stable Diffusion's safety checker (CLIP ViT-L/14) with random weights. It passes every picture."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessorPil

    if not (folder / "model_index.json").is_file():
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
        vision |= {"num_attention_heads": 16, "image_size": 224, "patch_size": 14}
        config = CLIPConfig(vision_config=vision, projection_dim=768)
        StableDiffusionSafetyChecker(config).half().save_pretrained(folder / "safety_checker", variant="fp16")
        CLIPImageProcessorPil(size={"shortest_edge": 224}).save_pretrained(folder / "feature_extractor")
        (folder / "model_index.json").write_text("{}")
    return folder


def save_fine_tunes(unet: nn.Module, folder: Path) -> dict[str, Path]:
    """Write tars of two full UNets (5 GB each) and of two LoRAs of rank 32 on attention, all close to the base."""
    made = {}
    for number in (1, 2):
        torch.manual_seed(number)
        whole = {name: (value * (1 + 1e-3 * number)).cpu() for name, value in unet.state_dict().items()}
        lora = {}
        for name, layer in unet.named_modules():
            if isinstance(layer, nn.Linear) and name.endswith(tuple(LORA_TARGETS["attention"])):
                lora[f"unet.{name}.lora_A.weight"] = torch.randn(32, layer.in_features) * 0.01
                lora[f"unet.{name}.lora_B.weight"] = torch.randn(layer.out_features, 32) * 0.01
        rows = [torch.randn(2, 768) * 0.01, torch.randn(2, 1280) * 0.01]
        for kind, weights in (("unet", whole), ("lora", lora)):
            target = folder / f"{kind}-{number}.tar"
            made[f"{kind}-{number}"] = target
            if not target.is_file():
                model = TrainedFineTune(
                    kind=kind, weights=weights, token_rows=rows, token_map=TokenMap.parse("TOK:2")
                )
                fine_tune_files.write(model, folder / f"{kind}-{number}", {})
                fine_tune_files.pack(folder / f"{kind}-{number}", target)
                shutil.rmtree(folder / f"{kind}-{number}")
    return made
