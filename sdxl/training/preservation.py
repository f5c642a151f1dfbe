"""Captions under which a fine-tune goes on drawing as the base does: no pictures are drawn for them first.

The base's prediction for a noisy latent is a target under any caption, so the subject's own pictures serve. Knows token ids
and examples; does not know losses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from dataset_and_utils import Example, ExampleDataset, TokenMap
from sdxl.model.components import Components, add_placeholder_tokens

OTHERS = 3
"""How many of the prompts each picture gets beside its own caption."""
MOST = 128
"""Pictures and crops that get such captions, so that a large data set does not fill the memory with them."""
PROMPTS = (
    "a photo of a dog on a beach",
    "a cat on a red sofa",
    "a portrait of an old man",
    "a woman in a city at night",
    "a group of children in a park",
    "a red car on a street",
    "a white house by a lake",
    "a bowl of fruit on a wooden table",
    "a cup of coffee on a plain background",
    "a green tree on a hill",
    "mountains under a cloudy sky",
    "a bird on a branch",
    "a fish under water",
    "a robot, digital art",
    "a castle, oil painting",
    "a small boat at sea",
    "a flower, close up",
    "a toy on a shelf",
    "a pencil drawing of a face",
    "an empty room with a window",
)
"""What the base is asked for if the user names no prompts: common things, places and styles."""


def kept_examples(
    examples: ExampleDataset,
    components: Components,
    token_map: TokenMap,
    *,
    token_init: str,
    prompts: Sequence[str] = PROMPTS,
) -> ExampleDataset:
    """The latents of at most `MOST` of `examples`, each under captions that name no new token; masks do not count.

    One is its own caption, with the word of `token_init` in place of a token, or without it if there is no word. A caption
    that names no token is left out: the picture is to be learned under it. The others are `OTHERS` of `prompts`, in turn.
    """
    ids = add_placeholder_tokens(components, token_map)
    init = token_map.parse_init(token_init)
    tokenizers = components.tokenizers
    words = [
        {
            new_id: tokenizer(init[token], add_special_tokens=False).input_ids if token in init else []
            for new_id, token in zip(new_ids, token_map.new_tokens, strict=True)
        }
        for tokenizer, new_ids in zip(tokenizers, ids, strict=True)
    ]
    others = [[_padded(one(prompt).input_ids, one) for one in tokenizers] for prompt in prompts]
    kept = []
    for index, example in enumerate(_evenly(examples.examples, MOST)):
        own = [
            without_tokens(row, known, tokenizer)
            for row, known, tokenizer in zip(example.token_ids, words, tokenizers, strict=True)
        ]
        captions = [others[(index * OTHERS + i) % len(others)] for i in range(OTHERS)]
        if any(set(row.tolist()) & known.keys() for row, known in zip(example.token_ids, words, strict=True)):
            captions.append(own)
        for first, second in captions:
            device = example.latents.device
            token_ids = (first.to(device), second.to(device))
            kept.append(replace(example, token_ids=token_ids, mask=torch.ones_like(example.mask)))
    return ExampleDataset(kept)


def weight_for(weight: float, pictures: int) -> float:
    """The weight of the loss on such captions: `weight`, but more for fewer than four pictures, which over-train first."""
    return weight * max(1.0, 4 / pictures)


def _evenly(examples: Sequence[Example], most: int) -> Sequence[Example]:
    """At most `most` of `examples`, evenly over all."""
    return examples[:: -(-len(examples) // most)]


def without_tokens(ids: Tensor, words: Mapping[int, list[int]], tokenizer: CLIPTokenizer) -> Tensor:
    """Ids [77] of a caption whose new tokens are replaced by words.

    words: id of a new token → ids of its word. Several in a row with one word are the rows of one token.
    """
    found: list[int] = []
    before: list[int] | None = None
    for number in ids.tolist():
        word = words.get(number)
        if word is None:
            found.append(number)
        elif word != before:
            found += word
        before = word
    return _padded(found, tokenizer)


def _padded(ids: list[int], tokenizer: CLIPTokenizer) -> Tensor:
    """The first 77 ids, filled up with the tokenizer's padding."""
    length, end = tokenizer.model_max_length, cast(int, tokenizer.eos_token_id)
    if len(ids) > length:
        ids = [*ids[: length - 1], end]
    return torch.tensor(ids + [tokenizer.pad_token_id] * (length - len(ids)))
