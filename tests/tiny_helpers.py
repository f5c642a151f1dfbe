"""Small versions of the captioner, segmenter, upscaler, safety checker, DINOv2 and CLIP: real classes, saved as folders. And a UNet
that is narrower than the miniature's."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch.nn import functional

from tests.conftest import TINY_BASE

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "photo",
    "of",
    "tok",
    "dog",
    "on",
    "red",
    "beach",
    ",",
    "the",
]


def narrow_unet() -> "UNet2DConditionModel":
    """A UNet that takes what the miniature's takes, with a twentieth of its weights. They are random."""
    from diffusers import UNet2DConditionModel

    narrow = {
        "block_out_channels": [16, 32],
        "norm_num_groups": 8,
        "attention_head_dim": [2, 4],
        "transformer_layers_per_block": [1, 1],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    }
    torch.manual_seed(0)
    config: Any = UNet2DConditionModel.load_config(TINY_BASE / "unet")
    made: Any = UNet2DConditionModel.from_config({**config, **narrow})
    return made


def write_narrow_base(folder: Path) -> Path:
    """The miniature with `narrow_unet`."""
    shutil.copytree(TINY_BASE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("unet"))
    narrow_unet().half().save_pretrained(folder / "unet", variant="fp16")
    return folder


def write_captioner(folder: Path) -> Path:
    """A BLIP with random weights."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipTextConfig,
        BlipVisionConfig,
    )
    from transformers.models.blip import BlipImageProcessorPil, BlipProcessor

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = BlipTextConfig(
        **sizes,
        encoder_hidden_size=32,
        vocab_size=len(_WORDS),
        bos_token_id=2,
        eos_token_id=3,
        sep_token_id=3,
        pad_token_id=0,
    )
    vision = BlipVisionConfig(**sizes, image_size=32, patch_size=8)
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)
    model = BlipForConditionalGeneration(config)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(_WORDS) + "\n")
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(_WORDS)}, do_lower_case=True)
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def write_segmenter(folder: Path) -> Path:
    """A CLIPSeg with random weights."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPTokenizer
    from transformers.models.vit import ViTImageProcessorPil

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TINY_BASE / "tokenizer")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = CLIPSegConfig(
        text_config={
            **sizes,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=32,
        reduce_dim=16,
        extract_layers=[0, 1, 2],
        decoder_num_attention_heads=4,
        decoder_intermediate_size=32,
    )
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_upscaler(folder: Path) -> Path:
    """A Swin2SR like the real one, trained for a few seconds to enlarge smooth noise by four."""
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    torch.manual_seed(0)
    config = Swin2SRConfig(
        image_size=16, embed_dim=16, depths=[2], num_heads=[2], window_size=8, mlp_ratio=2.0, upscale=4,
        upsampler="nearest+conv",
    )  # fmt: skip
    model = Swin2SRForImageSuperResolution(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        noise = torch.rand(4, 3, 3, 3)
        small = functional.interpolate(noise, size=8, mode="bicubic").clamp(0, 1)
        large = functional.interpolate(noise, size=32, mode="bicubic").clamp(0, 1)
        loss = (model(pixel_values=small).reconstruction - large).abs().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def write_encoders(folder: Path) -> dict[str, str]:
    """A DINOv2 and a CLIP with random weights. Returns the variables that name them."""
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    dino, clip = folder / "dino", folder / "clip"
    Dinov2Model(Dinov2Config(**size, mlp_ratio=2, image_size=32, patch_size=8)).save_pretrained(dino)
    text = size | {"intermediate_size": 64, "vocab_size": 1200, "eos_token_id": 2}
    vision = size | {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(clip)
    for file in (TINY_BASE / "tokenizer").iterdir():
        shutil.copy(file, clip)
    return {"SDXL_DINO": str(dino), "SDXL_CLIP": str(clip)}


def write_checker(folder: Path) -> Path:
    """A pipeline's folder with a safety checker with random weights, whose first concept is a red picture."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessorPil

    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**vision, "vocab_size": 100},
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    checker = StableDiffusionSafetyChecker(config)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = CLIPImageProcessorPil(**sizes)
    with torch.no_grad():
        for parameter in (checker.concept_embeds, checker.special_care_embeds):
            parameter.normal_()
        for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
            weights.fill_(0.999)
        pixels = processor([Image.new("RGB", (64, 64), "red")], return_tensors="pt").pixel_values
        pooled: Any = checker.vision_model(pixels)[1]
        checker.concept_embeds[0] = checker.visual_projection(pooled)[0]
    checker.save_pretrained(folder / "safety_checker", variant="fp16")
    processor.save_pretrained(folder / "feature_extractor")
    (folder / "model_index.json").write_text("{}")
    return folder
