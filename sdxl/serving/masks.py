"""Masks of input pictures: which pixels and latent cells are repainted, and how a drawn picture is put back.

Knows pixels; does not know models, sizes to draw or files. A mask is grey: 255 is repainted, 0 is kept, and what lies
between is a share.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps

from sdxl.data.mask_reader import HALF
from sdxl.errors import UserInputError
from sdxl.serving.request import MULTIPLE, GenerationRequest, LayoutOptions

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""

BLACK, _WHITE = 16, 239
"""Values up to the first count as black, and from the second on as white: lossy files have no pure ones near edges."""
_LEVELS = [min(255, max(0, round((value - BLACK) * 255 / (_WHITE - BLACK)))) for value in range(256)]
_WIDEST_BAND = 8
"""Most pixels by which a hard edge is widened before it fades: those of a picture of 2048 pixels."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The picture that a drawn one is put back into."""

    image: Image.Image
    """RGB."""
    mask: Image.Image
    """Of the same size."""
    box: Box
    """The part of it that is drawn, at whatever size."""

    @cached_property
    def _shown(self) -> Image.Image:
        return feather(self.mask.crop(self.box))

    def put_back(self, drawn: Image.Image) -> Image.Image:
        """The picture with `drawn`, scaled to the box, blended in by the mask's feather; elsewhere it stays exactly."""
        part = self.image.crop(self.box)
        return self._with(
            Image.composite(drawn.resize(part.size, Image.Resampling.LANCZOS), part, self._shown)
        )

    def keep_outside(self, changed: Image.Image) -> Image.Image:
        """`changed` wherever the feather shows any of the drawn picture; elsewhere exactly the picture."""
        anything = self._shown.point([0] + [255] * 255)
        return self._with(Image.composite(changed.crop(self.box), self.image.crop(self.box), anything))

    def _with(self, part: Image.Image) -> Image.Image:
        if part.size == self.image.size:
            return part
        whole = self.image.copy()
        whole.paste(part, self.box[:2])
        return whole


def surroundings_of(request: GenerationRequest) -> Surroundings | None:
    """What the drawn pictures of `request` are put back into; None if it has no mask."""
    if request.image is None or request.mask is None:
        return None
    whole = (0, 0, *request.image.size)
    return request.surroundings or Surroundings(image=request.image, mask=request.mask, box=whole)


def own_mask(options: LayoutOptions) -> Image.Image | None:
    """The mask of the options, inverted if they say so and stretched to the size of their picture; None if there is none.

    Raises:
        UserInputError: nothing of it is bright.
    """
    if options.mask is None or options.image is None:
        return None
    grey = options.mask.convert("L")
    if options.mask_invert:
        grey = ImageOps.invert(grey)
    _, brightest = cast(tuple[int, int], grey.getextrema())
    if brightest < HALF:
        raise UserInputError(_nothing_bright(brightest, inverted=options.mask_invert))
    if grey.size != options.image.size:
        grey = grey.resize(options.image.size, Image.Resampling.BILINEAR)
    return grey


def _nothing_bright(brightest: int, *, inverted: bool) -> str:
    if inverted:
        return (
            "With mask_invert nothing of mask is repainted: paint the area to keep in white and the rest black, or leave "
            "mask_invert out."
        )
    if brightest == 0:
        return "mask is completely black: paint the area to repaint in white."
    return (
        f"mask is too dark, with a brightest value of {brightest} of 255: paint the area to repaint in white."
    )


def softened(mask: Image.Image, blur: int) -> Image.Image:
    """A mask whose nearly black and nearly white pixels are black and white, and then blurred.

    blur: standard deviation of the Gaussian in pixels; 0 leaves the edges as they are.
    """
    mask = mask.point(_LEVELS)
    return mask.filter(ImageFilter.GaussianBlur(blur)) if blur else mask


def latent_mask(mask: Image.Image) -> np.ndarray:
    """The latent cells of a padded mask, float32 [h/8, w/8], 0 to 1: each is repainted as much as its brightest pixel."""
    pixels = np.asarray(mask)
    cells = pixels.reshape(pixels.shape[0] // MULTIPLE, MULTIPLE, pixels.shape[1] // MULTIPLE, MULTIPLE)
    return cells.max((1, 3)).astype(np.float32) / 255


def feather(mask: Image.Image) -> Image.Image:
    """How much of the drawn picture to show at each pixel, 0 to 255: as much as the mask says, and more around the white.

    The white of a hard mask fades to nothing in a band around it, a 128th of the shorter side and at least 2 pixels wide.
    """
    half = min(_WIDEST_BAND, max(1, min(mask.size) // 256))
    white = mask.point([0] * 255 + [255])
    band = _widened(white, half).filter(ImageFilter.BoxBlur(half))
    return ImageChops.lighter(mask, band)


def _widened(white: Image.Image, by: int) -> Image.Image:
    """`white` grown by that many pixels on each side. Pillow's MaxFilter takes 20 s for a picture of 50 million pixels."""
    pixels = np.asarray(white)
    for axis in (0, 1):
        margins = ((by, by), (0, 0)) if axis == 0 else ((0, 0), (by, by))
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(pixels, margins), 2 * by + 1, axis=axis)
        pixels = windows.max(-1)
    return Image.fromarray(pixels)
