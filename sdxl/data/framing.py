"""Pictures: decode, turn upright, choose the size and place of the crop, resize.

Knows pixels and where in a picture something lies; does not know captions or models.
"""

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pi_heif import register_heif_opener
from PIL import Image, ImageCms, ImageOps

from sdxl.errors import DatasetError

register_heif_opener()  # what phones take; Pillow asks it as it asks its own decoders

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".heic", ".heif"}
MAX_PIXELS = 200_000_000
"""Largest picture that is decoded, in pixels: more is a decompression bomb or a scan nobody needs here."""
WIDEST = 2.0
"""Largest ratio of the sides of a bucket."""

Size = tuple[int, int]
"""(height, width) in pixels."""
Box = tuple[float, float, float, float]
"""(left, top, right, bottom), each from 0 to 1 as a share of the picture's width or height."""

_ORIENTATION = 0x0112
_MARGIN = 0.01
"""Room around what must not be cut, as a share of the picture."""


@dataclass(frozen=True, kw_only=True)
class Framing:
    """What became of a picture on its way to the training size: SDXL's size conditioning, all in pixels.

    Source: Podell et al., "SDXL" (arXiv:2307.01952), section 2.2.
    """

    original_size: Size
    """(height, width) before anything was done."""
    crop_top_left: tuple[int, int]
    """(top, left) of the crop in the resized picture."""
    target_size: Size
    """(height, width) of the result."""

    @property
    def time_ids(self) -> list[int]:
        """The six numbers in the order of SDXL's `time_ids`."""
        return [*self.original_size, *self.crop_top_left, *self.target_size]


@dataclass(frozen=True, kw_only=True)
class Salience:
    """What matters in a picture, and where."""

    mask: np.ndarray
    """How much each place matters: float32 [h, w], 0 to 1, of any size."""
    keep: Sequence[Box] = ()
    """Boxes that the crop may not cut where they fit, such as faces."""


def read_image(
    path: Path, *, at_least: Size | None = None, ground: str = "white"
) -> tuple[Image.Image, Size]:
    """Decode a picture to RGB in sRGB, upright by its EXIF orientation, transparency laid on `ground`.

    A JPEG may be decoded at a half, a quarter or an eighth of its size, as long as it still covers `at_least`: the
    decoder averages as it goes, in a fraction of the time and memory.

    Returns:
        The picture, and the upright file's own (height, width).

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
                size = (opened.height, opened.width)
                lying = opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
                if at_least is not None:
                    height, width = reversed(at_least) if lying else at_least
                    opened.draft("RGB", (width, height))
                upright = ImageOps.exif_transpose(opened)
                original = (size[1], size[0]) if lying else size
                if upright.mode.startswith("I"):
                    upright = Image.fromarray((np.asarray(upright).clip(0, 65535) // 257).astype(np.uint8))
                upright = _in_srgb(upright)
                if not upright.has_transparency_data:
                    return upright.convert("RGB"), original
                layered = upright.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"{path.name} cannot be read as a picture: save it again as jpg or png."
        ) from error
    canvas = Image.new("RGBA", layered.size, ground)
    return Image.alpha_composite(canvas, layered).convert("RGB"), original


def _in_srgb(image: Image.Image) -> Image.Image:
    """`image` in sRGB, where it brings the profile of another colour space, such as Display P3 of phones."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(own):
            return image
        mode = "RGB" if image.mode == "CMYK" else image.mode
        turned = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image  # a broken profile is none
    return turned or image


def buckets(side: int) -> list[Size]:
    """The sizes (height, width) that pictures are cut to at about `side`² pixels, from tall over square to wide.

    Sides are multiples of 64, below a `side` of 512 of 32, so that there still are several; the area is never above
    `side`², the ratio of the sides at most `WIDEST`. Of sizes that differ in the longer side alone the longest counts.

    Source: NovelAI, "Aspect Ratio Bucketing" (2022); SDXL was trained on such sizes (arXiv:2307.01952, appendix I).
    """
    step = 64 if side >= 512 else 32
    widest: dict[int, int] = {}
    for width in range(step * (side // step + 1), 2 * side, step):
        height = side * side // width // step * step
        if height and width <= WIDEST * height:
            widest[height] = width
    wide = [(height, width) for height, width in sorted(widest.items(), reverse=True)]
    return [*((width, height) for height, width in reversed(wide)), (side, side), *wide]


def nearest_bucket(size: Size, side: int) -> Size:
    """The bucket of `side` whose ratio is nearest to that of a picture of `size`, so that the least is cut off."""
    ratio = math.log(size[1] / size[0])
    return min(buckets(side), key=lambda bucket: abs(math.log(bucket[1] / bucket[0]) - ratio))


def place_crop(size: Size, target: Size, salience: Salience | None) -> Framing:
    """Where to cut a picture of `size` that was resized to just cover `target`: centred, or by what matters in it.

    By salience: no box of `keep` and not the mask's visible part (over a half) is cut where it fits; then as much of
    the mask as possible is inside; then the mask's centre of mass is as near to the middle as possible.
    """
    scale = max(target[0] / size[0], target[1] / size[1])
    resized = [max(goal, round(length * scale)) for goal, length in zip(target, size, strict=True)]
    if salience is None or not salience.mask.any():
        corner = [(length - goal) // 2 for length, goal in zip(resized, target, strict=True)]
    else:
        corner = [
            _offset(salience, axis, length, goal)
            for axis, (length, goal) in enumerate(zip(resized, target, strict=True))
        ]
    return Framing(original_size=size, crop_top_left=(corner[0], corner[1]), target_size=target)


def _offset(salience: Salience, axis: int, length: int, window: int) -> int:
    """The best first pixel of a `window` along an axis (0 down, 1 across) of `length` pixels."""
    mask = salience.mask
    starts = np.arange(length - window + 1)
    seen = np.flatnonzero((mask > 0.5).any(axis=1 - axis)) / mask.shape[axis]
    spans = [(box[1 - axis], box[3 - axis]) for box in salience.keep]
    if len(seen):
        spans.append((seen[0], seen[-1] + 1 / mask.shape[axis]))
    cut = np.zeros(len(starts))
    for low, high in spans:
        first, last = (
            max(0.0, low - _MARGIN) * length,
            min(1.0, high + _MARGIN) * length,
        )
        if last - first > window:
            first, last = low * length, high * length
        if last - first <= window:
            cut += (starts > first) | (starts + window < last)
    mass = np.concatenate([[0], np.cumsum(mask.sum(axis=1 - axis, dtype=np.float64))])
    edges = np.linspace(0, length, len(mass))
    inside = np.interp(starts + window, edges, mass) - np.interp(starts, edges, mass)
    middle = (np.diff(mass) * (edges[1:] + edges[:-1]) / 2).sum() / mass[-1]
    away = np.abs(starts + window / 2 - middle)
    return int(np.lexsort((away, -np.round(inside / mass[-1], 3), cut))[0])


def cut(image: Image.Image, framing: Framing) -> Image.Image:
    """Resize and cut `image`, the whole picture at any scale, as `framing` says."""
    height, width = framing.target_size
    if framing.crop_top_left == (0, 0) and (image.height, image.width) == framing.target_size:
        return image
    return image.resize(
        (width, height), Image.Resampling.LANCZOS, box=crop_box(image, framing), reducing_gap=3.0
    )


def crop_box(image: Image.Image, framing: Framing) -> Box:
    """(left, top, right, bottom) of the crop in the pixels of `image`, the whole picture at any scale."""
    height, width = framing.target_size
    scale = max(height / framing.original_size[0], width / framing.original_size[1])
    covered = [
        max(goal, round(length * scale))
        for goal, length in zip(framing.target_size, framing.original_size, strict=True)
    ]
    down, across = image.height / covered[0], image.width / covered[1]
    top, left = framing.crop_top_left
    return (left * across, top * down, (left + width) * across, (top + height) * down)
