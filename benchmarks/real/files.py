"""Checks of what is on disk: the files of the base and the refiner, their configurations, and the tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from benchmarks.real.findings import Notes, check
from benchmarks.real.setup import Setup, read_config
from dataset_and_utils import add_tokens, eos_id
from sdxl import settings
from sdxl.files import pipelines
from sdxl.files.part_files import present
from sdxl.files.weight_files import WeightFile
from sdxl.model.bases import digest
from sdxl.model.components import load_tokenizers

NUMBERS = {
    "unet": 2_567_463_684,
    "vae": 83_653_863,
    "text_encoder": 123_060_480,
    "text_encoder_2": 694_659_840,
}
"""Part of SDXL 1.0 → how many numbers it has."""
REFINER_NUMBERS = 2_259_526_660
CONFIGURATION: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 128,
        "in_channels": 4,
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": {
        "scaling_factor": 0.13025,
        "force_upcast": True,
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
    },
    "scheduler": {
        "_class_name": "EulerDiscreteScheduler",
        "prediction_type": "epsilon",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "timestep_spacing": "leading",
        "steps_offset": 1,
    },
    "text_encoder": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "hidden_act": "quick_gelu",
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "eos_token_id": 2,
    },
    "text_encoder_2": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "hidden_act": "gelu",
        "projection_dim": 1280,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "eos_token_id": 2,
    },
}
"""Part of SDXL 1.0 → what its configuration says."""
REFINER: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "block_out_channels": [384, 768, 1536, 1536],
    "transformer_layers_per_block": 4,
    "cross_attention_dim": 1280,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2560,
}
CAPTION = "a photo of TOK"
CAPTION_IDS = [49406, 320, 1125, 539, 27010, 49407]
"""The caption in CLIP's vocabulary, from its beginning to its end."""


@check("Are the weights of the base the files, precisions and sizes that this code reads?")
def files(setup: Setup, notes: Notes) -> None:
    """Names, sizes and precisions of weights, and whether all numbers are finite."""
    base = setup.base
    notes.fact("digest of the base (base_sha256)", digest(base.folder))
    for part, numbers in NUMBERS.items():
        folder = base.vae if part == "vae" else base.folder / part
        _weights(notes, part, folder, numbers, setup.is_sdxl)
    _unet_names(notes, "unet", base.folder / "unet")


@check("Do the base's configurations say what this code assumes?")
def configuration(setup: Setup, notes: Notes) -> None:
    """Sizes, what is predicted, the noise schedule, pooling and the scale of latents."""
    for part, expected in CONFIGURATION.items():
        folder = setup.base.vae.parent if part == "vae" else setup.base.folder
        found = read_config(folder, setup.base.vae.name if part == "vae" else part)
        for key, value in expected.items():
            notes.equal(f"{part}: {key}", value, found.get(key), applies=setup.is_sdxl)
    index = pipelines.local_folder(str(setup.base.folder), weights=()) / "model_index.json"
    zeros = '"force_zeros_for_empty_prompt": true' in index.read_text()
    notes.equal("empty negative prompts become zeros", True, zeros, applies=setup.is_sdxl)
    notes.fact("side of the base's own pictures, pixels", setup.native)


@check("Is the refiner the one that this code knows how to use?")
def refiner_files(setup: Setup, notes: Notes) -> None:
    """The refiner's UNet: its weights and its configuration, and that it fits the base."""
    name = settings.refiner_name()
    folder = pipelines.local_folder(name, setting="SDXL_REFINER", parts=["unet"], weights=["unet"])
    found = read_config(folder, "unet")
    for key, value in REFINER.items():
        notes.equal(f"unet: {key}", value, found.get(key), applies=setup.is_sdxl)
    width = read_config(setup.base.folder, "text_encoder_2")["hidden_size"]
    notes.equal(
        "width of prompts: that of the base's second text encoder", width, found["cross_attention_dim"]
    )
    _weights(notes, "unet", folder / "unet", REFINER_NUMBERS, setup.is_sdxl)
    _unet_names(notes, "unet", folder / "unet")


@check("Do the tokenizers give the ids that CLIP was trained with, and room for new tokens?")
def tokenizers(setup: Setup, notes: Notes) -> None:
    """Size of the vocabulary, ids of a caption, what fills short prompts, and new tokens."""
    pair = load_tokenizers(setup.base.folder)
    for name, tokenizer, fills in zip(
        ("tokenizer", "tokenizer_2"), pair, ("<|endoftext|>", "!"), strict=True
    ):
        ids = tokenizer(CAPTION).input_ids
        size, end = len(tokenizer), eos_id(tokenizer)
        notes.equal(f"{name}: words and pieces", 49408, size, applies=setup.is_sdxl)
        notes.equal(f'{name}: ids of "{CAPTION}"', CAPTION_IDS, ids, applies=setup.is_sdxl)
        notes.equal(f"{name}: fills short prompts with", fills, tokenizer.pad_token, applies=setup.is_sdxl)
        notes.equal(f"{name}: tokens in a prompt", 77, tokenizer.model_max_length)
        notes.equal(f"{name}: the end of a text has the highest id", size - 1, end)
        notes.equal(f"{name}: a text ends with that id", end, ids[-1])
        table = read_config(setup.base.folder, name.replace("tokenizer", "text_encoder"))["vocab_size"]
        notes.equal(f"{name}: as many ids as its text encoder has rows", table, size)
        upper, lower = (tokenizer(text).input_ids for text in ("a PHOTO of", "a photo of"))
        notes.equal(f"{name}: upper and lower case are one", lower, upper)
        added = add_tokens(tokenizer, ["<s0>", "<s1>"])
        notes.equal(f"{name}: new tokens get the next ids", [size, size + 1], added)
        notes.equal(f"{name}: new tokens stay whole", added, tokenizer("of <s0><s1>,").input_ids[2:4])


def _weights(notes: Notes, part: str, folder: Path, numbers: int, is_sdxl: bool) -> None:
    """Note what the files of weights in `folder` hold."""
    found = present(folder)
    assert found is not None, "a base without weights is refused when it is found"
    count, dtypes, bad = 0, set(), 0
    for name in found.weights:
        file = WeightFile(folder / name, f"{part}/{name}")
        notes.fact(f"{part}/{name}", f"{(folder / name).stat().st_size:,} bytes")
        for key, tensor in file.read().items():
            if not key.endswith("position_ids"):  # some versions of transformers save them
                count += tensor.numel()
                dtypes.add(str(tensor.dtype).removeprefix("torch."))
                bad += int((~torch.isfinite(tensor)).sum())
    notes.equal(f"{part}: numbers", f"{numbers:,}", f"{count:,}", applies=is_sdxl)
    notes.equal(f"{part}: precision", "float16", ", ".join(sorted(dtypes)), applies=is_sdxl)
    notes.equal(f"{part}: numbers that are not finite", 0, bad)


def _unet_names(notes: Notes, part: str, folder: Path) -> None:
    """Note whether the UNet's file has today's names, so that it loads the fast way."""
    found = present(folder)
    assert found is not None
    names = {key for name in found.weights for key in WeightFile(folder / name, f"{part}/{name}").keys}
    with torch.device("meta"):
        config: Any = UNet2DConditionModel.load_config(folder)
        unet: Any = UNet2DConditionModel.from_config(config)
    missing = len(unet.state_dict().keys() ^ names)
    notes.equal(f"{part}: names of weights that diffusers does not expect, or misses", 0, missing)
