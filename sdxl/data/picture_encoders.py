"""Pictures and texts as vectors: DINOv2 (arXiv:2304.07193) tells how alike two pictures are, and CLIP (arXiv:2103.00020) how
well a picture shows a text.

Knows pictures and these models; does not know who drew the pictures or what follows from the numbers.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdxl.data.helper_models import lent, load_frozen, load_part
from sdxl.files.hub import CLIP, DINO

_LARGEST_SIDE = 224
"""Pixels. DINOv2's configuration names 518, but its published preprocessing makes squares of 224."""
_OF_DINO = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_OF_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and spread of each colour in the training of the encoders."""


class PictureEncoders:
    """DINOv2 and CLIP. Every method returns unit vectors on the CPU. Pictures are [3, h, w] in 0..1."""

    def __init__(self, dino: Any, clip: Any, tokenizer: Any) -> None:
        self._dino, self._clip, self._tokenizer = dino, clip, tokenizer

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """While the context lasts, both models are on `device`."""
        with lent(self._dino, device), lent(self._clip, device):
            yield

    @torch.inference_mode()
    def likeness(self, pictures: Iterable[Tensor]) -> Tensor:
        """DINOv2's CLS output [n, d]: the cosine of two says how alike the pictures are."""
        pixels = _squares(pictures, self._dino.config.image_size, *_OF_DINO).to(self._dino.device)
        return F.normalize(self._dino(pixel_values=pixels).last_hidden_state[:, 0], dim=1).cpu()

    @torch.inference_mode()
    def shown(self, pictures: Iterable[Tensor]) -> Tensor:
        """CLIP's vectors [n, d] of pictures: the cosine with a text's says how well the text is shown."""
        side = self._clip.config.vision_config.image_size
        pixels = _squares(pictures, side, *_OF_CLIP).to(self._clip.device)
        pooled = self._clip.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self._clip.visual_projection(pooled), dim=1).cpu()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """CLIP's vectors [n, d] of texts. Of each, at most 75 tokens are read."""
        most = self._clip.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt"
        ).to(self._clip.device)
        return F.normalize(
            self._clip.text_projection(self._clip.text_model(**tokens).pooler_output), dim=1
        ).cpu()


def picture_encoders() -> PictureEncoders:
    """Both models, on the CPU.

    Raises:
        DownloadError, WeightsError: a model cannot be fetched or loaded.
    """
    from transformers import AutoModel, CLIPModel, CLIPTokenizer

    tokenizer = load_part(CLIP, CLIPTokenizer.from_pretrained)
    return PictureEncoders(load_frozen(DINO, AutoModel), load_frozen(CLIP, CLIPModel), tokenizer)


def as_tensor(picture: Image.Image) -> Tensor:
    """A picture as [3, h, w] in 0..1."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def cosine_of_different(vectors: Tensor, others: Tensor) -> float:
    """The mean cosine between unit vectors [n, d] and `others` [n, d] in other rows, for n of at least 2.

    Equal rows belong to the same picture and do not count.
    """
    n = len(vectors)
    return float((vectors @ others.T).fill_diagonal_(0).sum()) / (n * (n - 1))


def _squares(
    pictures: Iterable[Tensor], side: int, mean: tuple[float, ...], spread: tuple[float, ...]
) -> Tensor:
    """The centre square of each picture, resized and normalised as in the encoders' training: [n, 3, side, side]."""
    side, squares = min(side, _LARGEST_SIDE), []
    for picture in pictures:
        short = min(picture.shape[1:])
        top, left = (picture.shape[1] - short) // 2, (picture.shape[2] - short) // 2
        square = picture[None, :, top : top + short, left : left + short]
        squares.append(F.interpolate(square, (side, side), mode="bicubic", antialias=True).clamp(0, 1))
    return (torch.cat(squares) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(spread).view(3, 1, 1)
