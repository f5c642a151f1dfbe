"""The word that token rows start from: found where captions call the token by it, and nowhere else."""

import logging

import pytest

from dataset_and_utils import TokenMap
from sdxl.training.start_words import start_words
from tests.conftest import TINY_BASE

PLACES = ("on a beach", "in a park", "next to a car", "left of a red house")


def found(captions: list[str], token_map: str = "TOK:2", token_init: str = "auto") -> str:
    return start_words(token_init, captions, TokenMap.parse(token_map), TINY_BASE)


@pytest.mark.parametrize(
    "caption",
    [
        "a photo of TOK dog",
        "a small TOK dog on a sofa and a cat",
        "a photo of TOK dog, TOK dog and TOK dog",
        "TOK DOG!",
        "<TOK> dog, asleep",
        "my old dog TOK",
        "a man with his dog TOK",
        "a dog named TOK",
        "TOK the happy dog jumps",
    ],
)
def test_a_word_beside_the_token_is_found_in_a_single_caption(caption: str):
    assert found([caption]) == "TOK:dog"


@pytest.mark.parametrize(
    "caption",
    [
        "a photo of TOK, a small dog {}",
        "TOK is a sleeping dog {}",
        "TOK (dog) {}",
        "TOK, dog, {}",
        "a photo of a dog {}, TOK",
        "a black and white photo of TOK {}. The dog looks at us.",
    ],
)
def test_a_word_that_stands_apart_takes_three_captions(caption: str):
    captions = [caption.format(place) for place in PLACES]
    assert found(captions[:3]) == "TOK:dog"
    assert found(captions[:2]) == ""
    assert found([*captions[:2], "a photo of TOK", "TOK asleep"]) == "", "half of the captions are too few"


@pytest.mark.parametrize(
    "caption",
    [
        "TOK",
        "TOK TOK",
        "a photo of TOK",
        "a photo of TOK asleep",
        "a photo of TOK standing on a chair",
        "a photo of TOK in a red car",
        "a photo of TOK top left",
        "a photo of TOK number 3",
        "a photo of TOK and a dog",
        "a photo of TOK, a dog, and a cat",
        "a photo of TOK, a house in the background",
        "a photo of TOK on a beach, a dog behind",
        "a photo of TOK riding a horse. The horse is white.",
        "a photo of TOK wearing a hat, dress",
        "TOK, hat, beach",
        "TOK bites cake",
        "TOK's dog",
        "TOK dogs",
        "TOK dog costume",
        "a man holding TOK",
        "on the chair TOK sleeps",
        "a dog in the style of TOK",
        "TOK style dog",
        "a painting by TOK, a house",
        "ein Foto von TOK Boot auf dem See",
        "une photo de TOK robot",
        "トック TOK 犬",
        "TOK unicorn",  # which this base knows in pieces only
    ],
)
def test_where_no_caption_names_it_nothing_is_found(caption: str):
    assert found([caption]) == ""
    assert found([caption] * 12) == "", "one caption for all"


def test_the_word_of_most_captions_wins():
    assert found(["TOK dog"] * 4 + ["TOK cat", "TOK"]) == "TOK:dog"
    assert found(["TOK dog"] * 3 + ["TOK cat"] * 3) == ""
    assert found(["TOK, a dog", "TOK, a dog", "TOK dog", "TOK"]) == "TOK:dog"


def test_each_token_is_looked_up_in_the_captions_that_name_it():
    captions = [
        "DOG_TOK dog next to ROBO_TOK",
        "a photo of DOG_TOK, a dog, next to ROBO_TOK robot",
        "DOG_TOK dog",
        "ROBO_TOK robot on a beach",
        "a cat",
    ]
    assert found(captions, "DOG_TOK:2,ROBO_TOK:3") == "DOG_TOK:dog,ROBO_TOK:robot"
    both = ["a dog, A_TOK and B_TOK"] * 6
    assert found(both, "A_TOK:2,B_TOK:2") == "", "whose word it is cannot be told"


def test_words_that_were_given_win_and_what_was_found_is_told(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    assert found(["TOK dog"], token_init="TOK:cat") == "TOK:cat"
    assert found(["TOK dog"], token_init="none") == ""
    assert not caplog.messages
    found(["TOK dog", "TOK dog", "TOK"])
    found(["TOK"])
    assert [message[:64] for message in caplog.messages] == [
        'The rows of TOK start from the word "dog", as 2 of 3 captions ca',
        "The captions call TOK by no common word that the base knows, so ",
    ]
    assert "token_init=none" in caplog.messages[0] and "token_init=TOK:dog" in caplog.messages[1]
