"""What the log says about the prompts of a request.

Knows token maps and tokenizers; does not know encoders or weights.
"""

import logging
from typing import Any

from dataset_and_utils import TokenMap
from sdxl.errors import shortened
from sdxl.model.prompt_chunks import fit
from sdxl.serving.request import GenerationRequest

log = logging.getLogger(__name__)


def tell_of_prompts(request: GenerationRequest, token_map: TokenMap, pipeline: Any) -> None:
    """Log the prompt with placeholder tokens, or that it names no word of the map, and which words are dropped because a
    prompt is too long."""
    prompt = token_map.substitute(request.prompt)
    if prompt != request.prompt:
        log.info("Prompt with placeholder tokens: %s", prompt)
    elif "<s" not in prompt and (words := ", ".join(token_map.placeholders)):
        log.info("The prompt contains none of the fine-tune's tokens: write %s, in the same case", words)
    _tell_what_is_dropped("prompt", request.prompt, token_map, pipeline)
    if request.guidance_scale > 1:
        _tell_what_is_dropped("negative prompt", request.negative_prompt, token_map, pipeline)


def _tell_what_is_dropped(which: str, text: str, token_map: TokenMap, pipeline: Any) -> None:
    found = fit(text, (pipeline.tokenizer, pipeline.tokenizer_2), token_map)
    if not found.dropped:
        return
    lost = f" Name {' and '.join(found.lost)} earlier, or it has no effect." if found.lost else ""
    dropped = shortened(found.dropped)
    log.warning('The %s is longer than %d tokens: "%s" is dropped.%s', which, found.limit, dropped, lost)
