"""The size to draw, and the input picture and mask before and after drawing.

Knows pixels; does not know models. Sizes are (height, width) in pixels.
"""

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
from PIL import Image, ImageFilter

from sdxl.data.framing import crop_box, place_crop
from sdxl.data.mask_reader import HALF
from sdxl.errors import UserInputError
from sdxl.serving.request import ASPECT_RATIOS, MULTIPLE, SIDES, LayoutOptions


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The size to draw, with the input picture and its mask fitted to it."""

    width: int
    height: int
    image: Image.Image | None = None
    """RGB, `width` × `height`."""
    mask: Image.Image | None = None
    """Black and white, `width` × `height`: white is repainted."""


def lay_out(options: LayoutOptions, *, native: int) -> Canvas:
    """Decide the size, and fit the input picture and its mask to it.

    A preset decides the size, else width and height, else the picture, else `native`, the side in pixels that the base
    was made for. Picture and mask are scaled to cover the size; what sticks out is cut off evenly.

    Raises:
        UserInputError: the picture has a size that cannot be drawn, or nothing of the mask is white.
    """
    image, mask = options.image, options.mask
    if options.aspect_ratio != "custom":
        size = preset_size(options.aspect_ratio, native)
    elif image is not None and options.width is None:
        size = own_size(image, native)
    else:
        size = (
            native if options.height is None else options.height,
            native if options.width is None else options.width,
        )
    return Canvas(
        width=size[1],
        height=size[0],
        image=None if image is None else cover(image, size),
        mask=None if mask is None or image is None else mask_like(mask, image, size),
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


def mask_like(mask: Image.Image, original: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The mask of `original`, fitted to `size` (height, width): 0 where pixels are kept, 255 where they are repainted.

    Pixels from half the brightness on are repainted.

    Raises:
        UserInputError: the mask is nowhere bright, or not where it is drawn.
    """
    grey = mask.convert("L")
    _, brightest = cast(tuple[int, int], grey.getextrema())
    if brightest == 0:
        raise UserInputError("mask is completely black: paint the area to repaint in white.")
    if brightest < HALF:
        raise UserInputError(
            f"mask is too dark, with a brightest value of {brightest} of 255: paint the area to repaint in white."
        )
    if grey.size != original.size:
        grey = grey.resize(original.size, Image.Resampling.BILINEAR)
    hard = cover(grey, size).point([0] * HALF + [255] * (256 - HALF))
    if hard.getbbox() is None:
        raise UserInputError(
            f"Nothing to repaint is left at {size[1]}×{size[0]}: make the white area of mask or the transparent area of "
            "image larger, or give a width and height that cut off less of image."
        )
    return hard


def padded(image: Image.Image) -> Image.Image:
    """`image` with its last row and column repeated up to the next multiples of `MULTIPLE`."""
    right, bottom = -image.width % MULTIPLE, -image.height % MULTIPLE
    if not right and not bottom:
        return image
    pixels = np.asarray(image)
    widths = [(0, bottom), (0, right), (0, 0)][: pixels.ndim]
    return Image.fromarray(np.pad(pixels, widths, mode="edge"))


def latent_mask(mask: Image.Image) -> np.ndarray:
    """The latent cells of a padded mask, float32 [h/8, w/8]: 1 where any pixel of the cell is repainted."""
    pixels = np.asarray(mask)
    cells = pixels.reshape(pixels.shape[0] // MULTIPLE, MULTIPLE, pixels.shape[1] // MULTIPLE, MULTIPLE)
    return (cells.max((1, 3)) > 0).astype(np.float32)


def feather(mask: Image.Image) -> Image.Image:
    """How much of the drawn picture to show at each pixel, 0 to 255.

    All of it in the white. It fades to nothing in a band around the white, a 128th of the shorter side and at least 2
    pixels wide.
    """
    half = max(1, min(mask.size) // 256)
    return mask.filter(ImageFilter.MaxFilter(2 * half + 1)).filter(ImageFilter.BoxBlur(half))


def put_back(drawn: Image.Image, original: Image.Image, mask: Image.Image) -> Image.Image:
    """Blend `drawn` into `original` by the mask's feather; outside it, `original` stays exactly."""
    return Image.composite(drawn, original, feather(mask))


def keep_outside(changed: Image.Image, original: Image.Image, mask: Image.Image) -> Image.Image:
    """`changed` wherever the feather shows any of the drawn picture; elsewhere exactly `original`."""
    return Image.composite(changed, original, feather(mask).point([0] + [255] * 255))
