"""What matters in a picture: the things that words name (CLIPSeg, arXiv:2112.10003), or its faces.

Knows whole pictures and soft masks; does not know crops or files.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from sdxl.data.faces import find_faces
from sdxl.data.framing import Salience
from sdxl.data.helper_models import loaded, part_of
from sdxl.errors import UserInputError, WeightsError
from sdxl.files.hub import SEGMENTER

log = logging.getLogger(__name__)

_SEEN = 0.1
"""Probability that some place must reach for the things to be in the picture at all."""
_FACE_GRID = 256
"""Longer side of a mask of faces, in pixels: it is smooth."""
_HEAD = (1.3, 1.7)
"""Width and height of a head with its hair, as multiples of the face from brows to chin."""
_EDGE = 0.06
"""Width of the edge of a head's mask at temperature 1, as a share of the head."""


def split_prompts(text: str | None) -> list[str]:
    """The prompts of `mask_target_prompts`, which commas part.

    Raises:
        UserInputError: nothing but commas.
    """
    prompts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if text and text.strip() and not prompts:
        raise UserInputError(
            f'mask_target_prompts is {text!r}, but must name something, such as "a dog, a cat".'
        )
    return prompts


class Segmenter:
    """A loaded CLIPSeg."""

    def __init__(self, model, image_processor, tokenizer) -> None:
        self.model, self.image_processor, self.tokenizer = model, image_processor, tokenizer

    @torch.no_grad()
    def mask(self, image: Image.Image, prompts: Sequence[str], temperature: float) -> np.ndarray | None:
        """Where the things of `prompts` are: float32 [h, w], 0 to 1, its largest value 1, over the whole picture.

        Of several prompts the likeliest counts at each place. The probability is sigmoid(logit / `temperature`):
        below 1 the mask is harder, above 1 softer. None where nothing of the prompts is seen.
        """
        device = next(self.model.parameters()).device
        pixels = self.image_processor(image, return_tensors="pt")["pixel_values"].to(device)
        words = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(device)
        logits = self.model(
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
            pixel_values=pixels.expand(len(prompts), -1, -1, -1),
        ).logits
        best = logits.reshape(len(prompts), *logits.shape[-2:]).amax(0).double()
        if not best.isfinite().all():
            raise WeightsError(
                f"{SEGMENTER.purpose} answers with numbers that are none: name another in {SEGMENTER.setting}."
            )
        if float(best.max().sigmoid()) < _SEEN:
            return None
        likely = (best / temperature).sigmoid()
        return (likely / likely.max()).float().cpu().numpy()


@contextmanager
def segmenter() -> Iterator[Segmenter]:
    """A CLIPSeg for as long as the block lasts.

    Raises:
        DownloadError, WeightsError: the model cannot be had.
    """
    from transformers import AutoTokenizer, CLIPSegForImageSegmentation
    from transformers.models.vit import ViTImageProcessorPil

    processor = part_of(SEGMENTER, ViTImageProcessorPil.from_pretrained)
    tokenizer = part_of(SEGMENTER, AutoTokenizer.from_pretrained)
    with loaded(SEGMENTER, CLIPSegForImageSegmentation) as model:
        yield Segmenter(model, processor, tokenizer)


def face_salience(image: Image.Image, temperature: float) -> tuple[Salience | None, list[float]]:
    """The soft mask of all heads in a picture, which the crop keeps whole, and the faces' heights in pixels.

    The mask falls from 1 inside each head to 0 outside, over an edge in proportion to `temperature`. No face: None.
    """
    faces = find_faces(image)
    if not faces:
        return None, []
    scale = _FACE_GRID / max(image.size)
    height, width = (max(1, round(length * scale)) for length in (image.height, image.width))
    down = (np.arange(height)[:, None] + 0.5) / height * image.height
    across = (np.arange(width)[None] + 0.5) / width * image.width
    mask, keep = np.zeros((height, width), np.float32), []
    for left, top, right, bottom in faces:
        wide, high = (right - left) * _HEAD[0] / 2, (bottom - top) * _HEAD[1] / 2
        x, y = (left + right) / 2, (top + bottom) / 2 - 0.08 * high
        distance = np.hypot((across - x) / wide, (down - y) / high) - 1
        mask = np.maximum(mask, 1 / (1 + np.exp(np.clip(distance / (_EDGE * temperature), -60, 60))))
        shares = ((x - wide) / image.width, (y - high) / image.height)
        shares += ((x + wide) / image.width, (y + high) / image.height)
        keep.append(tuple(min(max(0.0, share), 1.0) for share in shares))
    mask = (mask / mask.max()).astype(np.float32)
    return Salience(mask=mask, keep=keep), [bottom - top for _, top, _, bottom in faces]
