"""Checks of the text encoders: pooling with new tokens, and the scale of the embedding tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.real.findings import Notes, check
from benchmarks.real.setup import Setup, relative_error
from dataset_and_utils import TokenMap, pool_at_eos
from sdxl.model.prompt_chunks import encode, token_ids
from sdxl.serving.tuned_pipeline import PUBLISHED_EOS, LoadedFineTune, ScaledFineTune, TunedPipeline
from sdxl.training.token_rows import TokenRows

WORDS = ("dog", "cat", "house", "red", "toy", "tree")
"""Common words; one of them stands for a new token."""


@check("Are prompts encoded as by diffusers, and pooled at the end of the text also with new tokens?")
def pooling(setup: Setup, notes: Notes) -> None:
    """A prompt without new tokens equals diffusers' own. A new token with the row of a word acts like that word."""
    tuned = setup.painter.tuned
    pipeline = tuned.pipeline
    word, ids = _whole_word(pipeline)
    prompt = f"a photo of a {word} on the beach, at sunset"
    theirs = _encoded_by_diffusers(setup, pipeline, prompt)
    ours = _encoded(pipeline, prompt)
    for what, mine, plain in zip(("of all tokens", "pooled"), ours, theirs, strict=True):
        notes.at_most(f"difference from diffusers, {what}", 0.1, relative_error(mine, plain), unit=" %")

    # A new token whose row is that of a word must act exactly like the word.
    tables = [encoder.get_input_embeddings().weight.detach() for encoder in _encoders(pipeline)]
    rows = tuple(table[id_][None].clone() for table, id_ in zip(tables, ids, strict=True))
    copy = LoadedFineTune(name="a word", rows=rows, token_map=TokenMap.parse("TOK:1"))
    tuned.apply((ScaledFineTune(fine_tune=copy),))
    try:
        new = prompt.replace(word, "<s0>")
        for what, mine, plain in zip(("of all tokens", "pooled"), _encoded(pipeline, new), ours, strict=True):
            error = relative_error(mine, plain)
            notes.at_most(
                f'difference of a new token with the row of "{word}", {what}', 0.1, error, unit=" %"
            )
        pool_at_eos(pipeline.text_encoder_2, PUBLISHED_EOS)
        error = relative_error(_encoded(pipeline, new)[1], ours[1])
        notes.fact("the same, if pooled as the published configuration says (id 2)", f"{error:.3g} %")
    finally:
        tuned.restore()


@check("Have new token rows the scale of the words that the base knows?")
def embeddings(setup: Setup, notes: Notes) -> None:
    """The length of a row that is pulled to the table's scale, next to the lengths of rows in the table."""
    pipeline = setup.painter.tuned.pipeline
    names = ("text_encoder", "text_encoder_2")
    for name, encoder, tokenizer in zip(names, _encoders(pipeline), _tokenizers(pipeline), strict=True):
        table = encoder.get_input_embeddings()
        lengths = table.weight.detach().float().norm(dim=1)
        new = TokenRows(table, len(lengths), 64, torch.Generator(table.weight.device).manual_seed(0))
        pulled = float(new.rows.norm(dim=1).mean())
        words = tokenizer(" ".join(WORDS), add_special_tokens=False).input_ids
        known = float(lengths[words].mean())
        notes.fact(f"{name}: standard deviation of the table", new.table_std)
        notes.fact(f"{name}: length of rows: mean, shortest, longest", _spread(lengths))
        notes.fact(f"{name}: length of rows of common words", known)
        notes.between(
            f"{name}: length of new rows, as a share of the table's mean",
            0.67,
            1.5,
            pulled / float(lengths.mean()),
        )
        notes.between(f"{name}: length of new rows, as a share of common words'", 0.5, 2, pulled / known)


def _encoded_by_diffusers(setup: Setup, pipeline: Any, prompt: str) -> tuple[Tensor, Tensor]:
    """The same as `_encoded` by diffusers' own pipeline, in the precision and on the device of ours."""
    plain = setup.plain_pipeline(pipeline.text_encoder.dtype, unet=None, vae=None)
    plain.to(pipeline._execution_device)
    embeds, _, pooled, _ = plain.encode_prompt(
        prompt, device=pipeline._execution_device, do_classifier_free_guidance=False
    )
    return embeds, pooled


def _encoded(pipeline: Any, prompt: str) -> tuple[Tensor, Tensor]:
    """The embeddings [1, 77, d] and the pooled embedding [1, d] of a prompt, as drawing and training make them."""
    first, second = token_ids([prompt], _tokenizers(pipeline), TokenMap({}))[0]
    device = pipeline._execution_device
    return encode(_encoders(pipeline), (first[None].to(device), second[None].to(device)))


def _whole_word(pipeline: Any) -> tuple[str, list[int]]:
    """The first of `WORDS` that both tokenizers know in one piece, and its ids."""
    for word in WORDS:
        ids = [tokenizer(word, add_special_tokens=False).input_ids for tokenizer in _tokenizers(pipeline)]
        if all(len(pieces) == 1 for pieces in ids):
            return word, [pieces[0] for pieces in ids]
    raise ValueError(f"The tokenizers know none of {', '.join(WORDS)} in one piece.")


def _encoders(pipeline: TunedPipeline | Any) -> tuple[Any, Any]:
    return pipeline.text_encoder, pipeline.text_encoder_2


def _tokenizers(pipeline: Any) -> tuple[Any, Any]:
    return pipeline.tokenizer, pipeline.tokenizer_2


def _spread(lengths: Tensor) -> str:
    return f"{float(lengths.mean()):.3g}, {float(lengths.min()):.3g}, {float(lengths.max()):.3g}"
