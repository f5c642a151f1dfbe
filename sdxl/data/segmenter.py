"""Find what words describe in a picture, with CLIPSeg (arXiv:2112.10003).

Knows whole pictures and soft masks; does not know crops or files.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from sdxl.data.helper_models import load_part, loaded
from sdxl.errors import WeightsError
from sdxl.files.hub import SEGMENTER

_SEEN = 0.1
"""If no place reaches this probability, the picture does not show what the prompts describe."""


class Segmenter:
    """A loaded CLIPSeg."""

    def __init__(self, model, image_processor, tokenizer) -> None:
        self.model, self.image_processor, self.tokenizer = model, image_processor, tokenizer

    @torch.no_grad()
    def mask(self, image: Image.Image, prompts: Sequence[str], temperature: float) -> np.ndarray | None:
        """Where in the picture the things of `prompts` are: float32 [h, w], 0 to 1, with a maximum of 1.

        Each place gets the probability of the most likely prompt, sigmoid(logit / `temperature`): temperatures below 1
        make hard masks, above 1 soft ones. Returns None if the picture shows none of the prompts.
        """
        device = next(self.model.parameters()).device
        pixels = self.image_processor(image, return_tensors="pt")["pixel_values"].to(device)
        words = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(device)
        logits = self.model(
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
            pixel_values=pixels.expand(len(prompts), -1, -1, -1),
        ).logits
        most_likely = logits.reshape(len(prompts), *logits.shape[-2:]).amax(0).double()
        if not most_likely.isfinite().all():
            raise WeightsError(
                f"{SEGMENTER.purpose} returns infinite or undefined numbers: name another in {SEGMENTER.setting}."
            )
        if float(most_likely.max().sigmoid()) < _SEEN:
            return None
        probability = (most_likely / temperature).sigmoid()
        return (probability / probability.max()).float().cpu().numpy()


@contextmanager
def segmenter() -> Iterator[Segmenter]:
    """The segmenter; its memory is freed at the end of the block.

    Raises:
        DownloadError, WeightsError: the model cannot be fetched or loaded.
    """
    from transformers import AutoTokenizer, CLIPSegForImageSegmentation
    from transformers.models.vit import ViTImageProcessorPil

    processor = load_part(SEGMENTER, ViTImageProcessorPil.from_pretrained)
    tokenizer = load_part(SEGMENTER, AutoTokenizer.from_pretrained)
    with loaded(SEGMENTER, CLIPSegForImageSegmentation) as model:
        yield Segmenter(model, processor, tokenizer)
