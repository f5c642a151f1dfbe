"""Enlarge pictures with Swin2SR (Conde et al., arXiv:2209.11345), in tiles to bound memory.

Knows pixels; does not know why a picture is too small.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from sdxl.data.helper_models import loaded
from sdxl.files.hub import UPSCALER

TILE = 192
"""Side of a tile in pixels of the small picture."""
OVERLAP = 32
"""Pixels that neighbouring tiles share. The outer quarter is discarded; the rest blends one tile into the other."""
_WINDOW = 8
"""The model takes sides that are multiples of this."""
_BORDER = 8
"""Mirrored pixels added around the picture and cropped afterwards, because convolutions treat the outside as black."""


class Upscaler:
    """A loaded Swin2SR."""

    def __init__(self, model, scale: int) -> None:
        self.model = model
        self.scale = scale
        """Factor by which each side grows."""

    @torch.no_grad()
    def enlarge(self, image: Image.Image) -> Image.Image:
        """Enlarge each side of `image` by `scale`: pixel (x, y) becomes the block at (scale·x, scale·y)."""
        pixels = np.asarray(image.convert("RGB"))
        height, width = pixels.shape[:2]
        around = [(_BORDER, _BORDER + -length % _WINDOW) for length in (height, width)]
        pixels = np.pad(pixels, [*around, (0, 0)], mode="symmetric")

        # Tiles blend along a row, then rows blend: a lower row must not show the edges of its neighbours' tiles.
        result = np.zeros((pixels.shape[0] * self.scale, pixels.shape[1] * self.scale, 3), np.uint8)
        for top, bottom in _spans(pixels.shape[0]):
            band = result[top * self.scale : bottom * self.scale]
            weight = _ramp(len(band), self.scale, top > 0)[:, None, None]
            band[:] = (band * (1 - weight) + self._band(pixels[top:bottom]) * weight).round()
        edge = _BORDER * self.scale
        return Image.fromarray(result[edge : edge + height * self.scale, edge : edge + width * self.scale])

    def _band(self, pixels: np.ndarray) -> np.ndarray:
        """Enlarge a row of tiles: uint8 [h, w, 3] → float32 [scale·h, scale·w, 3], 0 to 255."""
        band = np.zeros((pixels.shape[0] * self.scale, pixels.shape[1] * self.scale, 3), np.float32)
        for left, right in _spans(pixels.shape[1]):
            place = band[:, left * self.scale : right * self.scale]
            weight = _ramp(place.shape[1], self.scale, left > 0)[None, :, None]
            place[:] = place * (1 - weight) + self._run(pixels[:, left:right]) * weight
        return band

    def _run(self, tile: np.ndarray) -> np.ndarray:
        """Enlarge one tile: uint8 [h, w, 3] → float32 [scale·h, scale·w, 3], 0 to 255."""
        device = next(self.model.parameters()).device
        batch = torch.from_numpy(tile.copy()).to(device).permute(2, 0, 1)[None].float() / 255
        larger = self.model(pixel_values=batch).reconstruction[0].clamp(0, 1) * 255
        return larger.permute(1, 2, 0).cpu().numpy()


@contextmanager
def upscaler() -> Iterator[Upscaler]:
    """The upscaler; its memory is freed at the end of the block.

    Raises:
        DownloadError, WeightsError: the model cannot be fetched or loaded.
    """
    from transformers import Swin2SRForImageSuperResolution

    with loaded(UPSCALER, Swin2SRForImageSuperResolution) as model:
        yield Upscaler(model, model.config.upscale)


def _spans(length: int) -> Sequence[tuple[int, int]]:
    """(start, end) of the tiles that cover `length` pixels; neighbours share at least `OVERLAP` pixels."""
    if length <= TILE:
        return [(0, length)]
    count = -(-(length - OVERLAP) // (TILE - OVERLAP))
    starts = [round(index * (length - TILE) / (count - 1)) for index in range(count)]
    return [(start, start + TILE) for start in starts]


def _ramp(length: int, scale: int, has_neighbour: bool) -> np.ndarray:
    """Weight [length] of a tile over the tiles before it: 0 on the outer quarter of the overlap, then rising to 1."""
    if not has_neighbour:
        return np.ones(length, np.float32)
    outer = OVERLAP * scale // 4
    return np.clip((np.arange(length) + 0.5 - outer) / (OVERLAP * scale - 2 * outer), 0, 1).astype(np.float32)
