"""The large copy of a prepared picture, `N.large.png`: the same crop with more of the original's own pixels.

Knows sizes and pixels; does not know what is done with the copy. Nothing in it is enlarged.
"""

import logging
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from sdxl.data.dataset_folder import large_file
from sdxl.data.framing import Framing, Size, crop_box
from sdxl.data.picture_reader import is_plain_png, read_header, read_image

log = logging.getLogger(__name__)

MOST_DETAIL = 1.45
"""A large copy has at most this many times the picture's pixels a side. It is more than the largest zoom of a crop, because
cutting resamples a second time and softens a little. A JPEG of 12 megapixels can still be decoded at half its size."""
LEAST_DETAIL = 1.05
"""An original with less than this gives no large copy."""
_PNG_LEVEL = 1
"""Compression: the copy is read once and often thrown away, so speed counts more than bytes."""
_BLOCKS = 32
"""Blocks across and down in which a copy is compared with its picture."""
_SMALLEST_BLOCK = 8
"""Pixels of the picture a side."""
_SAME = 6
"""Mean grey values, of 255, by which a block may differ. The same photograph at two sizes differed by up to 2."""


def most_detail(size: Size) -> Size:
    """The (height, width) that a large copy of a picture of `size` may have at most."""
    height, width = size
    return round(height * MOST_DETAIL), round(width * MOST_DETAIL)


def write_large(image: Image.Image, crop: Framing, framing: Framing, picture: Path) -> None:
    """Write the large copy of `picture` if the original has the pixels for it.

    image: the whole source, decoded at any size that covers `most_detail`.
    crop: how the source was resized and cropped to `picture`.
    framing: how the original was. It may be smaller than the source, if that was enlarged before.
    """
    detail = min(MOST_DETAIL, 1 / max(crop.scale, framing.scale))
    if detail < LEAST_DETAIL:
        return
    height, width = (round(length * detail) for length in crop.target_size)
    box = crop_box(image, crop)
    if detail == 1 / crop.scale:  # the pixels as they are: to move them by a fraction would soften them
        left = min(round(box[0]), image.width - width)
        top = min(round(box[1]), image.height - height)
        box = (left, top, left + width, top + height)
    large = image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    large.save(large_file(picture), compress_level=_PNG_LEVEL)


def pixels_of_large(source: Path) -> int:
    """How many pixels `keep_large` decodes for a source."""
    large = large_file(source)
    return read_header(large).pixels if large.is_file() else 0


def keep_large(source: Path, name: str, shown: Image.Image, picture: Path) -> None:
    """Copy the large copy of `source`, a picture of a dataset folder, to that of `picture`, if it still fits.

    It does not fit if the picture was edited, which the log says. name: the source's, for messages.
    shown: what the source shows.

    Raises:
        DatasetError: the copy cannot be read.
    """
    large = large_file(source)
    if not large.is_file():
        return
    content, size = read_image(large)
    limit = most_detail((shown.height, shown.width))
    fits = shown.height <= size[0] <= limit[0] and shown.width <= size[1] <= limit[1]
    if (
        fits
        and is_plain_png(large)
        and _shows_the_same(content.resize(shown.size, Image.Resampling.LANCZOS), shown)
    ):
        shutil.copyfile(large, large_file(picture))
    else:
        log.warning(
            "%s is not used, because it differs from %s: crops of this picture are not learned.",
            large.name,
            name,
        )


def _shows_the_same(one: Image.Image, other: Image.Image) -> bool:
    """Whether two pictures of one size are nearly equal in each block."""
    across, down = (max(min(_BLOCKS, length // _SMALLEST_BLOCK), 1) for length in one.size)
    first, second = (
        np.asarray(picture.resize((across, down), Image.Resampling.BOX), np.int16) for picture in (one, other)
    )
    return int(np.abs(first - second).max()) <= _SAME
