"""Pictures: decode, turn upright, crop, resize.

Knows pixels; does not know captions or models.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from sdxl.errors import DatasetError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
MAX_PIXELS = 200_000_000
"""Largest picture that is decoded, in pixels: more is a decompression bomb or a scan nobody needs here."""


@dataclass(frozen=True, kw_only=True)
class Framing:
    """What became of a picture on its way to the training size: SDXL's size conditioning, all in pixels.

    Source: Podell et al., "SDXL" (arXiv:2307.01952), section 2.2.
    """

    original_size: tuple[int, int]
    """(height, width) before anything was done."""
    crop_top_left: tuple[int, int]
    """(top, left) of the crop in the resized picture."""
    target_size: tuple[int, int]
    """(height, width) of the result."""

    @property
    def time_ids(self) -> list[int]:
        """The six numbers in the order of SDXL's `time_ids`."""
        return [*self.original_size, *self.crop_top_left, *self.target_size]


def read_image(path: Path) -> Image.Image:
    """Decode a picture to RGB, upright by its EXIF orientation, transparency laid on white.

    Raises:
        DatasetError: not a readable picture, or more than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise DatasetError(
                        f"{path.name} has more than {MAX_PIXELS // 10**6} megapixels: shrink it first."
                    )
                upright = ImageOps.exif_transpose(opened)
                if not upright.has_transparency_data:
                    return upright.convert("RGB")
                layered = upright.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"{path.name} cannot be read as a picture: save it again as jpg or png."
        ) from error
    canvas = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(canvas, layered).convert("RGB")


def square(image: Image.Image, side: int) -> tuple[Image.Image, Framing]:
    """Resize so that the shorter side is `side` pixels and cut the centred square."""
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    top, left = (height - side) // 2, (width - side) // 2
    resized = (
        image if (width, height) == image.size else image.resize((width, height), Image.Resampling.LANCZOS)
    )
    framing = Framing(
        original_size=(image.height, image.width), crop_top_left=(top, left), target_size=(side, side)
    )
    return resized.crop((left, top, left + side, top + side)), framing
