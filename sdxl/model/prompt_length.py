"""How much of a text the text encoders read: they take 77 tokens, and tokenizers cut off the rest.

Knows tokenizers and token maps; does not know whether a text is a caption or a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import CLIPTokenizer

from dataset_and_utils import TokenMap


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A text at the tokenizers' limit, in the user's words."""

    limit: int
    """How many tokens fit, with those that mark the text's beginning and end."""
    dropped: str
    """What is beyond the limit, from the beginning of a word; empty if all of the text fits."""
    lost: tuple[str, ...]
    """The tokens of the token map that the text names only there."""


def fit(text: str, tokenizers: Sequence[CLIPTokenizer], token_map: TokenMap) -> Fit:
    """How `text`, in which words of the map may stand, fits all of `tokenizers`, which know the placeholder tokens."""
    full = token_map.substitute(text)
    start = min(_start_of_rest(full, tokenizer, token_map) for tokenizer in tokenizers)
    kept, dropped = full[:start], full[start:].strip()
    lost = []
    for word, placeholder in token_map.placeholders.items():
        if placeholder in dropped and placeholder not in kept:
            lost.append(word)
        dropped = dropped.replace(placeholder, word)
    limit = min(tokenizer.model_max_length for tokenizer in tokenizers)
    return Fit(limit=limit, dropped=dropped, lost=tuple(lost))


def _start_of_rest(text: str, tokenizer: CLIPTokenizer, token_map: TokenMap) -> int:
    """Where in `text` the first word begins that does not fit as a whole; the text's length if all of it fits."""
    limit = tokenizer.model_max_length
    encoded = tokenizer(text, return_offsets_mapping=True)
    if len(encoded.input_ids) <= limit:
        return len(text)
    # The last place belongs to the token that ends the text, so this is the first token that finds none.
    start = int(encoded.offset_mapping[limit - 1][0])
    for placeholder in token_map.placeholders.values():
        begun = text.rfind(placeholder, 0, start + len(placeholder) - 1)
        if begun >= 0 and begun < start < begun + len(placeholder):
            return begun
    while start and text[start - 1].isalnum() and text[start].isalnum():
        start -= 1
    return start
