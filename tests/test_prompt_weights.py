"""Weights in prompts: the grammar, what the text encoders get, and what is drawn."""

import logging
from typing import Any

import numpy as np
import pytest
import torch

from dataset_and_utils import TokenMap, add_tokens
from sdxl.errors import UserInputError
from sdxl.model.components import load_tokenizers
from sdxl.model.prompt_chunks import MOST_CHUNKS, fit, token_ids, weighted_ids, with_weights
from sdxl.model.prompt_weights import Part, weighted
from sdxl.serving.generation import generate
from sdxl.serving.pipeline import load_pipeline
from sdxl.serving.request import DrawingOptions, GenerationRequest
from tests.conftest import TINY_BASE

TOK = TokenMap({"TOK": "<s0><s1>"})


def words(text: str) -> list[tuple[str, float]]:
    """The parts of `text` that are not empty, with rounded weights."""
    return [(part.text.strip(), round(part.weight, 4)) for part in weighted(text) if part.text.strip()]


@pytest.fixture(scope="module")
def tokenizers():
    made = load_tokenizers(TINY_BASE)
    for one in made:
        add_tokens(one, TOK.new_tokens)
    return made


# The grammar ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red fish", [("a red fish", 1)]),
        ("a (red) fish", [("a", 1), ("red", 1.1), ("fish", 1)]),
        ("a (red:1.3) fish", [("a", 1), ("red", 1.3), ("fish", 1)]),
        ("a (red: +.5 ) fish", [("a", 1), ("red", 0.5), ("fish", 1)]),
        ("(red:-1e0)", [("red", -1)]),
        ("a [red] fish", [("a", 1), ("red", 0.9091), ("fish", 1)]),
        ("((a)) [[b]] [(c)]", [("a", 1.21), ("b", 0.8264), ("c", 1)]),
        ("(a (b:2) [c]:1.5) d", [("a", 1.5), ("b", 3), ("c", 1.3636), ("d", 1)]),
        (r"a \(red\) \[fish\] (b)", [("a (red) [fish]", 1), ("b", 1.1)]),
        (r"a \\(red)", [("a \\", 1), ("red", 1.1)]),
        (r"a\b c\n", [(r"a\b c\n", 1)]),
        ("16:9 (a: b) c:d", [("16:9", 1), ("a: b", 1.1), ("c:d", 1)]),
        ("(a BREAK b:1.3)", [("a", 1.3), ("b", 1.3)]),
        ("a <lora:style:0.8> b<LYCO:x:1>", [("a  b", 1)]),
        ("<s0> (TOK:1.2)", [("<s0>", 1), ("TOK", 1.2)]),
        ("()[](:2)", []),
    ],
)
def test_texts_mean_what_is_documented(text: str, expected: list[tuple[str, float]]):
    assert words(text) == expected


@pytest.mark.parametrize(
    "text", ["(a", "a)", "[a", "a]", "(a]", ":) :-(", "a:1.3)", "(a:nan", ")(", "b (a:1.3]"]
)
def test_a_bracket_without_its_partner_is_text(text: str):
    assert weighted(text) == [Part(text=text)]


def test_pairs_are_found_around_lone_brackets():
    assert words("(a [b) c]") == [("a [b", 1.1), ("c]", 1)]
    assert words("a ((b) c") == [("a (", 1), ("b", 1.1), ("c", 1)]


@pytest.mark.parametrize(
    "text", ["(" * 20_000, "[" * 10**4 + ")" * 10**4, " " * 19_990 + "((a", "(:" + "1" * 19_000]
)
def test_pasted_nonsense_is_text(text: str):
    assert "".join(part.text for part in weighted(text)) == text


@pytest.mark.parametrize(
    ("text", "weight"),
    [("(a:10.5)", "10.5"), ("(a:-11)", "-11"), ("(a:NaN)", "nan"), ("((a:4):4)", "16"), ("(a:1e999)", "nan")],
)
def test_absurd_weights_are_refused_by_the_inputs_name(text: str, weight: str):
    for name in ("prompt", "negative_prompt"):
        given: dict[str, Any] = {"prompt": "a fish", "seed": 0, name: text}
        with pytest.raises(
            UserInputError, match=f'^{name} gives "a" the weight {weight}, .* prompt_weights'
        ) as told:
            DrawingOptions(**given)
        assert len(str(told.value)) <= 300
        DrawingOptions(**given, prompt_weights=False)
    assert words("(a:10) (b:-10)") == [("a", 10), ("b", -10)]


# What the encoders get --------------------------------------------------------------------------------------------------


def test_rows_of_a_token_share_its_weight_and_its_chunk(tokenizers):
    [plain] = token_ids(["a TOK red"], tokenizers, TOK)
    [read] = weighted_ids([weighted("a (TOK:1.5) red")], tokenizers, TOK)
    for ids, like, weights in zip(read.ids, plain, read.weights, strict=True):
        assert torch.equal(ids, like)
        assert weights.tolist() == [1, 1, 1.5, 1.5, *[1] * 73]
    [read] = weighted_ids([weighted(f"{'red ' * 74}(TOK:2)")], tokenizers, TOK)
    assert read.weights[0].tolist() == [1] * 78 + [2, 2] + [1] * 74


def test_break_begins_a_chunk_which_may_be_empty(tokenizers):
    [ids] = [read.ids for read in weighted_ids([weighted("red BREAK BREAK (blue)")], tokenizers, TOK)]
    alone = token_ids(["red", "", "blue"], tokenizers, TOK)
    for i in (0, 1):
        assert torch.equal(ids[i], torch.cat([one[i] for one in alone]))


def test_too_many_chunks_are_dropped_and_told_without_brackets(tokenizers):
    parts = weighted(" BREAK ".join(["red"] * 8) + " BREAK (blue:1.2) TOK")
    found = fit(parts, tokenizers, TOK)
    assert found.dropped == "blue TOK" and found.lost == ("TOK",)
    [read] = weighted_ids([parts], tokenizers, TOK)
    assert len(read.ids[0]) == len(read.weights[1]) == MOST_CHUNKS * 77
    assert not fit(weighted("BREAK " * 1000), tokenizers, TOK).dropped


def test_the_mean_of_each_chunk_is_restored():
    hidden = torch.randn(2, 77, 8, generator=torch.Generator().manual_seed(0)) + 1
    weights = torch.ones(2, 77)
    weights[1, 3:5] = 1.4
    found = with_weights(hidden, weights)
    assert torch.equal(found[0], hidden[0]), "a chunk without weights is not even rounded"
    assert torch.allclose(found[1].mean(), hidden[1].mean())
    ratio = found[1] / hidden[1]
    assert torch.allclose(ratio[3] / ratio[2], torch.tensor(1.4))


def test_a_mean_of_nearly_zero_is_left_alone():
    hidden = torch.randn(1, 77, 8, generator=torch.Generator().manual_seed(0))
    hidden -= hidden.mean()
    weights = torch.ones(1, 77)
    weights[0, 1] = -3
    assert torch.allclose(with_weights(hidden, weights), hidden * weights[..., None])
    assert not with_weights(torch.zeros(1, 77, 8), weights).any()
    assert with_weights(hidden.half(), weights).dtype == torch.float16


# What is drawn ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline():
    made = load_pipeline(TINY_BASE, torch.device("cpu"))
    made.set_progress_bar_config(disable=True)
    return made


def drawn(pipeline, prompt: str, **given: Any) -> np.ndarray:
    common = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 4.0, "seed": 3}
    [picture] = generate(pipeline, GenerationRequest(prompt=prompt, **{**common, **given}), TokenMap({}))
    return np.array(picture)


def test_texts_without_marks_are_drawn_as_ever(pipeline):
    text = {"prompt": "a red fish: 16:9, <blue>\\", "negative_prompt": "fog"}
    assert np.array_equal(drawn(pipeline, **text), drawn(pipeline, **text, prompt_weights=False))


@pytest.mark.parametrize(
    ("on", "off"),
    [
        ("a (red:1) fish", "a red fish"),
        (r"a \(red\) fish", "a (red) fish"),
        ("a (red fish", "a (red fish"),
        ("a red fish<lora:x:1>", "a red fish"),
    ],
)
def test_what_weighs_nothing_is_plain_text(pipeline, on: str, off: str):
    assert np.array_equal(drawn(pipeline, on), drawn(pipeline, off, prompt_weights=False))


def test_weights_change_the_picture_in_both_prompts_and_for_the_weighted_word(pipeline):
    asked: list[dict[str, Any]] = [
        {"prompt": "a red fish"},
        {"prompt": "a (red:1.4) fish"},
        {"prompt": "a red (fish:1.4)"},
        {"prompt": "a (red:1.4) fish", "prompt_weights": False},
        {"prompt": "a red fish", "negative_prompt": "blue"},
        {"prompt": "a red fish", "negative_prompt": "(blue:3)"},
        {"prompt": "a red BREAK fish"},
    ]
    assert len({drawn(pipeline, **one).tobytes() for one in asked}) == len(asked)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompt": "a (red:1.2) [fish], [12:30 h]"}, None),
        (
            {"prompt": "a fish <lora:style:0.8>"},
            "<lora:style:0.8> in the prompt loads nothing: give the LoRA as extra_",
        ),
        ({"prompt": "a <lora:x:1>", "prompt_weights": False}, "<lora:x:1> in the prompt loads nothing"),
        ({"prompt": "a", "negative_prompt": "<lora:x:1>"}, "<lora:x:1> in the negative prompt loads nothing"),
        ({"prompt": "a [cat:dog:0.5]"}, 'The prompt has words that change with the steps, "[cat:dog:0.5]…"'),
        ({"prompt": "a [cat|dog]"}, "The prompt has words that change with the steps"),
        ({"prompt": "a [cat|dog]", "prompt_weights": False}, None),
    ],
)
def test_what_other_programs_read_otherwise_is_told(
    pipeline, given: dict[str, Any], told: str | None, caplog: pytest.LogCaptureFixture
):
    drawn(pipeline, **given, num_inference_steps=1)
    warnings = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert len(warnings) == (told is not None)
    assert all(one.startswith(str(told)) for one in warnings)
