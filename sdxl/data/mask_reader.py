"""Read masks as people paint them: white, in a colour or with transparency.

Knows which pixels of a mask are meant; does not know crops or what a mask is for.
"""

import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from sdxl.data.framing import Size
from sdxl.data.picture_reader import on_white, read_layered
from sdxl.errors import DatasetError

log = logging.getLogger(__name__)

HALF = 128
"""Of 255: from here on a pixel counts as bright, and as visible."""
_ONE_TONE = 16
"""Visible pixels whose brightness differs by at most this are of one tone."""
_WHITE, _COLOURED = 224, 128
"""A pixel is white if no channel is below the first, and coloured if its channels differ by the second."""
_NOTICED = 0.001
"""Smallest share of the visible pixels that counts as an area."""


def read_mask(path: Path, *, name: str | None = None) -> tuple[Image.Image, Size]:
    """Decode a mask to grey values: 255 where it is painted, 0 where it is not.

    - Paint is white, or any colour on black: the largest channel counts.
    - Transparent areas are not painted.
    - If all that is visible between transparent areas is dark or of one tone, it is the paint, in whatever colour: many
      editors export black strokes on nothing. The opacity is then the mask.

    name: its name in messages; by default the file name.

    Returns:
        The mask, and its (height, width).

    Raises:
        DatasetError: not a readable picture; or it is unclear what is painted, in a mask with coloured areas beside white
            ones and in a picture with a hole.
    """
    name = name or path.name
    layered, size = read_layered(path, name=name)
    channels = layered.split()
    value = ImageChops.lighter(ImageChops.lighter(*channels[:2]), channels[2])
    lowest = ImageChops.darker(ImageChops.darker(*channels[:2]), channels[2])
    alpha = channels[3] if layered.mode == "RGBA" else Image.new("L", layered.size, 255)
    visible = np.asarray(alpha) >= HALF
    tones, lows = np.asarray(value)[visible], np.asarray(lowest)[visible]
    if not tones.size:
        return ImageChops.multiply(value, alpha), size

    if not visible.all():
        if tones.max() < HALF or tones.max() - tones.min() <= _ONE_TONE:
            if tones.min() < _WHITE:
                log.info("%s is painted on a transparent ground: what is visible counts as white.", name)
            return alpha, size
        if mostly_grey(tones):
            raise DatasetError(
                f"{name} is a picture with transparent areas, not a mask: paint the masked area white and all else black."
            )
    is_coloured = tones - lows >= _COLOURED
    if min(is_coloured.mean(), (lows >= _WHITE).mean()) > _NOTICED:
        raise DatasetError(
            f"{name} has coloured areas beside white ones, so what is masked is unclear: paint the masked area white and "
            "all else black."
        )
    return ImageChops.multiply(value, alpha), size


def mostly_grey(values: np.ndarray) -> bool:
    """Whether most of these values, 0 to 255, are neither nearly black nor nearly white."""
    return bool(((values >= 255 - _WHITE) & (values < _WHITE)).mean() > 0.5)


def read_with_hole(path: Path, *, name: str | None = None) -> tuple[Image.Image, Image.Image | None]:
    """Decode a picture and the mask of its hole: the picture as RGB on white, and 255 where it is transparent.

    The mask is None if hardly anything, less than a thousandth of the picture, is more than half transparent.

    Raises:
        DatasetError: not a readable picture.
    """
    layered, _ = read_layered(path, name=name)
    hole = ImageChops.invert(layered.getchannel("A")) if layered.mode == "RGBA" else None
    if hole is not None and (np.asarray(hole) >= HALF).mean() < _NOTICED:
        hole = None
    return on_white(layered), hole
