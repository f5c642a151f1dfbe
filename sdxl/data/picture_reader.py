"""Read picture files: upright and in sRGB.

Knows file formats, EXIF orientations and colour profiles; does not know masks, crops or the names of files.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pi_heif import register_heif_opener
from PIL import Image, ImageCms, ImageOps

from sdxl.data.framing import Size
from sdxl.errors import DatasetError, UserInputError
from sdxl.files.file_kinds import describe_other_kind

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

LONGEST_RATIO = 32
"""Largest ratio of a picture's sides. A crop of a longer picture shows less than a sixteenth of it, and enlarging it to
cover a square takes memory without bound."""

Image.MAX_IMAGE_PIXELS = (
    MAX_PIXELS  # Pillow warns from here on, and refuses twice as many by itself; its own limit is lower
)
Image.init()
FORMATS = tuple(kind for kind in _SUFFIXES_OF_FORMATS if kind in Image.OPEN)
"""The formats that this installation can read."""
IMAGE_SUFFIXES = {suffix for kind in FORMATS for suffix in _SUFFIXES_OF_FORMATS[kind]}

_ORIENTATION = 0x0112
"""EXIF tag of a picture's orientation; values 5 to 8 exchange height and width."""
_PLAIN_PNG = (b"\x08\x00", b"\x08\x02")
"""Bit depth and colour type in the header of a png: 8 bits of grey, or 8 bits each of red, green and blue."""
_UNCERTAIN = {"TGA", "TIFF"}
"""TGA has no signature, so that any file may look like it. Raw files of cameras look like TIFF, and hold a tiny preview."""
_PAGED = {"HEIF", "TIFF"}
"""Pillow's names of formats that hold several pictures rather than frames of one."""


@dataclass(frozen=True, kw_only=True)
class PictureHeader:
    """What a picture file says of itself before it is decoded."""

    pixels: int
    """How many pixels `read_image` decodes with the same `at_least`."""
    frames: int
    """Frames of an animation, or pictures in one file; `read_image` decodes one."""
    kind: str | None
    """Pillow's name of the format."""

    def told(self, name: str) -> str | None:
        """One sentence on what is left out of the file `name`, or None if all of it is used."""
        if (
            self.frames == 1 or self.kind == "MPO"
        ):  # the further pictures of an MPO are previews and depth maps
            return None
        if self.kind in _PAGED:
            return f"{name} holds {self.frames} pictures: only its main one is used."
        return f"{name} is animated ({self.frames} frames): only its first frame is used."


def read_header(path: Path, *, at_least: Size | None = None, name: str | None = None) -> PictureHeader:
    """What a picture file says of itself. at_least, name: see `read_image`.

    Raises:
        DatasetError: like `read_image`, as far as the header shows it.
    """
    with _opened(path, name or path.name) as opened:
        if at_least is not None:
            _draft(opened, at_least)
        return PictureHeader(
            pixels=opened.width * opened.height, frames=_count_frames(opened), kind=opened.format
        )


def is_plain_png(path: Path) -> bool:
    """Whether any program that decodes the file sees what `read_image` gives.

    That is a png with 8 bits per channel, grey or RGB, without transparency, rotation, a colour space other than sRGB or
    further frames.

    Raises:
        DatasetError: like `read_image`.
    """
    with path.open("rb") as file:
        depth_and_colour = file.read(26)[24:]
    with _opened(path, path.name) as opened:
        return (
            opened.format == "PNG"
            and depth_and_colour in _PLAIN_PNG
            and _count_frames(opened) == 1
            and not opened.has_transparency_data
            and opened.getexif().get(_ORIENTATION, 1) == 1
            and _in_srgb(opened) is opened
        )


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
        DatasetError: not a readable picture, more than `MAX_PIXELS`, or sides of more than 1 to `LONGEST_RATIO`.
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
        DatasetError: as `read_image`.
    """
    with _opened(path, name or path.name) as opened:
        return _decode(opened, at_least, name or path.name)


def is_picture_content(path: Path) -> bool:
    """Whether the content of a file, whatever its name, begins like a picture in one of `FORMATS`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=[kind for kind in FORMATS if kind not in _UNCERTAIN]):
                return True
    except Image.DecompressionBombError:
        return True  # reading it says what is wrong
    except Exception:  # whatever a stranger's file makes Pillow and libheif raise
        return False


@contextmanager
def _opened(path: Path, name: str) -> Iterator[Image.Image]:
    """A picture file, opened but not decoded. Errors of the block become a DatasetError too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as opened:
                _check_shape(opened, name)
                yield opened
    except (UserInputError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except Exception as error:  # whatever a stranger's file makes Pillow and libheif raise
        other = describe_other_kind(path, wanted="a jpg or png")
        # A picture that is damaged, or of a kind that Pillow does not read, has the same remedy.
        if other is None or other.startswith("is a picture"):
            raise DatasetError(f"{name} cannot be read as a picture: save it again as jpg or png.") from error
        raise DatasetError(f"{name} cannot be read as a picture, because it {other}") from error


def _too_large(name: str) -> DatasetError:
    return DatasetError(f"{name} has more than {MAX_PIXELS // 10**6} megapixels: shrink it first.")


def _check_shape(opened: Image.Image, name: str) -> None:
    if opened.width * opened.height > MAX_PIXELS:
        raise _too_large(name)
    if max(opened.size) > LONGEST_RATIO * min(opened.size):
        height, width = _upright_size(opened)
        raise DatasetError(
            f"{name} is {width}×{height}, but one side may be at most {LONGEST_RATIO} times the other: crop it first, "
            "or leave it out."
        )


def _count_frames(opened: Image.Image) -> int:
    """Frames or pictures in a file; 1 if those after the first are damaged."""
    try:
        return getattr(opened, "n_frames", 1)
    except Exception:  # whatever a stranger's file makes Pillow and libheif raise
        return 1


def _lies_on_its_side(opened: Image.Image) -> bool:
    return opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)


def _upright_size(opened: Image.Image) -> Size:
    return (opened.width, opened.height) if _lies_on_its_side(opened) else (opened.height, opened.width)


def _draft(opened: Image.Image, at_least: Size) -> None:
    """Let a JPEG decode at a fraction of its size that still covers `at_least`."""
    if opened.format not in ("JPEG", "MPO"):
        return
    height, width = reversed(at_least) if _lies_on_its_side(opened) else at_least
    opened.draft("RGB", (width, height))


def _decode(opened: Image.Image, at_least: Size | None, name: str) -> tuple[Image.Image, Size]:
    size = _upright_size(opened)  # before `draft` changes it
    if at_least is not None:
        _draft(opened, at_least)

    upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith(("I", "F")):  # 16 bits a pixel, or more
        values = np.asarray(upright)
        if upright.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise DatasetError(f"{name} has more than 16 bits a pixel: save it with 8 or 16.")
        profile = upright.info.get("icc_profile")
        upright = Image.fromarray((values // 257).astype(np.uint8))
        upright.info["icc_profile"] = profile
    upright = _in_srgb(upright)
    layered = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    layered.info.clear()  # a profile or transparency that was applied must not be written again
    return layered, size


def _in_srgb(image: Image.Image) -> Image.Image:
    """Convert `image` to sRGB if it has the profile of another colour space, such as Display P3."""
    profile = image.info.get("icc_profile")
    if profile and image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if profile and image.mode == "LA":
        grey, alpha = image.split()
        grey.info["icc_profile"] = profile
        coloured = _in_srgb(grey)
        return image if coloured is grey else Image.merge("RGBA", (*coloured.split(), alpha))
    if not profile or image.mode not in ("L", "RGB", "RGBA", "CMYK"):
        return image
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(own):
            return image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image  # ignore a broken colour profile
    return converted or image
