"""Captions that are longer than what is read of a text: cut and told, or refused.

Knows captions and tokenizers; does not know files or how captions are encoded.
"""

import logging
from collections.abc import Mapping, Sequence

from transformers import CLIPTokenizer

from dataset_and_utils import TokenMap
from sdxl.errors import DatasetError, shortened, some_of
from sdxl.model.prompt_chunks import Fit, fit

log = logging.getLogger(__name__)


def require_tokens_fit(
    captions: Mapping[str, str], tokenizers: Sequence[CLIPTokenizer], token_map: TokenMap
) -> dict[str, Fit]:
    """The captions whose end is cut off: name → how it fits. `captions` maps names, such as a picture's, to texts.

    tokenizers: they know the map's placeholder tokens.

    Raises:
        DatasetError: a caption names a token only in the part that is cut off, so that it would not be learned.
    """
    cut: dict[str, Fit] = {}
    fits = {caption: fit(caption, tokenizers, token_map) for caption in set(captions.values())}
    for name, caption in captions.items():
        found = fits[caption]
        if found.lost:
            token = found.lost[0]
            raise DatasetError(
                f"The caption of {name} is longer than {found.limit} tokens and names {token} only in the part that is cut "
                f"off: name {token} earlier in the caption."
            )
        if found.dropped:
            cut[name] = found
    return cut


def tell_of_cuts(cut: Mapping[str, Fit]) -> None:
    """Log which captions are cut off, and the words that are not read."""
    if not cut:
        return
    which = "1 caption is" if len(cut) == 1 else f"{len(cut)} captions are"
    limit = next(iter(cut.values())).limit
    words = some_of(f'{name} (without "{shortened(found.dropped)}")' for name, found in cut.items())
    log.warning("%s longer than %d tokens and cut there: %s.", which, limit, words)
