"""What a training writes for web UIs, held against the names that those know at SDXL's size."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dataset_and_utils import TokenMap
from sdxl.model.components import Components, load_components
from sdxl.model.fine_tune_files import WEB_UI, TrainedFineTune
from sdxl.model.low_rank import LoraMatrices, within
from sdxl.model.trained_web_ui import write_for_web_uis
from sdxl.model.web_ui_files import file_stems, layer_names, rows_by_word, weights_stem, write_embeddings
from sdxl.model.web_ui_metadata import About
from sdxl.training.config import TrainingConfig
from sdxl.training.trainable import LORA_TARGETS, lora
from tests import reader_names
from tests.named_base import WIDTHS

RANK, ALPHA = 2, 3
HOSTILE = [
    "a/b",
    "../../etc/x",
    "..",
    ".hidden",
    "a.b",
    "CON",
    "TOK",
    "tok",
    "a b",
    "C:\\x",
    "x" * 400,
    "日本",
    "／",
    "é",
    "\u0065\u0301",
    "-",
]
ABOUT = About(words=("TOK",), resolution=1024)


@pytest.fixture(scope="module")
def components(named_base: Path) -> Components:
    return load_components(named_base, is_lora=True, device=torch.device("cpu"))


def trained(components: Components, targets: str, *, dora: bool) -> tuple[TrainedFineTune, dict]:
    """A LoRA with random second matrices, as a training gives it, and the record of its run."""
    config = TrainingConfig(
        base="someone/base", resolution=64, max_train_steps=7, seed=5, is_lora=True, lora_rank=RANK,
        lora_alpha=ALPHA, use_dora=dora, lora_targets=targets, lora_lr=1e-4, unet_learning_rate=1e-6, ti_lr=3e-4,
        lr_warmup_steps=0,
    )  # fmt: skip
    torch.manual_seed(0)
    trainable = lora(components.unet, config)
    with torch.no_grad():
        for name, parameter in components.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    weights = trainable.export()
    components.unet.delete_adapters("default")
    rows = [torch.randn(2, width) for width in WIDTHS]
    made = TrainedFineTune(kind="lora", weights=weights, token_rows=rows, token_map=TokenMap.parse("TOK:2"))
    return made, {"settings": config.as_json(), "dataset_files": 6}


@pytest.fixture(scope="module")
def full_size() -> UNet2DConditionModel:
    """SDXL's UNet at its size, without memory for weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_readers_know_every_name_at_full_size(full_size: UNet2DConditionModel, targets: str):
    ends = tuple(f".{end}" for end in LORA_TARGETS[targets])
    layers = [f"unet.{name}" for name, _ in full_size.named_modules() if name.endswith(ends)]
    included = list(LORA_TARGETS)[: list(LORA_TARGETS).index(targets) + 1]
    known = {name for name, smallest in reader_names.UNET.items() if smallest in included}
    assert set(layer_names(layers, full_size.config).values()) == known
    assert set(layer_names(layers, None).values()) == {
        f"lora_unet_{reader_names.invoke_name(n)}" for n in known
    }
    assert len(layers) == len(known) == {"attention": 560, "transformer": 722, "all": 771}[targets]


@pytest.mark.parametrize(("targets", "dora"), [("attention", False), ("all", True)])
def test_no_layer_is_lost(components: Components, targets: str, dora: bool, tmp_path: Path):
    made, record = trained(components, targets, dora=dora)
    write_for_web_uis(made, tmp_path, record, components)
    tensors = load_file(tmp_path / WEB_UI / "TOK_lora.safetensors")
    found = {key.partition(".")[0] for key in tensors} - {"bundle_emb"}
    assert found <= reader_names.UNET.keys()

    # InvokeAI's layer is the one that was trained, and the matrices are the trained ones.
    layers = {name.removesuffix(".lora_A.weight") for name in made.weights if name.endswith(".lora_A.weight")}
    by_flat_name = {layer.removeprefix("unet.").replace(".", "_"): layer for layer in layers}
    taken = {by_flat_name[str(reader_names.invoke_name(name))]: name for name in found}
    assert taken.keys() == layers
    for layer, name in taken.items():
        assert float(tensors[f"{name}.alpha"]) == ALPHA
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        assert torch.equal(down, made.weights[f"{layer}.lora_A.weight"].half())
        torch.testing.assert_close(
            up.float() * ALPHA / RANK, made.weights[f"{layer}.lora_B.weight"], rtol=2e-3, atol=1e-4
        )
        assert (f"{name}.dora_scale" in tensors) == dora
        if dora:
            scale = tensors[f"{name}.dora_scale"]
            assert scale.shape == (len(up), *(1 for _ in down.shape[1:])), "one number for each output"
            assert torch.equal(scale.flatten(), made.weights[f"{layer}.lora_magnitude_vector"].flatten())
    bundled = {key: value for key, value in tensors.items() if key.startswith("bundle_emb.")}
    assert bundled.keys() == {"bundle_emb.TOK.clip_l", "bundle_emb.TOK.clip_g"}
    assert all(
        torch.equal(bundled["bundle_emb.TOK." + k], made.token_rows[i])
        for i, k in enumerate(("clip_l", "clip_g"))
    )


def test_readers_know_the_text_encoders(components: Components):
    layers = [
        f"{part}.{name}"
        for part, encoder in zip(("text_encoder", "text_encoder_2"), components.text_encoders, strict=True)
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear)
    ]
    assert set(layer_names(layers, components.unet.config).values()) == reader_names.ENCODERS


def test_metadata(components: Components, tmp_path: Path):
    made, record = trained(components, "attention", dora=False)
    write_for_web_uis(made, tmp_path, record, components)
    with safe_open(tmp_path / WEB_UI / "TOK_lora.safetensors", framework="pt") as file:
        shown = file.metadata()
    assert shown["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert shown["modelspec.trigger_phrase"] == "TOK"
    assert shown["modelspec.prediction_type"] == "epsilon"
    assert shown["modelspec.resolution"] == "64x64"
    assert shown["ss_base_model_version"] == "sdxl_base_v1-0"
    assert (shown["ss_network_module"], shown["ss_network_dim"], shown["ss_network_alpha"]) == (
        "networks.lora",
        "2",
        "3",
    )
    assert json.loads(shown["ss_tag_frequency"]) == {"training": {"TOK": 6}}
    assert (shown["ss_steps"], shown["ss_seed"], shown["ss_sd_model_name"]) == ("7", "5", "someone/base")
    with safe_open(tmp_path / WEB_UI / "TOK.safetensors", framework="pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"


def test_where_a_base_lies_is_not_told():
    record = {"settings": {"base": "/home/somebody/models/my-sdxl"}}
    assert dataclasses.replace(ABOUT, record=record).base == "my-sdxl"


def test_words_become_safe_file_names(tmp_path: Path):
    stems = file_stems(HOSTILE)
    assert all(
        re.fullmatch(r"\w[\w-]*", stem) and len(f"{stem}.safetensors".encode()) <= 255
        for stem in stems.values()
    )
    assert len({stem.casefold() for stem in stems.values()}) == len(HOSTILE)
    assert (stems["a/b"], stems["TOK"], stems["tok"], stems["CON"]) == ("a_b", "TOK", "tok_2", "CON_")
    inside = tmp_path / "inside"
    inside.mkdir()
    words = {word: (torch.ones(1, 2), torch.ones(1, 3)) for word in HOSTILE}
    written = write_embeddings(inside, words, ABOUT)
    assert sorted(written) == sorted(inside.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


def test_the_weights_have_a_name_of_their_own():
    assert weights_stem(["TOK"], "lora") == "TOK_lora"
    assert weights_stem(["TOK", "TOK_lora"], "lora") == "TOK_TOK_lora_lora"
    assert weights_stem([], "lora") == "lora"
    assert weights_stem(["lora", "x" * 60], "lora") == "lora_2"


def test_words_get_their_own_rows():
    rows = [torch.arange(8.0).reshape(4, 2), torch.arange(12.0).reshape(4, 3)]
    words = rows_by_word(rows, TokenMap({"A": "<s3>", "B": "<s0><s2>", "MISSING": "<s9>"}))
    assert words.keys() == {"A", "B"}
    assert torch.equal(words["B"][1], rows[1][[0, 2]])
    assert torch.equal(rows_by_word(rows, TokenMap({}))["TOK"][0], rows[0])
    assert rows_by_word([], TokenMap({"A": "<s0>"})) == {}


@pytest.mark.parametrize("change", [lambda t: t, lambda t: t * 1e6])
def test_numbers_that_half_precision_cannot_hold_stay(change: Callable[[Tensor], Tensor]):
    tensor = change(torch.tensor([0.5, -2.0]))
    assert torch.equal(within(tensor, torch.float16).float(), tensor)


def test_another_alpha_is_the_same_change():
    layer = LoraMatrices(down=torch.randn(4, 3), up=torch.randn(5, 4), alpha=2.0)
    for other in (layer.folded(), layer.with_alpha(7.0)):
        torch.testing.assert_close(
            other.alpha / other.rank * other.up @ other.down, layer.alpha / layer.rank * layer.up @ layer.down
        )
    assert layer.folded().alpha == layer.rank
