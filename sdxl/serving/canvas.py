"""Sizes of pictures, and what an input picture and its mask become before and after drawing.

Knows pixels; does not know models.
"""

import math
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from sdxl.errors import UserInputError

MULTIPLE = 8
"""Pixels a latent pixel: SDXL draws sides that are multiples of it."""
SIDES = (64, 2048)
"""Shortest and longest side that is drawn, in pixels."""
ASPECT_RATIOS = {
    "1:1": (1024, 1024),
    "5:4": (1152, 896),
    "4:3": (1152, 896),
    "3:2": (1216, 832),
    "16:9": (1344, 768),
    "21:9": (1536, 640),
    "4:5": (896, 1152),
    "3:4": (896, 1152),
    "2:3": (832, 1216),
    "9:16": (768, 1344),
    "9:21": (640, 1536),
}
"""Preset → (width, height) in pixels for a base made for 1024: sizes SDXL was trained on (arXiv:2307.01952, appendix I)
that come nearest to the ratio."""


def preset_size(aspect_ratio: str, native: int) -> tuple[int, int]:
    """(width, height) in pixels of a preset for a base made for `native` pixels.

    Raises:
        UserInputError: no such preset.
    """
    if aspect_ratio not in ASPECT_RATIOS:
        raise UserInputError(
            f"aspect_ratio is {aspect_ratio!r}, but must be custom or one of {', '.join(ASPECT_RATIOS)}."
        )
    width, height = (
        round(side * native / 1024 / MULTIPLE) * MULTIPLE for side in ASPECT_RATIOS[aspect_ratio]
    )
    return width, height


def own_size(image: Image.Image, native: int) -> tuple[int, int]:
    """(width, height) in which `image` is redrawn where no size is asked for: its own, shrunk to `native`² pixels where
    it has more than 1.5 times as many.

    Raises:
        UserInputError: too small or too elongated.
    """
    width, height = image.size
    if width * height > 1.5 * native**2:
        scale = native / math.sqrt(width * height)
        width, height = (round(side * scale / MULTIPLE) * MULTIPLE for side in (width, height))
    if min(width, height) < SIDES[0] or max(width, height) > SIDES[1]:
        raise UserInputError(
            f"image is {image.width}×{image.height}, which would be drawn at {width}×{height}, but sides must be from "
            f"{SIDES[0]} to {SIDES[1]} pixels: give width and height, or another picture."
        )
    return width, height


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale `image` to cover `size` (width, height) and cut the centre out of it; equal sizes stay as they are."""
    if image.size == size:
        return image
    scale = max(size[0] / image.width, size[1] / image.height)
    scaled = (max(size[0], round(image.width * scale)), max(size[1], round(image.height * scale)))
    left, top = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    resized = image.resize(scaled, Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + size[0], top + size[1]))


def mask_like(mask: Image.Image, original: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The mask of `original` for its picture of `size`: black (0) is kept, white (255) repainted, nothing in between.

    Raises:
        UserInputError: nothing is white.
    """
    grey = mask.convert("L")
    if grey.size != original.size:
        grey = grey.resize(original.size, Image.Resampling.BILINEAR)
    hard = cover(grey, size).point([0] * 128 + [255] * 128)
    if hard.getbbox() is None:
        raise UserInputError("mask is black all over: paint white what is to be repainted.")
    return hard


def padded(image: Image.Image) -> Image.Image:
    """`image` with its last row and column repeated up to the next multiples of `MULTIPLE`."""
    right, bottom = (-side % MULTIPLE for side in image.size)
    if not right and not bottom:
        return image
    pixels = np.asarray(image)
    widths = [(0, bottom), (0, right), (0, 0)][: pixels.ndim]
    return Image.fromarray(np.pad(pixels, widths, mode="edge"))


def latent_mask(mask: Image.Image) -> np.ndarray:
    """float32 [h/8, w/8] of a padded mask: 1 where any pixel of the cell is to be repainted."""
    pixels = np.asarray(mask)
    cells = pixels.reshape(pixels.shape[0] // MULTIPLE, MULTIPLE, pixels.shape[1] // MULTIPLE, MULTIPLE)
    return (cells.max((1, 3)) > 0).astype(np.float32)


def feather(mask: Image.Image) -> Image.Image:
    """How much of the drawn picture is seen, 0 to 255: all of it in the white, none of it beyond a band of a 128th of
    the shorter side (at least 2 pixels) around the white."""
    half = max(1, min(mask.size) // 256)
    return mask.filter(ImageFilter.MaxFilter(2 * half + 1)).filter(ImageFilter.BoxBlur(half))


def put_back(drawn: Image.Image, original: Image.Image, mask: Image.Image) -> Image.Image:
    """`drawn` within the mask's feather, `original` to the pixel outside it."""
    return Image.composite(drawn, original, feather(mask))


def keep_outside(changed: Image.Image, original: Image.Image, mask: Image.Image) -> Image.Image:
    """`changed` wherever the feather shows anything of the drawn picture, `original` to the pixel elsewhere."""
    return Image.composite(changed, original, feather(mask).point([0] + [255] * 255))


def lay_out(
    image: Image.Image | None,
    mask: Image.Image | None,
    *,
    width: int | None,
    height: int | None,
    aspect_ratio: str,
    native: int,
) -> dict[str, Any]:
    """What a request asks for in size, as `GenerationRequest` takes it: width, height, and image and mask of that size.

    A preset decides, else width and height, else the image, else `native` pixels. Image and mask are scaled to cover
    the size, and their centre is cut out.

    Raises:
        UserInputError: inputs that exclude each other, or an image or mask that cannot be drawn on.
    """
    if mask is not None and image is None:
        raise UserInputError("mask is given without image: give the picture that the mask belongs to.")
    if aspect_ratio != "custom":
        if width is not None or height is not None:
            raise UserInputError("aspect_ratio is given beside width or height: give one or the other.")
        size = preset_size(aspect_ratio, native)
    elif image is not None and width is None and height is None:
        size = own_size(image, native)
    elif image is not None and (width is None or height is None):
        raise UserInputError(
            "Of width and height only one is given: give both, or neither for those of image."
        )
    else:
        size = (native if width is None else width, native if height is None else height)
    hard = None if mask is None or image is None else mask_like(mask, image, size)
    covered = None if image is None else cover(image, size)
    return {"width": size[0], "height": size[1], "image": covered, "mask": hard}
