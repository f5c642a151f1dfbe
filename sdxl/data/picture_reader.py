"""Read picture and mask files: upright, in sRGB, without transparency.

Knows file formats, EXIF orientations and colour profiles; does not know crops or the names of files.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from pi_heif import register_heif_opener
from PIL import Image, ImageCms, ImageOps

from sdxl.data.framing import Size
from sdxl.errors import DatasetError

register_heif_opener()  # adds the format of phones' pictures to those that Pillow opens

_SUFFIXES_OF_FORMATS = {
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"},
    "PNG": {".png", ".apng"},
    "WEBP": {".webp"},
    "BMP": {".bmp"},
    "HEIF": {".heic", ".heif", ".hif"},
    "AVIF": {".avif"},
    "GIF": {".gif"},
    "TIFF": {".tif", ".tiff"},
    "JPEG2000": {".jp2", ".j2k", ".jpx"},
    "PPM": {".ppm", ".pgm"},
    "TGA": {".tga"},
    "JXL": {".jxl"},
}
"""Formats of Pillow that hold pictures as people make them, and the suffixes of their files."""
MAX_PIXELS = 200_000_000
"""Largest picture that is decoded, in pixels. Larger files are decompression bombs or needlessly large scans."""

Image.init()
FORMATS = tuple(kind for kind in _SUFFIXES_OF_FORMATS if kind in Image.OPEN)
"""The formats that this installation can read."""
IMAGE_SUFFIXES = {suffix for kind in FORMATS for suffix in _SUFFIXES_OF_FORMATS[kind]}

_ORIENTATION = 0x0112
"""EXIF tag of a picture's orientation; values 5 to 8 exchange height and width."""


def read_image(
    path: Path, *, at_least: Size | None = None, ground: str = "white"
) -> tuple[Image.Image, Size]:
    """Decode a picture to RGB in sRGB, turned upright, with transparent areas on the colour `ground`.

    at_least: allows decoding a JPEG at 1/2, 1/4 or 1/8 of its size if it still covers this size. The decoder then
        averages pixels, in a fraction of the time and memory.

    Returns:
        The picture, and the (height, width) of the whole upright file.

    Raises:
        DatasetError: not a readable picture, or more than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise DatasetError(
                        f"{path.name} has more than {MAX_PIXELS // 10**6} megapixels: shrink it first."
                    )
                return _decode(opened, at_least, ground)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"{path.name} cannot be read as a picture: save it again as jpg or png."
        ) from error


def read_mask(path: Path) -> tuple[Image.Image, Size]:
    """Decode a mask to grey values, with transparent areas black; otherwise like `read_image`."""
    picture, size = read_image(path, ground="black")
    return picture.convert("L"), size


def is_picture_content(path: Path) -> bool:
    """Whether the content of a file, whatever its name, begins like a picture in one of `FORMATS`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # TGA has no signature, so that any file may look like it.
            with Image.open(path, formats=[kind for kind in FORMATS if kind != "TGA"]):
                return True
    except Image.DecompressionBombError:
        return True  # reading it says what is wrong
    except (OSError, SyntaxError, ValueError):
        return False


def _decode(opened: Image.Image, at_least: Size | None, ground: str) -> tuple[Image.Image, Size]:
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
    if upright.has_transparency_data:
        layered = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layered.size, ground), layered)
    return upright.convert("RGB"), size


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
