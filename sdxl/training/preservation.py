"""Captions under which a fine-tune goes on drawing as the base does: no pictures are drawn for them first.

The base's prediction for a noisy latent is a target under any caption, so the subject's own pictures serve. Knows token ids
and examples; does not know losses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from dataset_and_utils import Example, ExampleDataset, TokenMap
from sdxl.model.components import Components, add_placeholder_tokens
from sdxl.model.prompt_chunks import contents_of, filled_up, split
from sdxl.training.caption_fit import require_tokens_fit, tell_of_cuts

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
    named = {f"number {number} of preservation_prompts": one for number, one in enumerate(prompts, start=1)}
    tell_of_cuts(require_tokens_fit(named, tokenizers, TokenMap({})))
    others = [
        [one(prompt, add_special_tokens=False, verbose=False).input_ids for one in tokenizers]
        for prompt in prompts
    ]
    texts, pictures = [], []
    for index, example in enumerate(_evenly(examples.examples, MOST)):
        captions = [others[(index * OTHERS + i) % len(others)] for i in range(OTHERS)]
        parts = list(zip(tokenizers, example.token_ids, words, strict=True))
        if any(set(ids.tolist()) & known.keys() for _, ids, known in parts):
            captions.append([without_tokens(contents_of(ids, one), known) for one, ids, known in parts])
        texts += captions
        pictures += [example] * len(captions)
    chunks = [[split(ids, one) for ids, one in zip(text, tokenizers, strict=True)] for text in texts]
    kept = []
    for example, (first, second) in zip(pictures, filled_up(chunks, tokenizers), strict=True):
        token_ids = (first.to(example.latents.device), second.to(example.latents.device))
        kept.append(replace(example, token_ids=token_ids, mask=torch.ones_like(example.mask)))
    return ExampleDataset(kept)


def weight_for(weight: float, pictures: int) -> float:
    """The weight of the loss on such captions: `weight`, but more for fewer than four pictures, which over-train first."""
    return weight * max(1.0, 4 / pictures)


def learned_below(weight: float, pictures: int) -> float:
    """The share of the timesteps, those with less noise, in which the subject is learned: all without such captions.

    Above it a picture's composition is decided, which few pictures over-train first (T-LoRA, arXiv:2507.05964, lowers the rank
    there). A single picture shows too little of the subject for that: without these timesteps it is not learned.
    """
    return 0.6 if weight and pictures > 1 else 1.0


def _evenly(examples: Sequence[Example], most: int) -> Sequence[Example]:
    """At most `most` of `examples`, evenly over all."""
    return examples[:: -(-len(examples) // most)]


def without_tokens(ids: Sequence[int], words: Mapping[int, list[int]]) -> list[int]:
    """Ids of a caption whose new tokens are replaced by words.

    words: id of a new token → ids of its word. Several in a row with one word are the rows of one token.
    """
    found: list[int] = []
    before: list[int] | None = None
    for number in ids:
        word = words.get(number)
        if word is None:
            found.append(number)
        elif word != before:
            found += word
        before = word
    return found
