"""The tokenizers: a byte-level BPE in CLIP's form, with one token for every word of the world.

The vocabulary has the order of CLIP's: 256 bytes ("!" is 0), the same bytes at a word's end, one entry for each merge, and
the two special tokens. So <|endoftext|> has the highest id.
"""

from __future__ import annotations

import itertools
from collections import Counter
from functools import lru_cache

import numpy as np

from tiny_world.words import vocabulary_words

LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_characters() -> list[str]:
    """The 256 printable characters that stand for bytes, in the order of byte-level BPE: printable Latin-1 first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


@lru_cache
def merges() -> tuple[tuple[str, str], ...]:
    """The merges that make every word of the world one token (Sennrich et al., 2016). Each word counts once."""
    words = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary_words()]
    learnt: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        if not pairs:
            return tuple(learnt)
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learnt.append(best)
        words = [_merge(word, best) for word in words]


@lru_cache
def vocabulary() -> dict[str, int]:
    """Token -> id."""
    letters = byte_characters()
    tokens = letters + [c + "</w>" for c in letters]
    tokens += list(dict.fromkeys(a + b for a, b in merges()))
    return {token: i for i, token in enumerate([*tokens, START, END])}


def encode_words(caption: str, pad: int) -> np.ndarray:
    """The tokenizer's ids of a caption of known words, uint16 [77], padded with `pad` after <|endoftext|>."""
    ids = vocabulary()
    words = caption.replace(",", " ,").split()
    row = np.full(LENGTH, pad, dtype=np.uint16)
    values = [ids[START], *(ids[word + "</w>"] for word in words), ids[END]]
    row[: len(values)] = values
    return row


def build_tokenizers():
    """tokenizer, which pads with <|endoftext|>, and tokenizer_2, which pads with "!"; both are transformers' CLIPTokenizer."""
    from transformers import CLIPTokenizer

    def build(pad: str):
        return CLIPTokenizer(
            vocab=vocabulary(),
            merges=list(merges()),
            unk_token=END,
            bos_token=START,
            eos_token=END,
            pad_token=pad,
            model_max_length=LENGTH,
        )

    return build(END), build("!")


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out
