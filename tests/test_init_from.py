"""A training begins with any fine-tune that is read: exactly, or it is refused in a sentence."""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import train
from sdxl.errors import UserInputError, WeightsError
from sdxl.files.archives import unpack
from sdxl.model import fine_tune_files
from sdxl.model.components import Components, load_components
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.model.loaded_fine_tune import LoadedFineTune, load_for
from sdxl.training.recipe import fine_tune
from sdxl.training.starting_point import StartingPoint
from tests.conftest import QUICK, TINY_BASE, call
from tests.test_resume import examples
from tests.test_training import CONFIG

STILL = dataclasses.replace(
    CONFIG, max_train_steps=1, train_batch_size=1, pivot_fraction=0.0, unet_learning_rate=1e-30, lora_lr=0.0
)
"""A training that changes nothing, so that its result is what it began with."""


@pytest.fixture(scope="module")
def unpacked(fine_tunes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a full fine-tune and of a LoRA."""
    folders = {name: tmp_path_factory.mktemp(name) for name in fine_tunes}
    for name, tar in fine_tunes.items():
        unpack(tar, folders[name])
    return folders


def rank_in(folder: Path) -> int:
    return next(len(v) for n, v in load_file(folder / "lora.safetensors").items() if "lora_A" in n)


def begun(source: Path, **changes: Any) -> tuple[TrainedFineTune, LoadedFineTune]:
    """The result of a training that begins with `source` and changes nothing, and what was read."""
    config = dataclasses.replace(STILL, **changes)
    components = load_components(TINY_BASE, is_lora=config.is_lora, device=torch.device("cpu"))
    read = load_for(components, fine_tune_files.read(source, source.parent / "unpacked"))
    point = StartingPoint(fine_tune=read, config=config)
    return fine_tune(components, examples(components), config, begin_with=point), read


def products(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The change of each layer that a LoRA of this project makes."""
    ups = {name: value for name, value in weights.items() if "lora_B" in name}
    return {n: v.flatten(1) @ weights[n.replace("lora_B", "lora_A")].flatten(1) for n, v in ups.items()}


def test_a_lora_goes_on_with_its_matrices_and_rows(unpacked: dict[str, Path]):
    folder = unpacked["lora"]
    result, _ = begun(folder, is_lora=True, lora_targets="transformer", lora_rank=rank_in(folder))
    assert result.weights.keys() == load_file(folder / "lora.safetensors").keys()
    for name, value in load_file(folder / "lora.safetensors").items():
        assert torch.equal(result.weights[name], value), name
    rows = load_file(folder / "embeddings.pti")
    assert [torch.equal(r, rows[f"text_encoders_{i}"]) for i, r in enumerate(result.token_rows)] == [True] * 2


def test_a_lora_goes_on_in_a_larger_one_from_names_of_web_uis(unpacked: dict[str, Path]):
    [file] = (unpacked["lora"] / "web_ui").glob("*lora*.safetensors")
    larger = {
        "is_lora": True,
        "lora_targets": "all",
        "lora_rank": 2 * rank_in(unpacked["lora"]),
        "lora_alpha": 8,
    }
    result, _ = begun(file, **larger)
    expected = products(load_file(unpacked["lora"] / "lora.safetensors"))
    found = products(result.weights)
    assert len(found) > len(expected)
    for name, value in found.items():
        assert torch.allclose(value, expected.get(name, torch.zeros(())), atol=1e-4), name  # fp16


def test_a_dora_goes_on_with_its_lengths(tmp_path: Path, unpacked: dict[str, Path]):
    settings = {"is_lora": True, "use_dora": True, "lora_rank": 4}
    components = load_components(TINY_BASE, is_lora=True, device=torch.device("cpu"))
    learned = dataclasses.replace(STILL, **settings, lora_lr=1e-2)
    trained = fine_tune(components, examples(components), learned)
    save_file(trained.weights, tmp_path / "dora.safetensors")
    result, _ = begun(tmp_path / "dora.safetensors", **settings)
    assert all(torch.equal(result.weights[name], value) for name, value in trained.weights.items())
    with pytest.raises(WeightsError, match="no plain LoRA"):
        begun(tmp_path / "dora.safetensors", is_lora=True)
    with pytest.raises(WeightsError, match="no DoRA of this kind"):
        begun(unpacked["lora"], **settings)


def test_the_whole_unet_begins_with_a_whole_one(unpacked: dict[str, Path]):
    result, _ = begun(unpacked["full"])
    for name, value in load_file(unpacked["full"] / "unet.safetensors").items():
        assert torch.equal(result.weights[name], value), name


def test_the_whole_unet_begins_with_a_lora_added(unpacked: dict[str, Path], base: Components):
    result, read = begun(unpacked["lora"])
    assert read.lora
    before = dict(base.unet.named_parameters())
    for name, value in result.weights.items():
        expected = before[name].detach()
        if change := read.lora.get(f"unet.{name}"):
            expected = expected + change.delta(expected)
        assert torch.allclose(value.float(), expected, atol=1e-3), name


@pytest.fixture(scope="module")
def base() -> Components:
    return load_components(TINY_BASE, is_lora=False, device=torch.device("cpu"))


def test_what_does_not_fit_is_refused(unpacked: dict[str, Path]):
    lora, full, rank = unpacked["lora"], unpacked["full"], rank_in(unpacked["lora"])
    wide = {"is_lora": True, "lora_rank": 64}
    for source, changes, message in (
        (lora, {"is_lora": True, "lora_rank": 2}, f"has rank {rank} (at "),
        (lora, {**wide, "lora_targets": "attention"}, "which lora_targets=attention does not train"),
        (lora, {**wide, "token_map": "TOK:3"}, "has 2 rows for TOK, but token_map asks for 3: write TOK:2."),
        (full, wide, "is a whole UNet, with which a LoRA cannot begin"),
    ):
        with pytest.raises(WeightsError, match=re.escape(message)) as caught:
            begun(source, **changes)
        assert len(str(caught.value)) <= 300


def test_other_tokens_begin_anew_and_that_is_told(
    unpacked: dict[str, Path], caplog: pytest.LogCaptureFixture
):
    result, read = begun(unpacked["full"], token_map="OTHER:2")
    assert not torch.equal(result.token_rows[0], read.rows[0])
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        f"{read.name} has rows for TOK, but token_map names other tokens, which begin anew."
    ]


def test_a_part_for_the_text_encoders_is_left_out_and_told(
    base: Components, tmp_path: Path, unpacked: dict[str, Path], caplog: pytest.LogCaptureFixture
):
    tensors = load_file(unpacked["lora"] / "lora.safetensors")
    width = base.text_encoders[0].config.hidden_size
    layer = "text_encoder.encoder.layers.0.self_attn.q_proj"
    tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = (
        torch.ones(2, width),
        torch.ones(width, 2),
    )
    save_file(tensors, tmp_path / "both.safetensors")
    result, _ = begun(tmp_path / "both.safetensors", is_lora=True, lora_rank=rank_in(unpacked["lora"]))
    assert not any("text_encoder" in name for name in result.weights)
    assert "both.safetensors also changes the text encoders" in caplog.text


def test_a_training_takes_it_as_an_input(captioned_zip: Path, fine_tunes: dict[str, Path], tmp_path: Path):
    with pytest.raises(UserInputError, match=r"lora\.tar has rank"):
        call(
            train.train,
            input_images=captioned_zip,
            init_from=str(fine_tunes["lora"]),
            is_lora=True,
            lora_rank=1,
            **QUICK,
        )
    tar = call(
        train.train, input_images=captioned_zip, init_from=str(fine_tunes["full"]), is_lora=False, **QUICK
    )
    unpack(tar, tmp_path / "out")
    record = fine_tune_files.read_record(tmp_path / "out")
    assert len(record["init_from"]) == 64
