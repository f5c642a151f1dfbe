"""The size to draw, and the input picture and mask fitted to it.

Knows pixels; does not know models. Sizes are (height, width) in pixels.
"""

import logging
import math
from dataclasses import dataclass
from typing import cast

import numpy as np
from PIL import Image

from sdxl.data.framing import crop_box, place_crop
from sdxl.data.mask_reader import HALF
from sdxl.errors import UserInputError
from sdxl.serving.masks import BLACK, Box, Surroundings, own_mask, softened
from sdxl.serving.request import ASPECT_RATIOS, MULTIPLE, SIDES, LayoutOptions

log = logging.getLogger(__name__)

MOST_PIXELS_AROUND = 50_000_000
"""Pixels of a picture of which only a part is drawn: several such pictures are in memory at once."""


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The size to draw, with the input picture and its mask fitted to it."""

    width: int
    height: int
    image: Image.Image | None = None
    """RGB, `width` × `height`."""
    mask: Image.Image | None = None
    """Grey, `width` × `height`: how much is repainted."""
    surroundings: Surroundings | None = None
    """What the drawn picture is put back into; None for `image`, or where there is no mask."""


def lay_out(options: LayoutOptions, *, native: int) -> Canvas:
    """Decide the size, and fit the input picture and its mask to it.

    A preset decides the size, else width and height, else the picture, else `native`, the side in pixels that the base
    was made for. Picture and mask are scaled to cover the size; what sticks out is cut off evenly. With `only_masked` the
    part around the mask is drawn alone.

    Raises:
        UserInputError: the picture has a size that cannot be drawn, or nothing of the mask is white.
    """
    image, mask = options.image, own_mask(options)
    if options.only_masked and image is not None and mask is not None:
        return _told(_around_mask(image, mask, options, native))
    size = _asked_size(options, native)
    if size is None:
        size = (native, native) if image is None else own_size(image, native)
    return _told(
        Canvas(
            width=size[1],
            height=size[0],
            image=None if image is None else cover(image, size),
            mask=None if mask is None else _fitted(mask, size, options.mask_blur),
        )
    )


def _told(canvas: Canvas) -> Canvas:
    """`canvas`; logs that its mask is weak.

    Raises:
        UserInputError: nothing is left of the mask.
    """
    if canvas.mask is not None and (brightest := _brightest_left(canvas.mask)) < 255:
        log.warning(
            "Nothing is repainted in full, because the mask has at most %d of 255: it is not white, very small, or much "
            "blurred.",
            brightest,
        )
    return canvas


def _brightest_left(mask: Image.Image) -> int:
    """The brightest value of a mask that was blurred or made smaller.

    Raises:
        UserInputError: all of it is black.
    """
    brightest = cast(tuple[int, int], mask.getextrema())[1]
    if brightest <= BLACK:
        raise UserInputError(
            f"Nothing of mask is left at {mask.width}×{mask.height}: make its white area larger, or give less mask_blur or "
            "mask_padding."
        )
    return brightest


def _asked_size(options: LayoutOptions, native: int) -> tuple[int, int] | None:
    """The (height, width) that the options name; None if they name none."""
    if options.aspect_ratio != "custom":
        return preset_size(options.aspect_ratio, native)
    if options.width is None and options.height is None:
        return None
    return (
        native if options.height is None else options.height,
        native if options.width is None else options.width,
    )


def preset_size(aspect_ratio: str, native: int) -> tuple[int, int]:
    """The (height, width) of a preset for a base made for `native` pixels."""
    height, width = (
        round(side * native / 1024 / MULTIPLE) * MULTIPLE for side in ASPECT_RATIOS[aspect_ratio]
    )
    return height, width


def own_size(image: Image.Image, native: int) -> tuple[int, int]:
    """The (height, width) in which to redraw `image` when no size is asked for.

    That is its own size. A picture of more than 1.5 times `native`² pixels is shrunk to `native`² pixels.

    Raises:
        UserInputError: the picture is too small or too elongated.
    """
    height, width = image.height, image.width
    if width * height > 1.5 * native**2:
        scale = native / math.sqrt(width * height)
        height, width = (round(side * scale / MULTIPLE) * MULTIPLE for side in (height, width))
    if min(width, height) < SIDES[0] or max(width, height) > SIDES[1]:
        raise UserInputError(
            f"image is {image.width}×{image.height} and would be drawn at {width}×{height}, but sides must be from "
            f"{SIDES[0]} to {SIDES[1]} pixels: give width and height, or another picture."
        )
    return height, width


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale `image` to cover `size` (height, width) and crop its centre; an image of that size is returned unchanged."""
    height, width = size
    if (image.height, image.width) == size:
        return image
    # Scale only what is shown: a long picture that covers the size may have a hundred times its pixels.
    box = crop_box(image, place_crop((image.height, image.width), size, None))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def _fitted(mask: Image.Image, size: tuple[int, int], blur: int) -> Image.Image:
    """The mask of the whole picture, fitted to `size` as the picture is, and softened.

    Raises:
        UserInputError: what is bright of it is cut off.
    """
    fitted = cover(mask, size)
    if cast(tuple[int, int], fitted.getextrema())[1] < HALF:
        raise UserInputError(
            f"Nothing to repaint is left at {size[1]}×{size[0]}: make the white area of mask or the transparent area of "
            "image larger, or give a width and height that cut off less of image."
        )
    return softened(fitted, blur)


def _around_mask(image: Image.Image, mask: Image.Image, options: LayoutOptions, native: int) -> Canvas:
    """A canvas of the part of `image` around its mask, which is put back into the whole picture.

    The part is the smallest box around all that is not black, with `mask_padding` on each side. It grows to the shape of
    the size that is asked for, as far as the picture reaches, and is scaled to lie within that size. Without one it has
    its own shape, no longer than the longest preset, and `native`² pixels if the sides allow that.

    Raises:
        UserInputError: the picture is too large, or the part too elongated.
    """
    if image.width * image.height > MOST_PIXELS_AROUND:
        raise UserInputError(
            f"image has {image.width}×{image.height} pixels, but only_masked takes at most 50 million: make it smaller."
        )
    mask = softened(mask, options.mask_blur)
    _brightest_left(mask)
    box = _padded_box(mask, options.mask_padding)
    asked = _asked_size(options, native)
    width, height = box[2] - box[0], box[3] - box[1]
    longest = max(width / height for height, width in ASPECT_RATIOS.values())
    ratio = asked[1] / asked[0] if asked else min(longest, max(1 / longest, width / height))
    box = _grown(box, ratio, image.size)
    width, height = box[2] - box[0], box[3] - box[1]
    if asked:
        scale = min(asked[0] / height, asked[1] / width)
    else:
        scale = max(native / math.sqrt(width * height), SIDES[0] / min(width, height))
        scale = min(scale, SIDES[1] / max(width, height))
    drawn = (round(height * scale / MULTIPLE) * MULTIPLE, round(width * scale / MULTIPLE) * MULTIPLE)
    if min(drawn) < SIDES[0]:
        raise UserInputError(
            f"The part of image around mask has {width}×{height} pixels and would be drawn at {drawn[1]}×{drawn[0]}, but "
            f"sides must be at least {SIDES[0]} pixels: leave out width, height and aspect_ratio."
        )
    log.info(
        "Drawing %d×%d pixels of image, from (%d, %d), at %d×%d.", width, height, *box[:2], drawn[1], drawn[0]
    )
    return Canvas(
        width=drawn[1],
        height=drawn[0],
        image=image.resize((drawn[1], drawn[0]), Image.Resampling.LANCZOS, box=box),
        mask=mask.resize((drawn[1], drawn[0]), Image.Resampling.BILINEAR, box=box),
        surroundings=Surroundings(image=image, mask=mask, box=box),
    )


def _padded_box(mask: Image.Image, padding: int) -> Box:
    """The box around all that is not black, with `padding` pixels on each side, as far as the mask reaches."""
    box = mask.getbbox()
    assert box is not None, "something is bright"
    left, top, right, bottom = box
    return (
        max(0, left - padding),
        max(0, top - padding),
        min(mask.width, right + padding),
        min(mask.height, bottom + padding),
    )


def _grown(box: Box, ratio: float, within: tuple[int, int]) -> Box:
    """The smallest box around `box` of the `ratio` width / height, as far as a picture of size `within` reaches."""
    left, top, right, bottom = box
    wanted = (
        max(right - left, round((bottom - top) * ratio)),
        max(bottom - top, round((right - left) / ratio)),
    )
    width, height = (min(side, most) for side, most in zip(wanted, within, strict=True))
    left = min(max(0, (left + right - width) // 2), within[0] - width)
    top = min(max(0, (top + bottom - height) // 2), within[1] - height)
    return (left, top, left + width, top + height)


def padded(image: Image.Image) -> Image.Image:
    """`image` with its last row and column repeated up to the next multiples of `MULTIPLE`."""
    right, bottom = -image.width % MULTIPLE, -image.height % MULTIPLE
    if not right and not bottom:
        return image
    pixels = np.asarray(image)
    widths = [(0, bottom), (0, right), (0, 0)][: pixels.ndim]
    return Image.fromarray(np.pad(pixels, widths, mode="edge"))
