"""Texts as the text encoders read them: in chunks of 75 tokens, each with its begin and end.

A text encoder has 77 places. The chunks of a longer text are encoded one by one, and their hidden states stand side by side,
as in AUTOMATIC1111's web UI and the long-prompt pipelines of diffusers' community. Drawing and training both come here.
Knows tokenizers, text encoders, token maps and weights of words; does not know whether a text is a caption or a prompt.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from dataset_and_utils import TokenMap
from sdxl.model.prompt_weights import Part, plain

MOST_CHUNKS = 8
"""Chunks of a text that are read. The cost of cross-attention grows with their number."""

Contents = list[list[int]]
"""The ids of each chunk of a text, without begin, end and padding; at least one chunk, which may be empty."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A text at the limit of what is read, in the user's words."""

    limit: int
    """How many tokens are read, without those that begin and end chunks."""
    dropped: str
    """What is beyond the limit, from the beginning of a word; empty if all of the text fits."""
    lost: tuple[str, ...]
    """The tokens of the token map that the text names only there."""


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """A text as two encoders read it."""

    ids: tuple[Tensor, Tensor]
    """For each encoder [77·n]."""
    weights: tuple[Tensor, Tensor]
    """The weight of each id [77·n], in fp32; 1 for begin, end and padding."""


def token_ids(
    texts: Sequence[str], tokenizers: Sequence[CLIPTokenizer], token_map: TokenMap
) -> list[tuple[Tensor, Tensor]]:
    """The ids [77·n] of each text for each of two text encoders. n is the number of chunks of the longest text.

    Words of the map may stand in the texts. The rows of such a word are never split over two chunks. What is beyond
    `MOST_CHUNKS` is left out.

    tokenizers: they know the map's placeholder tokens.
    """
    return [rows.ids for rows in weighted_ids([plain(text) for text in texts], tokenizers, token_map)]


def weighted_ids(
    texts: Sequence[Sequence[Part]], tokenizers: Sequence[CLIPTokenizer], token_map: TokenMap
) -> list[Weighted]:
    """As `token_ids`, for texts of parts. Each part is split into tokens by itself."""
    chunks = [[_chunks(text, one, token_map)[:MOST_CHUNKS] for one in tokenizers] for text in texts]
    ids = filled_up([[_each(one, "ids") for one in both] for both in chunks], tokenizers)
    rows = []
    for both, (first, second) in zip(chunks, ids, strict=True):
        weights = [
            _framed_weights(_each(one, "weights"), like, tokenizer)
            for one, like, tokenizer in zip(both, (first, second), tokenizers, strict=True)
        ]
        rows.append(Weighted(ids=(first, second), weights=(weights[0], weights[1])))
    return rows


def filled_up(
    texts: Sequence[Sequence[Contents]], tokenizers: Sequence[CLIPTokenizer]
) -> list[tuple[Tensor, Tensor]]:
    """The ids [77·n] of each text for each encoder, with begin, end and padding. Shorter texts get empty chunks.

    texts: for each text, its chunks by each of the tokenizers.
    """
    count = max((len(chunks) for text in texts for chunks in text), default=1)
    rows = []
    for text in texts:
        first, second = (
            torch.tensor(
                [
                    number
                    for chunk in [*chunks, *[[]] * (count - len(chunks))]
                    for number in _framed(chunk, one)
                ]
            )
            for chunks, one in zip(text, tokenizers, strict=True)
        )
        rows.append((first, second))
    return rows


def contents_of(ids: Tensor, tokenizer: CLIPTokenizer) -> list[int]:
    """The ids of a text without begin, end and padding: what `filled_up` put around its chunks is taken off [77·n]."""
    found: list[int] = []
    for chunk in ids.view(-1, tokenizer.model_max_length).tolist():
        while chunk[-1] == tokenizer.pad_token_id:
            chunk.pop()
        if chunk[-1] == tokenizer.eos_token_id:  # one of two tokenizers also fills up with it
            chunk.pop()
        found += chunk[1:]
    return found


def split(ids: Sequence[int], tokenizer: CLIPTokenizer) -> Contents:
    """The chunks of a text without new tokens, at most `MOST_CHUNKS`."""
    room = _room(tokenizer)
    chunks = [list(ids[start : start + room]) for start in range(0, len(ids), room)]
    return chunks[:MOST_CHUNKS] or [[]]


States = Callable[[Sequence[Any], tuple[Tensor, Tensor]], tuple[Tensor, Tensor, Tensor]]
"""Gives the hidden states and the projection of chunks, as `states_of` does."""


def states_of(text_encoders: Sequence[Any], chunks: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What both encoders say of chunks 2×[n, 77].

    Returns the penultimate hidden states of each [n, 77, d₀] and [n, 77, d₁], and the second one's pooled projection [n, d].
    """
    first, second = (
        encoder(ids, output_hidden_states=True) for encoder, ids in zip(text_encoders, chunks, strict=True)
    )
    return first.hidden_states[-2], second.hidden_states[-2], second[0]


def encode(
    text_encoders: Sequence[Any],
    ids: tuple[Tensor, Tensor],
    weights: Sequence[Tensor] | None = None,
    *,
    states: States = states_of,
) -> tuple[Tensor, Tensor]:
    """SDXL's text conditioning for token ids 2×[b, 77·n].

    weights: of the tokens 2×[b, 77·n], for the hidden states and not for the pooled projection; None for 1 each.
    states: runs the encoders.

    Returns the concatenated penultimate hidden states of both encoders [b, 77·n, d₀+d₁], and the second encoder's pooled
    projection of the first chunk [b, d]. Source: SDXL (arXiv:2307.01952), section 2.1.
    """
    first, second = (
        rows.reshape(-1, encoder.config.max_position_embeddings)
        for rows, encoder in zip(ids, text_encoders, strict=True)
    )
    *hidden, pooled = states(text_encoders, (first, second))
    if weights is not None:
        hidden = [with_weights(one, w.reshape(one.shape[:2])) for one, w in zip(hidden, weights, strict=True)]
    side_by_side = [one.reshape(*rows.shape, -1) for one, rows in zip(hidden, ids, strict=True)]
    return torch.cat(side_by_side, dim=-1), pooled.view(len(ids[1]), -1, pooled.shape[-1])[:, 0]


def with_weights(hidden: Tensor, weights: Tensor) -> Tensor:
    """Hidden states [n, 77, dim] of n chunks times the weights [n, 77] of their tokens, with the mean of each chunk restored.

    z′ = w·z and z″ = z′ · mean(z) / mean(z′). Source: `EmphasisOriginal` in modules/sd_emphasis.py of AUTOMATIC1111's web UI.
    Other than there, the mean stays as it is where this factor is not between 1/2 and 2: it then divides by almost nothing.
    """
    before = hidden.float()
    after = before * weights.to(before)[..., None]
    factor = before.mean((1, 2), keepdim=True) / after.mean((1, 2), keepdim=True)
    restored = (factor >= 0.5) & (factor <= 2)
    return (after * torch.where(restored, factor, 1.0)).to(hidden.dtype)


def fit(text: str | Sequence[Part], tokenizers: Sequence[CLIPTokenizer], token_map: TokenMap) -> Fit:
    """How `text`, in which words of the map may stand, fits all of `tokenizers`, which know the placeholder tokens."""
    parts = plain(text) if isinstance(text, str) else text
    full = "".join(token_map.substitute(part.text) for part in parts)
    start = min(_start_of_rest(parts, full, tokenizer, token_map) for tokenizer in tokenizers)
    kept, dropped = full[:start], full[start:].strip()
    lost = []
    for word, placeholder in token_map.placeholders.items():
        if placeholder in dropped and placeholder not in kept:
            lost.append(word)
        dropped = dropped.replace(placeholder, word)
    limit = MOST_CHUNKS * min(map(_room, tokenizers))
    return Fit(limit=limit, dropped=dropped, lost=tuple(lost))


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Tokens that stay in one chunk: a single one, or all rows of a new token."""

    ids: list[int]
    start: int
    """Where it begins in the text."""
    weight: float = 1.0

    @property
    def weights(self) -> list[float]:
        """One for each id."""
        return [self.weight] * len(self.ids)


def _each(chunks: Sequence[Sequence[_Piece]], what: str) -> list[list[Any]]:
    """The "ids" or the "weights" of each chunk."""
    return [[one for piece in chunk for one in getattr(piece, what)] for chunk in chunks]


def _start_of_rest(parts: Sequence[Part], text: str, tokenizer: CLIPTokenizer, token_map: TokenMap) -> int:
    """Where in `text`, the texts of all `parts`, the first word begins that does not fit as a whole; the text's length if
    all of it fits."""
    beyond = [piece for chunk in _chunks(parts, tokenizer, token_map)[MOST_CHUNKS:] for piece in chunk]
    if not beyond:
        return len(text)
    start = beyond[0].start
    while start and text[start - 1].isalnum() and text[start].isalnum():
        start -= 1
    return start


def _chunks(parts: Sequence[Part], tokenizer: CLIPTokenizer, token_map: TokenMap) -> list[list[_Piece]]:
    """The chunks of a text, each as full as its pieces and the beginnings of chunks allow, up to the first piece beyond
    `MOST_CHUNKS`."""
    room, chunks, used, begin = _room(tokenizer), [[]], 0, 0
    for part in parts:
        text = token_map.substitute(part.text)
        if part.new_chunk:
            chunks.append([])
            used = 0
        for piece in _pieces(text, tokenizer, token_map):
            if used + len(piece.ids) > room:
                chunks.append([])
                used = 0
            chunks[-1].append(replace(piece, start=begin + piece.start, weight=part.weight))
            used += len(piece.ids)
            if len(chunks) > MOST_CHUNKS:
                return chunks
        begin += len(text)
    return chunks


def _pieces(text: str, tokenizer: CLIPTokenizer, token_map: TokenMap) -> list[_Piece]:
    """The tokens of `text`, which has placeholder tokens instead of words. Placeholders stay together as the map says, and
    as they stand in the text if the map does not know them."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    known = sorted(map(re.escape, token_map.placeholders.values()), key=len, reverse=True)
    together = (match.span() for match in re.finditer("|".join([*known, "(?:<s[0-9]+>)+"]), text))
    begin, end = next(together, (len(text), len(text)))
    room, pieces = _room(tokenizer), []
    for number, (start, _) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        while start >= end and begin < len(text):
            begin, end = next(together, (len(text), len(text)))
        if pieces and begin <= pieces[-1].start and start < end and len(pieces[-1].ids) < room:
            pieces[-1].ids.append(number)
        else:
            pieces.append(_Piece(ids=[number], start=start))
    return pieces


def _framed(chunk: Sequence[int], tokenizer: CLIPTokenizer) -> list[int]:
    """A chunk with begin, end and padding, 77 ids in all."""
    padding = [tokenizer.pad_token_id] * (_room(tokenizer) - len(chunk))
    return [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id, *padding]  # type: ignore[list-item]


def _framed_weights(chunks: Sequence[Sequence[float]], ids: Tensor, tokenizer: CLIPTokenizer) -> Tensor:
    """The weights of `ids` [77·n], whose chunks have these contents."""
    weights = torch.ones(ids.shape).view(-1, tokenizer.model_max_length)
    for row, chunk in zip(weights, chunks, strict=False):  # empty chunks may follow
        row[1 : 1 + len(chunk)] = torch.tensor(chunk)
    return weights.flatten()


def _room(tokenizer: CLIPTokenizer) -> int:
    """Tokens of a chunk, without its begin and end."""
    return tokenizer.model_max_length - 2
