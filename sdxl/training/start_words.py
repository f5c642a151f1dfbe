"""The word that a token's rows start from, found in the captions.

Knows captions, tokens and the base's tokenizer; does not know rows. A wrong word costs more than none, so only words of
`class_words.py` are found, and only where a caption calls the token by them.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import CLIPTokenizer

from dataset_and_utils import TokenMap
from sdxl.model.components import load_tokenizers
from sdxl.training.class_words import BEINGS, CLASS_WORDS, DETERMINERS, ENDS, FOREIGN, MEDIA, STYLE
from sdxl.training.config import AUTO, words_of

log = logging.getLogger(__name__)

_FEWEST = 3
"""So many captions must have a word, unless it stands beside the token: "TOK dog", "my dog TOK"."""
_PLACING = ENDS - {"of", "with", "and"}
"""Words before a noun phrase that make it the place of the token, not its name: "on the sofa TOK sleeps"."""
_NO_ADJECTIVES, _NO_PHRASE = CLASS_WORDS | MEDIA | DETERMINERS, ENDS | MEDIA | DETERMINERS
_PIECE = re.compile(r"(?:<s\d+>)+|\w+(?:['’-]\w+)*|[^\w\s]")
"""A token's placeholders, a word or a mark."""


def start_words(token_init: str, captions: Sequence[str], token_map: TokenMap, base: Path) -> str:
    """The words that token rows start from, such as "TOK:dog"; empty if all start at random.

    They are those of the input `token_init`, unless it says that they are found in the captions. What was found is logged.

    base: the base's folder.

    Raises:
        WeightsError: the base has no tokenizers.
    """
    if token_init != AUTO:
        return words_of(token_init)
    tokenizer = load_tokenizers(base)[0]
    texts = [_pieces(caption, token_map) for caption in captions]
    found = []
    for token, placeholders in token_map.placeholders.items():
        named, word, count = _find(placeholders, texts, tokenizer)
        if word is None:
            log.info(
                "The captions call %s by no common word that the base knows, so its rows start at random. If a word says what "
                "%s shows, set token_init, such as token_init=%s:dog.",
                *(token, token, token),
            )
            continue
        found.append(f"{token}:{word}")
        log.info(
            'The rows of %s start from the word "%s", as %d of %d captions call it. If that is wrong, set token_init=%s:word, or '
            "token_init=none.",
            *(token, word, count, named, token),
        )
    return ",".join(found)


def _find(token: str, texts: Sequence[list[str]], tokenizer: CLIPTokenizer) -> tuple[int, str | None, int]:
    """How many texts name `token`, by its placeholders; the word that they call it by; and how many do.

    Two thirds must agree on a word that is one piece for the tokenizer. One beside the token wins. None: there is none.
    """
    texts = [text for text in texts if token in text]
    called = [found for text in texts if (found := _called(text, token))]
    count = Counter(word for word, _ in called)
    beside = Counter(word for word, is_beside in called if is_beside)
    for words, fewest in ((beside, 1), (count, _FEWEST)):
        for word, _ in words.most_common(1):
            enough = count[word] >= fewest and 3 * count[word] >= 2 * len(texts)
            if enough and len(tokenizer(word, add_special_tokens=False).input_ids) == 1:
                return len(texts), word, count[word]
    return len(texts), None, 0


def _pieces(caption: str, token_map: TokenMap) -> list[str]:
    """The words and marks of a caption in lower case, with placeholders for tokens."""
    return _PIECE.findall(token_map.substitute(caption).lower())


def _called(text: Sequence[str], token: str) -> tuple[str, bool] | None:
    """The word by which one caption calls `token`, and whether it stands beside it."""
    if not FOREIGN.isdisjoint(text) or not STYLE.isdisjoint(text):
        return None
    by = {place + 1 for place, piece in enumerate(text) if piece == "by"}  # "a painting by TOK" names a style
    places = [place for place, piece in enumerate(text) if piece == token and place not in by]
    for place in places:
        word = _noun(text, place + 1) or _noun_before(text, place)
        if word:
            return word, True
    for start in _other_starts(text, places):
        word = _noun(text, start, apart=True)
        if (
            word and word not in text[:start]
        ):  # the name of something that was mentioned before stands for that
            return word, False
    return None


def _other_starts(text: Sequence[str], places: Sequence[int]) -> Iterator[int]:
    """Where a noun phrase that is not beside the token may say what it shows.

    places: where the token is.
    """
    for place in places:  # "TOK, a dog", "TOK is a dog"
        if place + 1 < len(text) and text[place + 1] in {",", "(", ":", "-", "–", "—", "is"}:
            yield place + 2
    alone = len({piece for piece in text if piece.startswith("<s")}) == 1
    if alone and any(_is_subject(text, place) for place in places):
        yield _after_medium(text)  # "a photo of a dog, TOK"
        for place in range(1, len(text) - 1):  # "TOK on a beach. The dog sleeps."
            if text[place - 1] == "." and text[place] in {"the", "this"}:
                yield place + 1


def _noun(text: Sequence[str], start: int, *, apart: bool = False) -> str | None:
    """The class word that ends the noun phrase at `start`; None if there is none, or if the text goes on to list others.

    apart: the phrase does not stand beside the token. Without "a" or "the" it is then a tag, which must be a being.
    """
    end = start
    while end < len(text) and text[end] in DETERMINERS:
        end += 1
    determined, first = end > start, end
    while end < len(text) and not _ends_phrase(text[end], at_start=determined and end == first):
        end += 1
    if end == first:
        return None
    word, rest = text[end - 1], text[end : end + 4]
    if not apart:
        return word if word in CLASS_WORDS else None
    lists_more = not {"and", "&", "or"}.isdisjoint(rest[:2])
    return (
        word
        if word in (CLASS_WORDS if determined else BEINGS) and not lists_more and "background" not in rest
        else None
    )


def _noun_before(text: Sequence[str], place: int) -> str | None:
    """The class word directly before the token at `place`, as in "my dog TOK" and "a dog named TOK"."""
    noun = place - 2 if place > 1 and text[place - 1] in {"named", "called"} else place - 1
    if noun < 0 or text[noun] not in CLASS_WORDS:
        return None
    before = _start_of_phrase(text, noun)
    return None if before and text[before - 1] in _PLACING else text[noun]


def _is_subject(text: Sequence[str], place: int) -> bool:
    """Whether the token at `place` is what the picture shows, not something that another thing holds or stands beside."""
    start = _start_of_phrase(text, place)
    return start in (0, _after_medium(text)) or text[start - 1] in {",", ".", "(", ":"}


def _start_of_phrase(text: Sequence[str], place: int) -> int:
    """Where the determiners and adjectives before the noun or token at `place` begin."""
    while place and not (text[place - 1] in _NO_ADJECTIVES or _ends_phrase(text[place - 1], at_start=False)):
        place -= 1
    while place and text[place - 1] in DETERMINERS:
        place -= 1
    return place


def _after_medium(text: Sequence[str]) -> int:
    """Where "a photo of" ends at the beginning of a caption; 0 if it begins otherwise."""
    for place, piece in enumerate(text[:8]):
        if piece == "of" and place and text[place - 1] in MEDIA:
            return place + 1
        if not piece[0].isalpha():
            break
    return 0


def _ends_phrase(piece: str, *, at_start: bool) -> bool:
    """Whether a noun phrase ends before `piece`. At its start "sleeping" and "striped" describe the noun."""
    if piece in CLASS_WORDS:
        return False
    if not piece[0].isalpha() or piece in _NO_PHRASE or not piece.isalpha():
        return True
    is_verb = piece.endswith("s") and not piece.endswith(("ss", "ous"))
    return is_verb or (piece.endswith(("ing", "ed", "ly")) and len(piece) > 4 and not at_start)
