"""What the log says about the prompts of a request.

Knows token maps and tokenizers; does not know encoders or weights.
"""

import logging
import re
from typing import Any

from dataset_and_utils import TokenMap
from sdxl.errors import shortened
from sdxl.model.prompt_chunks import fit
from sdxl.model.prompt_weights import lora_tags, parts_of
from sdxl.serving.request import GenerationRequest

log = logging.getLogger(__name__)

_CHANGING = re.compile(r"\[[^\[\]|]*\||\[[^\[\]]*:\s*[\d.]+\s*\]")
"""How web UIs write words that change while a picture is drawn: [cat|dog], [cat:dog:0.5]."""


def tell_of_prompts(request: GenerationRequest, token_map: TokenMap, pipeline: Any) -> None:
    """Log the prompt with placeholder tokens, or that it names no word of the map, which words are dropped because a prompt
    is too long, and what is read in another way than in web UIs."""
    prompt = token_map.substitute(request.prompt)
    if prompt != request.prompt:
        log.info("Prompt with placeholder tokens: %s", prompt)
    elif "<s" not in prompt and (words := ", ".join(token_map.placeholders)):
        log.info("The prompt contains none of the fine-tune's tokens: write %s, in the same case", words)
    read = {"prompt": request.prompt}
    if request.guidance_scale > 1:
        read["negative prompt"] = request.negative_prompt
    for which, text in read.items():
        _tell_what_web_uis_read(which, text, request)
        _tell_what_is_dropped(which, text, request, token_map, pipeline)


def _tell_what_web_uis_read(which: str, text: str, request: GenerationRequest) -> None:
    if tags := lora_tags(text):
        log.warning(
            "%s in the %s loads nothing: give the LoRA as extra_lora, and its strength as extra_lora_scale.",
            shortened(tags[0]),
            which,
        )
    if request.prompt_weights and (found := _CHANGING.search(text)):
        log.warning(
            'The %s has words that change with the steps, "%s…": they are read as text of less weight.',
            which,
            found[0][:40],
        )


def _tell_what_is_dropped(
    which: str, text: str, request: GenerationRequest, token_map: TokenMap, pipeline: Any
) -> None:
    parts = parts_of(text, weights=request.prompt_weights)
    found = fit(parts, (pipeline.tokenizer, pipeline.tokenizer_2), token_map)
    if not found.dropped:
        return
    lost = f" Name {' and '.join(found.lost)} earlier, or it has no effect." if found.lost else ""
    dropped = shortened(found.dropped)
    log.warning('The %s is longer than %d tokens: "%s" is dropped.%s', which, found.limit, dropped, lost)
