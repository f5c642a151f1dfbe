"""Read picture files: upright and in sRGB.

Knows file formats, EXIF orientations and colour profiles; does not know masks, crops or the names of files.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from pi_heif import register_heif_opener
from PIL import Image, ImageCms, ImageOps

from sdxl.data.framing import Size
from sdxl.errors import DatasetError
from sdxl.files.file_kinds import describe_other_kind

register_heif_opener()  # adds the format of phones' pictures to those that Pillow opens

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".heic", ".heif"}
MAX_PIXELS = 200_000_000
"""Largest picture that is decoded, in pixels. Larger files are decompression bombs or needlessly large scans."""

_ORIENTATION = 0x0112
"""EXIF tag of a picture's orientation; values 5 to 8 exchange height and width."""


def read_image(
    path: Path, *, at_least: Size | None = None, name: str | None = None
) -> tuple[Image.Image, Size]:
    """Decode a picture to RGB in sRGB, turned upright, with transparent areas white.

    at_least: allows decoding a JPEG at 1/2, 1/4 or 1/8 of its size if it still covers this size. The decoder then
        averages pixels, in a fraction of the time and memory.
    name: its name in messages; by default the file name.

    Returns:
        The picture, and the (height, width) of the whole upright file.

    Raises:
        DatasetError: not a readable picture, or more than `MAX_PIXELS`.
    """
    layered, size = read_layered(path, at_least=at_least, name=name)
    return on_white(layered), size


def on_white(layered: Image.Image) -> Image.Image:
    """An RGB or RGBA picture as RGB, with transparent areas white."""
    if layered.mode == "RGBA":
        layered = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
    return layered.convert("RGB")


def read_layered(
    path: Path, *, at_least: Size | None = None, name: str | None = None
) -> tuple[Image.Image, Size]:
    """Like `read_image`, but as RGBA if the file has any kind of transparency.

    Raises:
        DatasetError: not a readable picture, or more than `MAX_PIXELS`.
    """
    name = name or path.name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise DatasetError(
                        f"{name} has more than {MAX_PIXELS // 10**6} megapixels: shrink it first."
                    )
                return _decode(opened, at_least)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DatasetError):
            raise
        other = describe_other_kind(path, wanted="a jpg or png")
        if (
            other is None or "picture" in other
        ):  # a picture that is damaged, or of a kind that Pillow does not read
            raise DatasetError(f"{name} cannot be read as a picture: save it again as jpg or png.") from error
        raise DatasetError(f"{name} cannot be read as a picture, because it {other}") from error


def _decode(opened: Image.Image, at_least: Size | None) -> tuple[Image.Image, Size]:
    # The header's size, before `draft` changes it.
    height, width = opened.height, opened.width
    lies_on_its_side = opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    if at_least is not None:
        draft_height, draft_width = reversed(at_least) if lies_on_its_side else at_least
        opened.draft("RGB", (draft_width, draft_height))

    upright = ImageOps.exif_transpose(opened)
    size = (width, height) if lies_on_its_side else (height, width)
    if upright.mode.startswith("I"):  # 16 bits a pixel
        upright = Image.fromarray((np.asarray(upright).clip(0, 65535) // 257).astype(np.uint8))
    upright = _in_srgb(upright)
    return upright.convert("RGBA" if upright.has_transparency_data else "RGB"), size


def _in_srgb(image: Image.Image) -> Image.Image:
    """Convert `image` to sRGB if it has the profile of another colour space, such as Display P3."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(own):
            return image
        mode = "RGB" if image.mode == "CMYK" else image.mode
        converted = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image  # ignore a broken colour profile
    return converted or image
