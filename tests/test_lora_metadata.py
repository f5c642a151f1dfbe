"""Alphas in the metadata of a LoRA are read as peft reads them, and nothing doubtful is guessed."""

import json
import math
from typing import Any

import pytest
from peft.utils.other import get_pattern_key

from sdxl.errors import WeightsError
from sdxl.model import lora_metadata
from sdxl.model.lora_metadata import read_alphas

NAMES = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q",
    "down_blocks.11.resnets.0.conv1",
    "mid_block.attentions.0.proj_in",
    "time_embedding.linear_1",
]


def read(config: dict[str, Any], ranks: dict[str, int], part: str = "unet") -> dict[str, float]:
    """The alphas of layers of one part, by their names in it."""
    packed = {f"{part}.{key}": value for key, value in config.items()}
    metadata = {"lora_adapter_metadata": json.dumps(packed)}
    alphas = read_alphas(metadata, {f"{part}.{name}": rank for name, rank in ranks.items()}, "a.safetensors")
    return {layer.removeprefix(f"{part}."): alpha for layer, alpha in alphas.items()}


@pytest.mark.parametrize(
    "patterns",
    [
        {"to_q": 1.0},
        {"attn1.to_q": 1.0, "to_q": 2.0},
        {"to_q": 2.0, "attn1.to_q": 1.0},
        {r".*attn\d\.to_(q|out\.0)": 1.0},
        {NAMES[0]: 1.0, "conv1": 2.0},
        {"1.resnets.0.conv1|to_q": 1.0},
        {"to.q": 1.0, r"\w+": 3.0},
        {r"^mid.*": 1.0, r"(.*\.)?proj_in": 2.0},
        {r"down_blocks\.1\..*": 4, r".*": 5},
        {r"(?:[a-z]+_\d$)": 1.0},
        {},
    ],
)
def test_patterns_match_as_in_peft(patterns: dict[str, float]):
    ours = read({"lora_alpha": 8.0, "alpha_pattern": patterns}, dict.fromkeys(NAMES, 4))
    theirs = {name: patterns.get(get_pattern_key(list(patterns), name), 8.0) for name in NAMES}
    assert ours == theirs


def test_defaults_are_those_of_peft_and_without_a_configuration_the_rank():
    assert read({"r": 4}, {NAMES[0]: 4}) == {NAMES[0]: 8.0}
    assert read({}, {NAMES[0]: 4}) == {NAMES[0]: 4.0}
    assert read_alphas({}, {"unet.a": 3}, "a") == {"unet.a": 3.0}
    assert read({"lora_alpha": 2, "use_rslora": True}, {NAMES[0]: 4}) == {NAMES[0]: 2 * math.sqrt(4)}


@pytest.mark.parametrize("name", ["encoder.layers.0.fc1", "text_model.encoder.layers.0.fc1"])
@pytest.mark.parametrize("pattern", ["fc1", r"encoder\.layers\.0\..*", "text_model.encoder.layers.0.fc1"])
def test_the_level_text_model_may_be_missing_on_either_side(name: str, pattern: str):
    for part in ("text_encoder", "text_encoder_2"):
        assert read({"alpha_pattern": {pattern: 3.0}}, {name: 2}, part) == {name: 3.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"alpha_pattern": {"to_nothing": 1.0}},
            r"sets 'to_nothing' in alpha_pattern, but no layer in it has",
        ),
        ({"alpha_pattern": {"to_q": 1.0, "o_q": 1.0}}, "sets 'o_q' in alpha_pattern"),
        ({"alpha_pattern": {"to_(q": 1.0}}, r"has 'to_\(q' in alpha_pattern, which is no regular expression"),
        ({"alpha_pattern": {"a{9999999999999999999}": 1.0}}, "which is no regular expression"),
        (
            {"alpha_pattern": {"x" * 501: 1.0}},
            "…'? in alpha_pattern, which is no regular expression of at most 500",
        ),
        ({"alpha_pattern": [1]}, r"metadata that cannot be read \(alpha_pattern\)"),
        ({"alpha_pattern": {"to_q": "1"}}, "the alpha '1', which is no number"),
        ({"lora_alpha": None}, "the alpha None, which is no number"),
        ({"lora_alpha": True}, "the alpha True, which is no number"),
        ({"lora_alpha": float("nan")}, "the alpha nan, which is no number"),
        ({"r": 8}, "the rank 8 in its metadata, but its matrices have rank 4"),
        (
            {"r": 4, "rank_pattern": {"to_[qk]": 2}},
            "the rank 2 in its metadata, but its matrices have rank 4",
        ),
        ({"rank_pattern": {"+": 2}}, "has '\\+' in rank_pattern, which is no regular expression"),
    ],
)
def test_what_is_doubtful_is_refused(config: dict[str, Any], message: str):
    with pytest.raises(WeightsError, match=message) as caught:
        read(config, dict.fromkeys(NAMES, 4))
    said = str(caught.value)
    assert said.startswith("a.safetensors ") and said.endswith(".") and "\n" not in said and len(said) < 400


@pytest.mark.parametrize("text", ["{", "[]", "1", "null", "[" * 100_000])
def test_metadata_that_is_no_object_is_refused(text: str):
    with pytest.raises(
        WeightsError, match=r"^a has metadata that cannot be read \(lora_adapter_metadata\): save"
    ):
        read_alphas({"lora_adapter_metadata": text}, {"unet.a": 3}, "a")


@pytest.mark.parametrize("pattern", [r"(([a-z0-9_.])+)+X", r"(\w\w|\w|\.)*X", ".?" * 80 + "." * 58])
def test_an_expression_that_never_ends_is_stopped(pattern: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lora_metadata, "_TIMEOUT_S", 0.5)
    with pytest.raises(WeightsError, match="regular expressions in alpha_pattern that take too long: save"):
        read({"alpha_pattern": {pattern: 1.0}}, dict.fromkeys(NAMES, 4))


def test_a_name_for_each_layer_of_sdxl_is_quick():
    names = {f"down_blocks.{i // 100}.attentions.{i % 100}.attn1.to_q": 4 for i in range(800)}
    assert read({"alpha_pattern": dict.fromkeys(names, 2.0)}, names) == dict.fromkeys(names, 2.0)
