"""A fine-tune in another tool's format draws the same pictures as in this project's format."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor, nn

from dataset_and_utils import write_embeddings
from sdxl.errors import WeightsError
from sdxl.model import fine_tune_files
from sdxl.model.ldm_names import unet_names
from sdxl.model.lora_formats import read_lora
from sdxl.serving.generation import generate
from sdxl.serving.pipeline import load_pipeline
from sdxl.serving.request import GenerationRequest
from sdxl.serving.tuned_pipeline import ScaledFineTune, TunedPipeline
from tests.conftest import TINY_BASE, quiet_pipeline

RANK = 3
Matrices = dict[str, tuple[Tensor, Tensor]]
"""Layer, such as "mid_block.attentions.0.proj_in" → (down [rank, in], up [out, rank])."""


@pytest.fixture(scope="module")
def tuned() -> TunedPipeline:
    return quiet_pipeline(TINY_BASE)


def random_matrices(root: nn.Module, chosen: Callable[[str], bool], size: float) -> Matrices:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, module in root.named_modules():
        if chosen(name) and isinstance(module, nn.Linear):
            down = torch.randn(RANK, module.in_features, generator=generator) * size
            made[name] = (down, torch.randn(module.out_features, RANK, generator=generator) * size)
    return made


@pytest.fixture(scope="module")
def attention(tuned: TunedPipeline) -> Matrices:
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    return random_matrices(tuned.pipeline.unet, lambda name: name.endswith(ends), 0.15)


def peft_keys(matrices: Matrices, part: str = "unet") -> dict[str, Tensor]:
    keys = {}
    for name, (down, up) in matrices.items():
        keys |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    return keys


def ldm_keys(tuned: TunedPipeline, matrices: Matrices, alpha: float) -> dict[str, Tensor]:
    """As kohya's sd-scripts save it with LDM's layer names, each layer with its alpha."""
    names = unet_names(matrices, tuned.pipeline.unet.config)
    keys = {}
    for name, (down, up) in matrices.items():
        layer = "lora_unet_" + names[name].replace(".", "_")
        keys |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        keys[f"{layer}.alpha"] = torch.tensor(alpha)
    return keys


def picture(pipeline: Any, token_map: Any, prompt: str = "a red fish on a blue background") -> np.ndarray:
    request = GenerationRequest(
        prompt=prompt, width=64, height=64, num_inference_steps=3, guidance_scale=4.0, seed=0
    )
    return np.array(generate(pipeline, request, token_map)[0])


def draw(tuned: TunedPipeline, source: Path, folder: Path, scale: float = 1.0, **given: str) -> np.ndarray:
    tuned.activate(fine_tune_files.read(source, folder / "unpacked"), lora_scale=scale)
    try:
        return picture(tuned.pipeline, tuned.token_map, **given)
    finally:
        tuned.activate(None)


def write(folder: Path, name: str, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    return folder


@pytest.fixture(scope="module")
def reference(
    tuned: TunedPipeline, attention: Matrices, tmp_path_factory: pytest.TempPathFactory
) -> np.ndarray:
    folder = tmp_path_factory.mktemp("ours")
    drawn = draw(tuned, write(folder, "lora.safetensors", peft_keys(attention)), folder)
    assert np.abs(drawn.astype(int) - picture(tuned.pipeline, tuned.token_map)).max() > 20
    return drawn


def test_the_trainer_of_2023(
    tuned: TunedPipeline, attention: Matrices, reference: np.ndarray, tmp_path: Path
):
    keys = {}
    for name, (down, up) in attention.items():
        block, _, layer = name.removesuffix(".0").rpartition(".")
        keys[f"{block}.processor.{layer}_lora.down.weight"] = down
        keys[f"{block}.processor.{layer}_lora.up.weight"] = up
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight" in keys
    folder = write(tmp_path / "old", "lora.safetensors", keys)
    assert np.array_equal(draw(tuned, folder, tmp_path), reference)


def test_diffusers_own_file(tuned: TunedPipeline, attention: Matrices, reference: np.ndarray, tmp_path: Path):
    layers = {key.removeprefix("unet."): value for key, value in peft_keys(attention).items()}
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "new", unet_lora_layers=layers)
    assert (tmp_path / "new" / "pytorch_lora_weights.safetensors").is_file()
    assert np.array_equal(draw(tuned, tmp_path / "new", tmp_path), reference)


def test_alpha_in_the_metadata_of_diffusers(
    tuned, attention: Matrices, reference: np.ndarray, tmp_path: Path
):
    """With alpha at half the rank and scale 1 it is the LoRA at scale 0.5."""
    layers = {key.removeprefix("unet."): value for key, value in peft_keys(attention).items()}
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path / "new",
        unet_lora_layers=layers,
        unet_lora_adapter_metadata={"r": RANK, "lora_alpha": RANK / 2, "target_modules": ["to_q"]},
    )
    ours = write(tmp_path / "ours", "lora.safetensors", peft_keys(attention))
    halved = draw(tuned, ours, tmp_path, scale=0.5)
    assert np.array_equal(draw(tuned, tmp_path / "new", tmp_path), halved)
    assert not np.array_equal(halved, reference)


def test_diffusers_older_keys(
    tuned: TunedPipeline, attention: Matrices, reference: np.ndarray, tmp_path: Path
):
    keys = {}
    for name, (down, up) in attention.items():
        keys |= {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}
    folder = write(tmp_path / "old", "pytorch_lora_weights.safetensors", keys)
    assert np.array_equal(draw(tuned, folder, tmp_path), reference)


@pytest.mark.parametrize("naming", ["diffusers", "ldm"])
def test_kohya(tuned, attention: Matrices, reference: np.ndarray, tmp_path: Path, naming: str):
    if naming == "ldm":
        keys = ldm_keys(tuned, attention, RANK)
    else:
        keys = convert_state_dict_to_kohya(peft_keys(attention))
    assert all(key.startswith("lora_unet_") for key in keys)
    folder = write(tmp_path / "kohya", "anything.safetensors", keys)
    assert np.array_equal(draw(tuned, folder, tmp_path), reference)
    assert np.array_equal(draw(tuned, folder / "anything.safetensors", tmp_path), reference), (
        "a bare file too"
    )


def test_layer_names_in_ldm_are_correct():
    config = {
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    known = {
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
        "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
        "down_blocks.2.attentions.1.proj_out": "input_blocks.8.1.proj_out",
        "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
        "up_blocks.0.attentions.0.proj_in": "output_blocks.0.1.proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.attentions.2.proj_in": "output_blocks.5.1.proj_in",
        "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
        "time_embedding.linear_2": "time_embed.2",
    }
    assert unet_names(known, config) == known


def test_all_parts_of_kohyas_file_as_diffusers_reads_them(tuned, attention: Matrices, tmp_path: Path):
    """Text encoders, alpha below the rank, and a scale, against diffusers with peft."""
    keys = ldm_keys(tuned, attention, 2.0)
    encoders = ((tuned.pipeline.text_encoder, "lora_te1"), (tuned.pipeline.text_encoder_2, "lora_te2"))
    for encoder, prefix in encoders:
        for name, (down, up) in random_matrices(encoder, lambda name: name.endswith("_proj"), 0.2).items():
            layer = f"{prefix}_text_model_{name.removeprefix('text_model.').replace('.', '_')}"
            keys |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
            keys[f"{layer}.alpha"] = torch.tensor(2.0)
    folder = write(tmp_path / "kohya", "style.safetensors", keys)
    ours = draw(tuned, folder, tmp_path, scale=0.7)
    theirs = load_pipeline(TINY_BASE, torch.device("cpu"))
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(str(folder), weight_name="style.safetensors", adapter_name="style")
    theirs.set_adapters(["style"], [0.7])
    drawn = picture(theirs, tuned.token_map)
    assert np.abs(ours.astype(int) - drawn).max() <= 2
    assert np.abs(ours.astype(int) - draw(tuned, folder, tmp_path, scale=0.0)).max() > 20

    # The text encoders at a strength of their own.
    loaded = tuned.load(fine_tune_files.read(folder, tmp_path / "unpacked"))
    for strength in (-0.5, 0.0):
        tuned.apply((ScaledFineTune(fine_tune=loaded, scale=0.7, text_encoder_scale=strength),))
        apart = picture(tuned.pipeline, tuned.token_map)
        tuned.activate(None)
        both = {"text_encoder": strength, "text_encoder_2": strength}
        theirs.set_adapters(["style"], [{"unet": 0.7, **both}])  # type: ignore[list-item]
        assert np.abs(apart.astype(int) - picture(theirs, tuned.token_map)).max() <= 2
        assert np.abs(apart.astype(int) - ours).max() > 4


def test_a_lora_beside_clip_embeddings(tuned, attention: Matrices, tmp_path: Path):
    """As for AUTOMATIC1111's web UI: the embedding's file name is its word."""
    generator = torch.Generator().manual_seed(1)
    widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in tuned._encoders]
    rows = [torch.randn(2, width, generator=generator) * 0.05 for width in widths]
    theirs = write(tmp_path / "theirs", "style.safetensors", ldm_keys(tuned, attention, RANK))
    write(theirs, "MYDOG.safetensors", {"clip_l": rows[0], "clip_g": rows[1]})
    ours = write(tmp_path / "ours", "lora.safetensors", peft_keys(attention))
    write_embeddings(ours / "embeddings.pti", rows)
    (ours / "special_params.json").write_text(json.dumps({"MYDOG": "<s0><s1>"}))
    drawn = draw(tuned, theirs, tmp_path, prompt="a photo of MYDOG")
    assert np.array_equal(drawn, draw(tuned, ours, tmp_path, prompt="a photo of MYDOG"))
    assert not np.array_equal(drawn, draw(tuned, ours, tmp_path, prompt="a photo of a dog"))


def test_several_loras_add_up_and_keep_their_words_apart(tuned, attention: Matrices, tmp_path: Path):
    half = {name: (down, up / 2) for name, (down, up) in attention.items()}
    sources = []
    for index in range(2):
        folder = write(tmp_path / str(index), "lora.safetensors", peft_keys(half))
        rows = [
            torch.full((1, e.get_input_embeddings().weight.shape[1]), 0.1 * (index + 1))
            for e in tuned._encoders
        ]
        write_embeddings(folder / "embeddings.pti", rows)
        (folder / "special_params.json").write_text(json.dumps({"TOK": "<s0>"}))
        sources.append(tuned.load(fine_tune_files.read(folder, folder)))
    tuned.apply(tuple(ScaledFineTune(fine_tune=one) for one in sources))
    assert tuned.token_map.placeholders == {"TOK": "<s0>", "TOK_2": "<s1>"}
    both = picture(tuned.pipeline, tuned.token_map)
    words = [picture(tuned.pipeline, tuned.token_map, prompt=f"a {word}") for word in ("TOK", "TOK_2")]
    assert not np.array_equal(*words)
    tuned.activate(None)
    whole = draw(tuned, write(tmp_path / "whole", "lora.safetensors", peft_keys(attention)), tmp_path)
    assert np.abs(both.astype(int) - whole).max() <= 2


PATTERNS = {
    "one": {r".*attn\d\.to_(q|k)": 1.5, r"to_.+": 6.0},
    "several": {
        r"down_blocks\.1\..*": 0.5,
        "to_out.0": 9,
        r"mid_block.*attn2\.to_[kv]": 4.0,
        r"^up_blocks.*": 0.0,
    },
    "names": {"to_q": 1, "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k": 5},
}


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("patterns", PATTERNS)
def test_patterns_of_alphas_and_ranks_as_diffusers_reads_them(
    tuned, attention: Matrices, tmp_path: Path, patterns: str, rank_stabilised: bool
):
    """On the UNet and a text encoder, with two ranks. The first pattern that matches counts."""
    two_ranks = {
        name: (torch.cat([down, down[:2]]), torch.cat([up, up[:, :2]], 1)) if "attn2" in name else (down, up)
        for name, (down, up) in attention.items()
    }
    encoder = random_matrices(tuned.pipeline.text_encoder, lambda name: name.endswith("_proj"), 0.2)
    config: dict[str, Any] = {"r": RANK, "lora_alpha": 2, "use_rslora": rank_stabilised}
    unet = config | {"rank_pattern": {r".*attn2\..*": RANK + 2}, "alpha_pattern": PATTERNS[patterns]}
    unet["target_modules"] = list(two_ranks)
    text = config | {"alpha_pattern": {r"layers\.0\..*": 7.5}, "target_modules": list(encoder)}
    packed = {f"unet.{key}": value for key, value in unet.items()}
    packed |= {f"text_encoder.{key}": value for key, value in text.items()}
    folder = tmp_path / "theirs"
    folder.mkdir()
    keys = {key: value.contiguous() for key, value in peft_keys(two_ranks).items()}
    keys |= peft_keys(encoder, "text_encoder")
    save_file(keys, folder / "style.safetensors", metadata={"lora_adapter_metadata": json.dumps(packed)})

    ours = draw(tuned, folder, tmp_path)
    theirs = load_pipeline(TINY_BASE, torch.device("cpu"))
    theirs.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of patterns that match a part of the layers only
        theirs.load_lora_weights(str(folder), weight_name="style.safetensors")
    assert np.abs(ours.astype(int) - picture(theirs, tuned.token_map)).max() <= 2


def test_a_pattern_may_name_a_layer_that_has_its_own_alpha(tuned, attention: Matrices):
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    keys = peft_keys({layer: attention[layer]}) | {f"unet.{layer}.alpha": torch.tensor(6.0)}
    packed = json.dumps({"unet.alpha_pattern": {layer: 2.0}})
    read = read_lora(keys, {"lora_adapter_metadata": packed}, tuned._names, "style.safetensors")
    assert read[f"unet.{layer}.weight"].scale == 6.0 / RANK


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys: {**keys, "unet.nowhere.lora_A.weight": torch.zeros(1, 1)}, "for no layer of this base"),
        (lambda keys: {key: value for key, value in keys.items() if "_B" not in key}, "only half"),
        (lambda keys: {key: value[:, :1] for key, value in keys.items()}, "no valid LoRA matrices"),
        (
            lambda keys: {key: value if "_B" in key else value[:, :1] for key, value in keys.items()},
            "does not fit this base",
        ),
        (
            lambda keys: {**keys, "unet.mid_block.attentions.0.proj_in.dora_scale": torch.ones(1)},
            "only half of the LoRA of unet.mid_block.attentions.0.proj_in",
        ),
        (lambda keys: {"lora_unet_mid_block_attentions_0_proj_in.oft_blocks": torch.ones(2, 2)}, "OFT"),
        (lambda keys: {key: value[:0] for key, value in keys.items()}, "no valid LoRA matrices"),
        (lambda keys: {key: value.flatten() for key, value in keys.items()}, "no valid LoRA matrices"),
        (lambda keys: {key: torch.tensor(1.0) for key in keys}, "no valid LoRA matrices"),
        (
            lambda keys: {
                "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(1, 4),
                "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(4, 1),
                "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.ones(2),
            },
            "no valid LoRA matrices",
        ),
        (lambda keys: {"something.weight": torch.ones(2, 2)}, "holds no UNet, LoRA or embeddings"),
    ],
)
def test_loras_that_cannot_be_read_say_why(tuned, attention: Matrices, tmp_path: Path, change, message: str):
    folder = write(tmp_path / "bad", "style.safetensors", change(peft_keys(attention)))
    with pytest.raises(WeightsError, match=message):
        draw(tuned, folder, tmp_path)
