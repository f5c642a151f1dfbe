"""Captions and prompts that are longer than the text encoders read: cut and told, or refused."""

import logging
from pathlib import Path

import pytest
import torch

import train
from dataset_and_utils import TokenMap
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.errors import DatasetError
from sdxl.model.components import Components, load_components, load_tokenizers
from sdxl.model.prompt_chunks import fit
from sdxl.serving.painter import Painter
from sdxl.serving.request import FineTuneOptions, GenerationRequest
from sdxl.training.caption_fit import require_tokens_fit
from sdxl.training.examples import cache_examples
from sdxl.training.token_rows import tell_of_split_words
from tests.conftest import QUICK, TINY_BASE, call, png, write_zip

TOK = TokenMap.parse("TOK:2")
TWO = TokenMap.parse("DOGGO_TOK:2,ROBO_TOK:1")
FILLED = ("red " * 74).strip()
"""As many words as fit, less one: each is one token, and the text's beginning and end take two of 77."""


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
    assert (found.limit, found.dropped, found.lost) == (77, dropped, lost)


def test_the_kept_part_is_what_the_encoders_get():
    """The ids up to the limit are those of the text without its dropped part."""
    first, _ = tokenizers(TOK)
    text = f"{FILLED} blue Green, and more"
    cut = first(text, truncation=True, max_length=77).input_ids
    assert cut == first(text.removesuffix(fit(text, [first], TOK).dropped)).input_ids


def test_any_token_of_several_must_be_read():
    captions = {"a.jpg": "DOGGO_TOK", "b.jpg": f"DOGGO_TOK {FILLED} and ROBO_TOK"}
    with pytest.raises(DatasetError) as caught:
        require_tokens_fit(captions, tokenizers(TWO), TWO)
    assert str(caught.value) == (
        "The caption of b.jpg is longer than 77 tokens and names ROBO_TOK only in the part that is cut off: "
        "name ROBO_TOK earlier in the caption."
    )


def dataset(tmp_path: Path, *captions: str) -> Path:
    files: dict[str, bytes | str] = {f"{index}.png": png(index) for index in range(len(captions))}
    files |= {f"{index}.txt": caption for index, caption in enumerate(captions)}
    archive = write_zip(tmp_path / "x.zip", files)
    return prepare_dataset(archive, tmp_path / "dataset", config=PreprocessConfig(target_size=64))


def test_long_captions_are_cut_and_told_in_one_line(
    tmp_path: Path, components: Components, caplog: pytest.LogCaptureFixture
):
    folder = dataset(tmp_path, "TOK", *[f"TOK {FILLED} {number}" for number in ("one", "two", "six", "ten")])
    caplog.clear()
    examples = cache_examples(folder, components, TOK, seed=0).examples
    told = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == [
        "4 captions are longer than 77 tokens and cut there: 1.src.png, 2.src.png, 3.src.png and 1 more."
    ]
    ids = [example.token_ids[0].tolist() for example in examples]
    assert {len(row) for row in ids} == {77}
    end = components.tokenizers[0].eos_token_id
    assert all(row[76] == end and row[75] != end for row in ids[1:])


def test_a_caption_whose_token_is_cut_off_is_refused_before_pictures_are_encoded(
    tmp_path: Path, components: Components, monkeypatch: pytest.MonkeyPatch
):
    folder = dataset(tmp_path, "TOK", f"{FILLED} TOK")
    monkeypatch.setattr(components.vae, "encode", lambda *_: pytest.fail("a picture was encoded"))
    with pytest.raises(
        DatasetError, match=r"^The caption of 1\.src\.png is longer than 77 tokens.*TOK earlier"
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
    with pytest.raises(DatasetError, match=r"^The caption of dog\.png is longer than 77 tokens"):
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
    ("inputs", "told"),
    [
        ({"prompt": f"TOK {FILLED[4:]}"}, []),
        (
            {"prompt": f"TOK {FILLED} on the Moon"},
            ['The prompt is longer than 77 tokens: "red on the Moon" is dropped.'],
        ),
        (
            {"prompt": f"{FILLED} on the Moon with TOK"},
            [
                'The prompt is longer than 77 tokens: "the Moon with TOK" is dropped. '
                "Name TOK earlier, or it has no effect."
            ],
        ),
        (
            {"prompt": "TOK", "negative_prompt": f"{FILLED} blue green"},
            ['The negative prompt is longer than 77 tokens: "green" is dropped.'],
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
