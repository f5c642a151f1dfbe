"""Token map, captions file and embeddings file: the contract on disk."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

from dataset_and_utils import (
    ContractError,
    TokenEmbeddingsHandler,
    TokenMap,
    UserInputError,
    read_embeddings,
    write_embeddings,
)
from tests.conftest import TINY_BASE


def test_token_map_counts_rows_across_tokens():
    assert TokenMap.parse("TOK:2").placeholders == {"TOK": "<s0><s1>"}
    two = TokenMap.parse("CLOCK_TOK:2, MT_TOK:3")
    assert two.placeholders == {"CLOCK_TOK": "<s0><s1>", "MT_TOK": "<s2><s3><s4>"}
    assert two.new_tokens == ["<s0>", "<s1>", "<s2>", "<s3>", "<s4>"]


def test_token_init_gives_every_row_of_a_token_its_word():
    token_map = TokenMap.parse("CLOCK_TOK:2,MT_TOK:1")
    assert token_map.parse_init("CLOCK_TOK:clock, MT_TOK:tiny monster") == {
        "<s0>": "clock",
        "<s1>": "clock",
        "<s2>": "tiny monster",
    }
    assert token_map.parse_init("") == {}
    for wrong in ("clock", "CAT:dog", "MT_TOK:"):
        with pytest.raises(ContractError, match="token_init"):
            token_map.parse_init(wrong)


@pytest.mark.parametrize(
    "text", ["", "TOK", "TOK:0", "TOK:x", "TOK:-1", "T0K:2", "TOK:2,,", "TOK:2,TOK:1", "A B:1", "TOK:99"]
)
def test_wrong_token_maps_are_refused(text: str):
    with pytest.raises(ContractError, match="token_map"):
        TokenMap.parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo of TOK", "a photo of <s0><s1>"),
        ("TOK, TOK's hat and (TOK)", "<s0><s1>, <s0><s1>'s hat and (<s0><s1>)"),
        ("stock STOCK TOKEN tok MY_TOK TOK2", "stock STOCK TOKEN tok MY_TOK TOK2"),
        ("<s0><s1> stays", "<s0><s1> stays"),
        ("", ""),
    ],
)
def test_substitution_is_whole_word_and_case_sensitive(text: str, expected: str):
    assert TokenMap.parse("TOK:2").substitute(text) == expected


def test_a_token_inside_another_is_not_confused():
    token_map = TokenMap.parse("TOK:1,MT_TOK:2")
    assert token_map.substitute("TOK and MT_TOK") == "<s0> and <s1><s2>"


def test_special_params_round_trip(tmp_path: Path):
    path = tmp_path / "special_params.json"
    TokenMap.parse("A:1,B_:2").write(path)
    assert json.loads(path.read_text()) == {"A": "<s0>", "B_": "<s1><s2>"}
    assert TokenMap.read(path) == TokenMap.parse("A:1,B_:2")


@pytest.mark.parametrize("content", ["[]", "{", '{"TOK": 3}', '{"TOK": "word"}', '"x"', '{"": "<s0>"}'])
def test_malformed_special_params_are_refused(tmp_path: Path, content: str):
    path = tmp_path / "special_params.json"
    path.write_text(content)
    with pytest.raises(ContractError, match="special_params"):
        TokenMap.read(path)


def test_embeddings_round_trip(tmp_path: Path):
    rows = [torch.randn(3, 8), torch.randn(3, 12)]
    write_embeddings(tmp_path / "e.pti", rows)
    read, at_eos = read_embeddings(tmp_path / "e.pti")
    assert at_eos
    assert all(torch.equal(a, b) for a, b in zip(rows, read, strict=True))


@pytest.mark.parametrize("tensors", [{"x": torch.zeros(1, 2)}, {"text_encoders_0": torch.zeros(2)}])
def test_malformed_embeddings_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]):
    save_file(tensors, tmp_path / "e.pti")
    with pytest.raises(ContractError, match=r"e\.pti"):
        read_embeddings(tmp_path / "e.pti")


def _pipeline() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(TINY_BASE, variant="fp16", dtype=torch.float32)


def _handler(pipe: StableDiffusionXLPipeline) -> TokenEmbeddingsHandler:
    return TokenEmbeddingsHandler(
        [pipe.text_encoder, pipe.text_encoder_2], [pipe.tokenizer, pipe.tokenizer_2]
    )


def _rows(pipe: StableDiffusionXLPipeline, count: int = 2) -> list[torch.Tensor]:
    widths = [
        encoder.get_input_embeddings().weight.shape[1] for encoder in (pipe.text_encoder, pipe.text_encoder_2)
    ]
    return [torch.randn(count, width) * 0.05 for width in widths]


def _pooled(pipe: StableDiffusionXLPipeline, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[2]


def test_handler_sets_the_rows_and_leaves_the_table(tmp_path: Path):
    pipe = _pipeline()
    rows = _rows(pipe)
    before = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    write_embeddings(tmp_path / "e.pti", rows)
    _handler(pipe).load_embeddings(tmp_path / "e.pti")
    for encoder, tokenizer, row in zip(
        (pipe.text_encoder, pipe.text_encoder_2), (pipe.tokenizer, pipe.tokenizer_2), rows, strict=True
    ):
        ids = tokenizer("a photo of <s0><s1>", add_special_tokens=False).input_ids[-2:]
        assert torch.equal(encoder.get_input_embeddings().weight[ids], row)
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[: len(before)], before)
    _handler(pipe).save_embeddings(tmp_path / "again.pti")
    assert all(
        torch.equal(a, b) for a, b in zip(read_embeddings(tmp_path / "again.pti")[0], rows, strict=True)
    )


def test_handler_refuses_embeddings_of_another_base(tmp_path: Path):
    write_embeddings(tmp_path / "e.pti", [torch.zeros(1, 768), torch.zeros(1, 1280)])
    with pytest.raises(ContractError, match="widths"):
        _handler(_pipeline()).load_embeddings(tmp_path / "e.pti")


def test_marked_embeddings_pool_at_the_end_of_text(tmp_path: Path):
    """With the published `eos_token_id` 2, the pooled output would come from a new token; marked files prevent this."""
    pipe = _pipeline()
    assert pipe.text_encoder_2.config.eos_token_id == 2, "the miniature has SDXL's published configuration"
    plain_before = _pooled(pipe, "a red circle")
    write_embeddings(tmp_path / "e.pti", _rows(pipe))
    _handler(pipe).load_embeddings(tmp_path / "e.pti")
    assert not torch.allclose(_pooled(pipe, "<s0><s1> on red"), _pooled(pipe, "<s0><s1> on blue"))
    assert torch.allclose(_pooled(pipe, "a red circle"), plain_before, atol=1e-6)


def test_unmarked_embeddings_pool_the_old_way(tmp_path: Path):
    """Fine-tunes of 2023–24 were trained with the pooled output of the new token, which ignores all text after it."""
    pipe = _pipeline()
    rows = _rows(pipe)
    save_file({f"text_encoders_{index}": row for index, row in enumerate(rows)}, tmp_path / "old.pti")
    _handler(pipe).load_embeddings(tmp_path / "old.pti")
    assert torch.allclose(_pooled(pipe, "<s0><s1> on red"), _pooled(pipe, "<s0><s1> on blue"), atol=1e-6)
    assert not torch.allclose(_pooled(pipe, "red <s0><s1>"), _pooled(pipe, "blue <s0><s1>"))


def test_messages_are_one_line_that_can_be_printed():
    said = str(UserInputError("a\nb\x1b[31m\u2028\ud800" + "x" * 5000 + ": shorten it."))
    assert said.isprintable()
    assert said.startswith("a\N{REPLACEMENT CHARACTER}b")
    assert said.endswith("x: shorten it.")
    assert len(said) <= UserInputError.LONGEST_MESSAGE
    assert (
        str(ContractError("the caption “é” is wrong: change it.")) == "the caption “é” is wrong: change it."
    )
