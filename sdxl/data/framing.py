"""The geometry of crops: sizes, where to crop a picture, and how to resize and crop it.

Knows sizes, places and pixels; does not know files, captions or models. Sizes are (height, width).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

WIDEST = 2.0
"""Largest ratio of the sides of a bucket."""

Size = tuple[int, int]
"""(height, width) in pixels."""
ShareBox = tuple[float, float, float, float]
"""(left, top, right, bottom) as shares of a picture's width or height, 0 to 1."""
PixelBox = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels."""

_MARGIN = 0.01
"""Room around areas that a crop must not cut, as a share of the picture."""


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How a picture was resized and cropped: SDXL's size conditioning, in pixels.

    The picture is resized until it just covers the target size; then a window of the target size is cropped.
    Source: Podell et al., "SDXL" (arXiv:2307.01952), section 2.2.
    """

    original_size: Size
    """(height, width) of the original picture."""
    crop_top_left: tuple[int, int]
    """(top, left) of the crop in the resized picture."""
    target_size: Size
    """(height, width) of the result."""

    @property
    def time_ids(self) -> list[int]:
        """The six numbers in the order of SDXL's `time_ids`."""
        return [*self.original_size, *self.crop_top_left, *self.target_size]

    @property
    def scale(self) -> float:
        """By how much the picture was resized: above 1 it was enlarged, below 1 shrunk."""
        return covering_scale(self.original_size, self.target_size)

    @property
    def covered_size(self) -> Size:
        """(height, width) of the resized picture before the crop."""
        return covering_size(self.original_size, self.target_size)

    @property
    def cut_off(self) -> float:
        """Share of the picture outside the crop, 0 to 1."""
        (height, width), (target_height, target_width) = self.original_size, self.target_size
        return max(0.0, 1 - target_height * target_width / (height * width * self.scale**2))

    def followed_by(self, later: "Framing") -> "Framing":
        """The framing of the original after its result was framed again by `later`."""
        top, left = (
            round(first * later.scale) + second
            for first, second in zip(self.crop_top_left, later.crop_top_left, strict=True)
        )
        return Framing(
            original_size=self.original_size, crop_top_left=(top, left), target_size=later.target_size
        )


@dataclass(frozen=True, kw_only=True)
class Salience:
    """What matters in a picture, and where."""

    mask: np.ndarray
    """How much each place matters: float32 [h, w], 0 to 1, of any size."""
    keep: Sequence[ShareBox] = ()
    """Areas that the crop keeps whole if they fit, such as heads."""
    face_heights: Sequence[float] = ()
    """Heights of the detected faces, as shares of the picture's height."""


def covering_scale(size: Size, target: Size) -> float:
    """The scale at which a picture of `size` just covers `target`."""
    return max(target[0] / size[0], target[1] / size[1])


def covering_size(size: Size, target: Size) -> Size:
    """The (height, width) of a picture of `size` after it was resized to just cover `target`."""
    scale = covering_scale(size, target)
    return max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale))


def buckets(side: int) -> list[Size]:
    """The sizes (height, width) of about `side`² pixels that pictures are cropped to, from tall to square to wide.

    Sides are multiples of 64, or of 32 for a `side` below 512, which leaves enough buckets. The area is at most
    `side`², and the ratio of the sides at most `WIDEST`. If sizes differ in the longer side only, the longest is kept.

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
    """The bucket of `side` with the ratio nearest to that of a picture of `size`: its crop loses the least."""
    ratio = math.log(size[1] / size[0])
    return min(buckets(side), key=lambda bucket: abs(math.log(bucket[1] / bucket[0]) - ratio))


def place_crop(size: Size, target: Size, salience: Salience | None) -> Framing:
    """Where to crop a picture of `size` to `target`: in its centre, or around `salience`.

    With salience, the crop first keeps whole what fits: the boxes of `keep`, and the area where the mask is above 0.5.
    Then it holds as much of the mask as possible. Then the mask's centre of mass is as close to the middle as possible.
    """
    covered = covering_size(size, target)
    if salience is None or not salience.mask.any():
        top, left = ((length - window) // 2 for length, window in zip(covered, target, strict=True))
    else:
        top, left = (_best_start(salience, axis, covered[axis], target[axis]) for axis in (0, 1))
    return Framing(original_size=size, crop_top_left=(top, left), target_size=target)


def _best_start(salience: Salience, axis: int, length: int, window: int) -> int:
    """The best first pixel of a `window` along an axis (0 down, 1 across) of `length` pixels."""
    mask = salience.mask
    starts = np.arange(length - window + 1)

    # What must stay whole along this axis: (first, last) as shares of the length.
    spans = [(box[1 - axis], box[3 - axis]) for box in salience.keep]
    visible = np.flatnonzero((mask > 0.5).any(axis=1 - axis)) / mask.shape[axis]
    if len(visible):
        spans.append((visible[0], visible[-1] + 1 / mask.shape[axis]))

    # How many of these spans each start cuts. Spans longer than the window are cut anyway and do not count.
    spans_cut = np.zeros(len(starts))
    for low, high in spans:
        first, last = max(0.0, low - _MARGIN) * length, min(1.0, high + _MARGIN) * length
        if last - first > window:
            first, last = low * length, high * length
        if last - first <= window:
            spans_cut += (starts > first) | (starts + window < last)

    # How much of the mask each start shows, from the mask's running sum along the axis.
    mass = np.concatenate([[0], np.cumsum(mask.sum(axis=1 - axis, dtype=np.float64))])
    edges = np.linspace(0, length, len(mass))
    inside = np.interp(starts + window, edges, mass) - np.interp(starts, edges, mass)

    centre_of_mass = (np.diff(mass) * (edges[1:] + edges[:-1]) / 2).sum() / mass[-1]
    off_centre = np.abs(starts + window / 2 - centre_of_mass)
    # Shares are rounded so that a negligible gain of mask does not outweigh the centre.
    return int(np.lexsort((off_centre, -np.round(inside / mass[-1], 3), spans_cut))[0])


def cut(image: Image.Image, framing: Framing) -> Image.Image:
    """Resize and crop `image`, the whole picture at any scale, as `framing` says."""
    height, width = framing.target_size
    if framing.crop_top_left == (0, 0) and (image.height, image.width) == framing.target_size:
        return image
    return image.resize(
        (width, height), Image.Resampling.LANCZOS, box=crop_box(image, framing), reducing_gap=3.0
    )


def crop_box(image: Image.Image, framing: Framing) -> PixelBox:
    """The crop of `framing` in the pixels of `image`, the whole picture at any scale."""
    covered_height, covered_width = framing.covered_size
    down, across = image.height / covered_height, image.width / covered_width
    top, left = framing.crop_top_left
    height, width = framing.target_size
    return (left * across, top * down, (left + width) * across, (top + height) * down)
