"""Weights in prompts, in the grammar of AUTOMATIC1111's web UI: a text becomes parts, each with its weight.

    (word:1.3)      1.3 times          word\\(s\\)   brackets as text
    (word)          1.1 times          BREAK       fills up the chunk of 75 tokens and begins a new one
    [word]          1 / 1.1 times      ((word))    weights of nested brackets are multiplied

Source: the comment of `parse_prompt_attention` in that project's modules/prompt_parser.py. Other than there, a bracket
without its partner is text. Knows texts only; imports no torch.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sdxl.errors import UserInputError

MOST_WEIGHT = 10.0
"""The largest weight of a part, and, below zero, the smallest."""
_ROUND, _SQUARE = 1.1, 1 / 1.1
_SIGNS = re.compile(
    r"""
    (?P<escaped> \\[\\()\[\]] )
  | (?P<lora> (?i: <(?:lora|lyco|hypernet):[^<>]*> ))
  | (?P<new_chunk> \bBREAK\b )
  | : \s* (?P<weight> (?i: [+-]?(?: (?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)? | nan | inf(?:inity)? ))) \s* \)
  | (?P<bracket> [()\[\]] )
  | (?P<text> [^\\()\[\]:<B]+ | . )
    """,
    re.VERBOSE | re.DOTALL,
)
_PARTNERS = {")": "(", "]": "["}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of a text whose tokens have one weight."""

    text: str
    weight: float = 1.0
    """Factor of the hidden states of its tokens."""
    new_chunk: bool = False
    """Whether it begins a chunk."""


@dataclass(kw_only=True)
class _Sign:
    """A piece of the text. `factor` is set for a bracket that has a partner."""

    text: str
    new_chunk: bool = False
    opens: bool = False
    factor: float | None = None


def parts_of(text: str, *, weights: bool, name: str = "prompt") -> list[Part]:
    """`weighted` if weights are read, else `plain`. An empty text has one empty part."""
    return weighted(text, name) if weights else plain(text)


def plain(text: str) -> list[Part]:
    """`text` as it stands, brackets and all."""
    return [Part(text=text)]


def weighted(text: str, name: str = "prompt") -> list[Part]:
    """The parts of `text`, at least one; a text without marks is one part. Tags such as `<lora:name:1>` are left out.

    name: the input, for messages.

    Raises:
        UserInputError: a weight is no number, or beyond `MOST_WEIGHT`.
    """
    if not has_marks(text):
        return plain(text)
    parts: list[Part] = []
    for sign, weight in _with_weights(_paired(text)):
        if not abs(weight) <= MOST_WEIGHT:  # also if it is no number
            raise UserInputError(
                f'{name} gives "{sign.text.strip()[:40]}" the weight {weight:g}, but weights go from -10 to 10: '
                "lower it, or set prompt_weights to false to read brackets as text."
            )
        if parts and not sign.new_chunk and parts[-1].weight == weight:
            last = parts.pop()
            parts.append(Part(text=last.text + sign.text, weight=weight, new_chunk=last.new_chunk))
        else:
            parts.append(Part(text=sign.text, weight=weight, new_chunk=sign.new_chunk))
    return parts or plain("")


def has_marks(text: str) -> bool:
    """Whether `text` has brackets, BREAK or a tag of a LoRA, so that it may be read in another way than as plain text."""
    return bool(re.search(r"[()\[\]]|\bBREAK\b", text)) or bool(lora_tags(text))


def lora_tags(text: str) -> list[str]:
    """The tags in `text` by which web UIs load a LoRA, such as `<lora:name:0.8>`."""
    return re.findall(r"<(?:lora|lyco|hypernet):[^<>]*>", text, re.IGNORECASE)


def _paired(text: str) -> list[_Sign]:
    """The pieces of `text`, where brackets with a partner have a factor."""
    signs: list[_Sign] = []
    waiting: list[_Sign] = []
    counts = {"(": 0, "[": 0}
    for match in _SIGNS.finditer(text):
        kind, found = match.lastgroup, match[0]
        if kind == "lora":
            continue
        if kind == "escaped":
            signs.append(_Sign(text=found[1:]))
            continue
        if kind == "new_chunk":
            signs.append(_Sign(text=" ", new_chunk=True))
            continue
        sign = _Sign(text=found)
        signs.append(sign)
        closes = ")" if kind == "weight" else found if kind == "bracket" else ""
        if closes in counts:
            counts[closes] += 1
            waiting.append(sign)
        elif (partner := _PARTNERS.get(closes)) and counts[partner]:
            # Those in between wait in vain: (a [b) has one pair of brackets.
            while (opening := waiting.pop()).text != partner:
                counts[opening.text] -= 1
            counts[partner] -= 1
            factor = float(match["weight"]) if kind == "weight" else _ROUND if closes == ")" else _SQUARE
            opening.opens, opening.factor, sign.factor = True, factor, factor
    return signs


def _with_weights(signs: Sequence[_Sign]) -> Iterator[tuple[_Sign, float]]:
    """The pieces that are text or begin a chunk, each with the product of the factors around it."""
    around = [1.0]
    for sign in signs:
        if sign.factor is None:
            yield sign, around[-1]
        elif sign.opens:
            weight = around[-1] * sign.factor
            around.append(weight if math.isfinite(weight) else math.nan)
        else:
            around.pop()
