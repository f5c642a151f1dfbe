"""Captions and prompts that are longer than 600 tokens: read in chunks, and told or refused beyond eight of them."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from dataset_and_utils import TokenMap
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.errors import DatasetError
from sdxl.model.components import Components, load_components, load_tokenizers
from sdxl.model.prompt_chunks import encode, fit, token_ids
from sdxl.serving.conditioning import Prompts, for_base
from sdxl.serving.painter import Painter
from sdxl.serving.request import FineTuneOptions, GenerationRequest
from sdxl.training.caption_fit import require_tokens_fit
from sdxl.training.examples import cache_examples
from sdxl.training.preservation import kept_examples
from sdxl.training.recipe import StepReport, fine_tune
from sdxl.training.token_rows import tell_of_split_words
from tests.conftest import QUICK, TINY_BASE, call, png, write_zip
from tests.test_training import CONFIG

TOK = TokenMap.parse("TOK:2")
TWO = TokenMap.parse("DOGGO_TOK:2,ROBO_TOK:1")
FILLED = ("red " * 599).strip()
"""As many words as are read, less one: each is one token, and 8 chunks have 75 each."""


@pytest.fixture(scope="module")
def components() -> Components:
    return load_components(TINY_BASE, is_lora=True, device=torch.device("cpu"))


def tokenizers(token_map: TokenMap):
    made = load_tokenizers(TINY_BASE)
    for tokenizer in made:
        tokenizer.add_tokens(token_map.new_tokens, special_tokens=True)
    return made


@pytest.mark.parametrize(
    ("text", "dropped", "lost"),
    [
        ("", "", ()),
        (FILLED, "", ()),
        (f"{FILLED} blue", "", ()),
        (f"{FILLED} blue Green, and more", "Green, and more", ()),
        (f"{FILLED} TOK", "TOK", ("TOK",)),  # two rows need two places
        (f"{FILLED[4:]} TOK", "", ()),
        (f"TOK {FILLED[8:]} the TOK", "TOK", ()),  # it has been read before
        (f"{FILLED} blue qqqqqq", "qqqqqq", ()),
        (f"{FILLED} qqqqqq", "qqqqqq", ()),  # a word of several tokens is not torn apart
        (f"{FILLED} blue <s0><s1>", "TOK", ("TOK",)),
    ],
)
def test_what_does_not_fit_is_named_in_the_users_words(text: str, dropped: str, lost: tuple[str, ...]):
    found = fit(text, tokenizers(TOK), TOK)
    assert (found.limit, found.dropped, found.lost) == (600, dropped, lost)


def test_the_kept_part_is_what_the_encoders_get():
    """The ids up to the limit are those of the text without its dropped part."""
    both = tokenizers(TOK)
    text = f"{FILLED} blue Green, and more"
    dropped = fit(text, both, TOK).dropped
    whole, kept = token_ids([text, text.removesuffix(dropped)], both, TOK)
    assert all(torch.equal(one, other) and len(one) == 8 * 77 for one, other in zip(whole, kept, strict=True))


def framed(tokenizer: Any, *chunks: str) -> list[int]:
    """The ids of chunks that are written by hand: each with its begin, end and padding."""
    ids = []
    for chunk in chunks:
        words = tokenizer.convert_tokens_to_ids(chunk.split())
        padding = [tokenizer.pad_token_id] * (75 - len(words))
        ids += [tokenizer.bos_token_id, *words, tokenizer.eos_token_id, *padding]
    return ids


RED, BLUE, ROWS = "red</w> ", "blue</w> ", "<s0> <s1> "


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("", [""]),
        ("red " * 75, [RED * 75]),
        ("red " * 75 + "blue", [RED * 75, BLUE]),
        ("red " * 150 + "blue", [RED * 75, RED * 75, BLUE]),
        ("red " * 73 + "TOK blue", [RED * 73 + ROWS, BLUE]),
        ("red " * 74 + "TOK blue", [RED * 74, ROWS + BLUE]),  # two rows need two places
        ("red " * 74 + "TOK TOK", [RED * 74, ROWS * 2]),
        ("red " * 72 + "TOK TOK", [RED * 72 + ROWS, ROWS]),  # each word on its own
        ("red " * 74 + "<s0><s1> blue", [RED * 74, ROWS + BLUE]),
        ("red " * 601, [RED * 75] * 8),
    ],
)
def test_chunks_are_those_that_are_written_by_hand(text: str, chunks: list[str]):
    both = tokenizers(TOK)
    (ids,) = token_ids([text], both, TOK)
    assert [one.tolist() for one in ids] == [framed(one, *chunks) for one in both]


@torch.no_grad()
def test_hidden_states_stand_side_by_side_and_the_first_chunk_is_pooled(components: Components):
    texts = ("red " * 75, "blue " * 10)
    both, encoders = components.tokenizers, components.text_encoders
    first, second = token_ids(["".join(texts)], both, TOK)[0]
    hidden, pooled = encode(encoders, (first[None], second[None]))
    parts = [
        encode(encoders, (one[None], two[None])) for one, two in (token_ids([t], both, TOK)[0] for t in texts)
    ]
    assert hidden.shape[1] == 2 * 77
    assert torch.allclose(hidden, torch.cat([part for part, _ in parts], 1), atol=1e-5)
    assert torch.allclose(pooled, parts[0][1], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("negative", ["", "a blue TOK, ugly!", f"TOK {FILLED[: 4 * 73]}"])
@pytest.mark.parametrize("prompt", ["TOK", "", f"{FILLED[: 4 * 73]}TOK", "a <|endoftext|> é ☃<s0><s1>!!"])
def test_up_to_77_tokens_are_read_as_diffusers_reads_them(painter: Painter, prompt: str, negative: str):
    """To the last bit, as before texts were read in chunks."""
    painter.apply(FineTuneOptions())
    pipeline, known = painter.tuned.pipeline, painter.tuned.token_map
    prompts = Prompts(
        prompt=prompt,
        negative_prompt=negative,
        token_map=known,
        guidance_scale=5.0,
        guidance_rescale=0.0,
        count=2,
        size=(64, 64),
        device=torch.device("cpu"),
    )
    ours = for_base(pipeline, prompts)
    embeds, no_embeds, pooled, no_pooled = pipeline.encode_prompt(
        known.substitute(prompt),
        num_images_per_prompt=2,
        negative_prompt=known.substitute(negative) or None,
    )
    assert torch.equal(ours.embeds, torch.cat([no_embeds, embeds]))
    assert torch.equal(ours.pooled, torch.cat([no_pooled, pooled]))


def test_any_token_of_several_must_be_read():
    captions = {"a.jpg": "DOGGO_TOK", "b.jpg": f"DOGGO_TOK {FILLED} and ROBO_TOK"}
    with pytest.raises(DatasetError) as caught:
        require_tokens_fit(captions, tokenizers(TWO), TWO)
    assert str(caught.value) == (
        "The caption of b.jpg is longer than 600 tokens and names ROBO_TOK only in the part that is cut off: "
        "name ROBO_TOK earlier in the caption."
    )


def dataset(tmp_path: Path, *captions: str) -> Path:
    files: dict[str, bytes | str] = {f"{index}.png": png(index) for index in range(len(captions))}
    files |= {f"{index}.txt": caption for index, caption in enumerate(captions)}
    tmp_path.mkdir(exist_ok=True)
    archive = write_zip(tmp_path / "x.zip", files)
    return prepare_dataset(archive, tmp_path / "dataset", config=PreprocessConfig(target_size=64))


def test_long_captions_are_cut_and_told_in_one_line(
    tmp_path: Path, components: Components, caplog: pytest.LogCaptureFixture
):
    folder = dataset(
        tmp_path, "TOK", *[f"TOK {FILLED[4:]} {number}" for number in ("one", "two", "six", "ten")]
    )
    caplog.clear()
    examples = cache_examples(folder, components, TOK, seed=0).examples
    told = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == [
        '4 captions are longer than 600 tokens and cut there: 1.src.png (without "one"), 2.src.png (without "two"), '
        '3.src.png (without "six") and 1 more.'
    ]
    assert {len(row) for example in examples for row in example.token_ids} == {8 * 77}


def test_the_tail_of_a_caption_is_learned(tmp_path: Path):
    """Two captions that differ in word 90 train otherwise, before the pivot and after it."""

    def trained_on(last: str) -> tuple[list[float], torch.Tensor]:
        folder = dataset(tmp_path / last, "a TOK", f"TOK {FILLED[: 4 * 88]} {last}")
        parts = load_components(TINY_BASE, is_lora=True, device=torch.device("cpu"))
        examples = cache_examples(folder, parts, TOK, seed=0)
        assert {len(row) for example in examples.examples for row in example.token_ids} == {2 * 77}
        reports: list[StepReport] = []
        config = replace(CONFIG, is_lora=True, max_train_steps=2)
        trained = fine_tune(parts, examples, config, on_step=reports.append)
        return [report.loss for report in reports], trained.token_rows[1]

    (losses, rows), (other_losses, other_rows) = trained_on("blue"), trained_on("green")
    assert all(one != other for one, other in zip(losses, other_losses, strict=True))
    assert not torch.equal(rows, other_rows)


def test_a_kept_caption_is_as_long_as_its_text(tmp_path: Path, components: Components):
    caption = f"{FILLED[: 4 * 74]}TOK and {FILLED[: 4 * 74]}"
    examples = cache_examples(dataset(tmp_path, caption), components, TOK, seed=0)
    kept = kept_examples(examples, components, TOK, token_init="TOK:fish", prompts=("a cup",)).examples
    expected = token_ids(["a cup"] * 3 + [caption.replace("TOK", "fish")], components.tokenizers, TOK)
    for example, ids in zip(kept, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(example.token_ids, ids, strict=True))


def test_a_caption_whose_token_is_cut_off_is_refused_before_pictures_are_encoded(
    tmp_path: Path, components: Components, monkeypatch: pytest.MonkeyPatch
):
    folder = dataset(tmp_path, "TOK", f"{FILLED} TOK")
    monkeypatch.setattr(components.vae, "encode", lambda *_: pytest.fail("a picture was encoded"))
    with pytest.raises(
        DatasetError, match=r"^The caption of 1\.src\.png is longer than 600 tokens.*TOK earlier"
    ):
        cache_examples(folder, components, TOK, seed=0)


@pytest.mark.parametrize(
    "inputs", [{"global_caption": f"{FILLED} TOK"}, {"caption_prefix": f"{FILLED} TOK, "}, {}]
)
def test_a_training_refuses_before_pictures_are_prepared(tmp_path: Path, inputs: dict):
    files: dict[str, bytes | str] = {
        "dog.png": png(0)[:-40]
    }  # a damaged picture, so that reading it is noticed
    if not inputs:
        files["dog.txt"] = f"{FILLED} TOK"
    archive = write_zip(tmp_path / "x.zip", files)
    with pytest.raises(DatasetError, match=r"^The caption of dog\.png is longer than 600 tokens"):
        call(train.train, input_images=archive, **QUICK, **inputs)


def test_a_training_counts_its_steps_before_pictures_are_prepared(tmp_path: Path):
    archive = write_zip(tmp_path / "x.zip", {"dog.png": png(0)[:-40]})
    quick = {name: value for name, value in QUICK.items() if name != "max_train_steps"}
    with pytest.raises(ValueError, match="must be below the 2 steps"):
        call(train.train, input_images=archive, **quick, num_train_epochs=3, lr_warmup_steps=5)


def test_a_prefix_without_a_token_is_refused_before_captions_are_written(tmp_path: Path):
    archive = write_zip(tmp_path / "x.zip", {"dog.png": png(0)[:-40]})
    with pytest.raises(
        DatasetError, match=r'caption_prefix, "a photo of TOK, ", names no token.*add CAT_TOK'
    ):
        call(train.train, input_images=archive, **QUICK, token_map="CAT_TOK:2")


def test_words_that_the_base_knows_in_pieces_only_are_told(caplog: pytest.LogCaptureFixture):
    tell_of_split_words({"<s0>": "dog", "<s1>": "dog", "<s2>": "red dog"}, load_tokenizers(TINY_BASE)[0])
    assert caplog.text == ""
    tell_of_split_words({"<s0>": "qqxq", "<s1>": "qqxq"}, load_tokenizers(TINY_BASE)[0])
    assert caplog.text.count('"qqxq" of token_init only in pieces (q, q, x, q)') == 1


@pytest.fixture(scope="module")
def painter(fine_tunes: dict[str, Path]) -> Painter:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDXL_BASE", str(TINY_BASE))
        return Painter(weights=str(fine_tunes["lora"]))


@pytest.mark.parametrize(
    ("long", "other"),
    [
        ({"prompt": f"TOK {FILLED[: 4 * 90]} blue"}, {"prompt": f"TOK {FILLED[: 4 * 90]} green"}),
        ({"negative_prompt": f"{FILLED[: 4 * 90]} blue"}, {"negative_prompt": f"{FILLED[: 4 * 90]} green"}),
        (
            {"prompt": f"TOK {FILLED[: 4 * 90]}", "guidance_scale": 1.0},
            {"prompt": "TOK", "guidance_scale": 1.0},
        ),
    ],
)
def test_the_tail_of_a_prompt_changes_the_picture(painter: Painter, long: dict, other: dict):
    drawn = []
    for inputs in (long, other):
        request = GenerationRequest(
            **({"prompt": "TOK"} | inputs), width=64, height=64, num_inference_steps=2, seed=0
        )
        drawn.append(np.array(next(painter.draw(request, FineTuneOptions()))))
    assert not np.array_equal(*drawn)


def test_a_refiner_draws_long_prompts_too(painter: Painter):
    request = GenerationRequest(
        prompt=f"TOK {FILLED[: 4 * 90]}",
        width=64,
        height=64,
        num_inference_steps=2,
        seed=0,
        refine="base_image_refiner",
    )
    assert len(list(painter.draw(request, FineTuneOptions()))) == 1


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"prompt": f"TOK {FILLED[4:]}"}, []),
        (
            {"prompt": f"TOK {FILLED} on the Moon"},
            ['The prompt is longer than 600 tokens: "red on the Moon" is dropped.'],
        ),
        (
            {"prompt": f"{FILLED} on the Moon with TOK"},
            [
                'The prompt is longer than 600 tokens: "the Moon with TOK" is dropped. '
                "Name TOK earlier, or it has no effect."
            ],
        ),
        (
            {"prompt": "TOK", "negative_prompt": f"{FILLED} blue green"},
            ['The negative prompt is longer than 600 tokens: "green" is dropped.'],
        ),
        ({"prompt": "TOK", "negative_prompt": f"{FILLED} blue green", "guidance_scale": 1.0}, []),
    ],
)
def test_dropped_words_of_prompts_are_told(
    painter: Painter, inputs: dict, told: list[str], caplog: pytest.LogCaptureFixture
):
    request = GenerationRequest(**inputs, width=64, height=64, num_inference_steps=1, seed=0)
    pictures = list(painter.draw(request, FineTuneOptions()))
    assert len(pictures) == 1
    assert [one.message for one in caplog.records if one.levelno >= logging.WARNING] == told
