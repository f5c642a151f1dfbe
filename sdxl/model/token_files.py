"""Token rows of a fine-tune: its `embeddings.pti`, or the embeddings of other tools, which become its tokens.

Other tools write rows for SDXL's two text encoders as `clip_l` and `clip_g`, in a file with the word's name or inside a
LoRA's file, or as `learned_embeds.safetensors` of diffusers, with the word as key and one file for each encoder. Knows
these files; does not know pipelines.
"""

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dataset_and_utils import MOST_ROWS, TokenMap, read_embeddings
from sdxl.errors import WeightsError, shortened
from sdxl.files.weight_files import WeightFile
from sdxl.model.lora_formats import BUNDLED

if TYPE_CHECKING:
    from sdxl.model.fine_tune_files import FineTuneFiles

log = logging.getLogger(__name__)

_CLIP = {"clip_l": 0, "clip_g": 1}
"""Key → number of the text encoder."""
_MOST_WORDS, _LONGEST_WORD = 100, 100
_NARROWEST = 16
"""Smallest width of a text encoder; real ones have 768 and 1280."""
_UNTRUE = re.compile(r"\.(weight|bias|alpha)$")
"""What names of weights end with, and words do not."""


def is_clip_embedding(keys: Collection[str]) -> bool:
    """Whether a file with these keys has rows of web UIs: the file's name is the word."""
    return any(key in keys for key in _CLIP) and len(keys) <= _MOST_WORDS


def is_learned_embedding(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether tensors of these names and shapes are what diffusers' textual inversion saves: word → rows."""
    return 0 < len(shapes) <= _MOST_WORDS and all(
        1 <= len(shape) <= 2
        and shape[-1] >= _NARROWEST
        and (len(shape) == 1 or shape[0] <= _MOST_WORDS)
        and not _UNTRUE.search(key)
        and key != "emb_params"  # of SD 1.5
        for key, shape in shapes.items()
    )


def read_rows(
    fine_tune: "FineTuneFiles", bundled: Mapping[str, Tensor] | None = None, tables: Sequence[Tensor] = ()
) -> tuple[tuple[Tensor, ...], bool, TokenMap]:
    """Read a fine-tune's token rows, whether they were trained with pooling at the end of text, and its token map.

    The rows are one tensor [tokens, dim_i] for each text encoder i. If the fine-tune has no embeddings.pti, each word of
    other tools becomes a token. A word with rows for one encoder only gets the average row of the other one's table.

    bundled: content of the LoRA's file; keys other than those of token rows are ignored.
    tables: the base's embedding tables [words, dim_i].

    Raises:
        ContractError: the embeddings are malformed.
        WeightsError: a text encoder has no rows, or the two have different numbers of rows.
    """
    if fine_tune.embeddings is not None:
        rows, at_eos = read_embeddings(fine_tune.embeddings)
        if len(rows) != 2:
            raise WeightsError(
                f"{fine_tune.embeddings.name} needs token rows for two text encoders: train again."
            )
        _check_count(len(rows[0]), fine_tune.embeddings.name)
        numbered = {f"<s{row}>" for row in range(len(rows[0]))}
        if not numbered.issuperset(fine_tune.token_map.new_tokens):
            raise WeightsError(
                f"{fine_tune.name} has words for other rows than the {len(rows[0])} in {fine_tune.embeddings.name}: take "
                "special_params.json from the same training."
            )
        return tuple(rows), at_eos, fine_tune.token_map

    # Collect the rows of each word from all files.
    words: dict[str, dict[int, Tensor]] = {}
    for name, encoder, given, file in _named_rows(fine_tune, bundled or {}, tables):
        word = name.strip("<>")  # a prompt may name any token with or without them
        if not word.isprintable() or not 0 < len(word) <= _LONGEST_WORD:
            raise WeightsError(
                f"{file} names a token {shortened(name)!r}: give it a name of 1 to {_LONGEST_WORD} characters."
            )
        rows = given[None] if given.ndim == 1 else given
        if rows.ndim != 2 or not rows.numel():
            raise WeightsError(f"{file} holds no rows of a token for {word}: download it again.")
        if encoder in words.setdefault(word, {}):
            raise WeightsError(f"{file} names {word}, as another file does too: keep one of them.")
        words[word][encoder] = rows.float()

    # Number the rows across all words, as a token map does.
    placeholders: dict[str, str] = {}
    count = 0
    for word, found in words.items():
        size = len(next(iter(found.values())))
        _check_count(count + size, word)
        for encoder in {0, 1} - found.keys():
            if not tables:
                raise WeightsError(f"{word} has rows for one text encoder only: give those of both.")
            log.warning(
                "%s has rows for one text encoder only: the other one reads it as an average word", word
            )
            found[encoder] = tables[encoder].float().mean(0).expand(size, -1)
        if len(found[0]) != len(found[1]):
            raise WeightsError(
                f"{word} must have equally many rows for clip_l and clip_g: download it again."
            )
        placeholders[word] = "".join(f"<s{count + row}>" for row in range(size))
        count += size
    if not words:
        return (), True, fine_tune.token_map
    token_map = TokenMap({**placeholders, **fine_tune.token_map.placeholders})
    return tuple(torch.cat([found[i] for found in words.values()]) for i in range(2)), True, token_map


def _named_rows(
    fine_tune: "FineTuneFiles", bundled: Mapping[str, Tensor], tables: Sequence[Tensor]
) -> Iterator[tuple[str, int, Tensor, str]]:
    """Word, number of the text encoder, its rows, and the file's name for messages.

    Programs that read rows inside a LoRA's file are often given the same words as files too: then the files count.
    """
    of_files = {Path(file.name).stem for file in fine_tune.token_files}
    for file in fine_tune.token_files:
        tensors = file.read()
        if tensors.keys() & _CLIP.keys():
            for key, rows in tensors.items():
                if key in _CLIP:
                    yield Path(file.name).stem, _CLIP[key], rows, file.name
                else:
                    log.warning("%s in %s is not used", shortened(key), file.name)
        else:
            for key, rows in tensors.items():
                yield key, _encoder_of(rows, tables, file), rows, file.name
    for key, rows in bundled.items():
        if key.startswith(BUNDLED):
            word, _, kind = key.removeprefix(BUNDLED).rpartition(".")
            if word in of_files:
                continue
            if kind in _CLIP:
                assert fine_tune.lora is not None
                yield word, _CLIP[kind], rows, fine_tune.lora.name
            else:
                log.warning("%s is not used: rows for SDXL are clip_l and clip_g", shortened(key))


def _encoder_of(rows: Tensor, tables: Sequence[Tensor], file: WeightFile) -> int:
    """The number of the text encoder that has rows of this width."""
    widths = [table.shape[1] for table in tables]
    if rows.shape[-1] not in widths:
        raise WeightsError(
            f"{file.name} was made for a text encoder of width {rows.shape[-1]}, but this base has {widths}: use the base "
            "that it was trained on."
        )
    return widths.index(rows.shape[-1])


def _check_count(rows: int, name: str) -> None:
    if rows > MOST_ROWS:
        raise WeightsError(
            f"{name} makes more than {MOST_ROWS} token rows in all: give embeddings of fewer tokens."
        )
