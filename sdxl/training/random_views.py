"""The views of a picture that a training learns: the whole, random crops of it, and both mirrored.

Knows pixels and SDXL's size conditioning; does not know captions, models or how views are encoded.

SDXL is conditioned on the original size of a picture and on where it was cropped (arXiv:2307.01952, section 2.2). So a
crop can be learned as a crop: the fine-tune sees the subject at other sizes and places, but does not learn to draw it
cut off.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageOps

from sdxl.data.dataset_folder import PreparedPicture
from sdxl.data.framing import Size

LARGEST_ZOOM = 1.3
"""Views are cropped from the picture enlarged by at most this factor."""


@dataclass(frozen=True, kw_only=True)
class View:
    """Pixels to learn, with their size conditioning."""

    picture: Image.Image
    mask: Image.Image | None
    original_size: Size
    """(height, width) of the original file in pixels."""
    crop_top_left: tuple[float, float]
    """(top, left) of this view in the enlarged original, in pixels of `picture`."""
    enlarged_width: float
    """Width of the whole enlarged original, in pixels of `picture`."""

    @property
    def time_ids(self) -> list[float]:
        """SDXL's size conditioning: original height and width, crop top and left, target height and width."""
        return [*self.original_size, *self.crop_top_left, self.picture.height, self.picture.width]


def views_of(prepared: PreparedPicture, rng: np.random.Generator, *, crops: int, flip: bool) -> list[View]:
    """All views of a prepared picture, of one size: the whole picture, `crops` random crops, and with `flip` all of
    these mirrored."""
    whole = _whole(prepared)
    views = [whole, *(_crop(whole, *shares) for shares in _spread_out(crops, rng))]
    return views + [_mirrored(view) for view in views] if flip else views


def _whole(prepared: PreparedPicture) -> View:
    with Image.open(prepared.picture) as opened:
        picture = opened.convert("RGB")
    mask = None
    if prepared.mask is not None:
        with Image.open(prepared.mask) as opened:
            mask = opened.convert("L")
    height, width = prepared.framing.original_size
    # Preparing scales the original until it just covers the picture, then crops what is left over on one side.
    scale = max(picture.height / height, picture.width / width)
    return View(
        picture=picture,
        mask=mask,
        original_size=(height, width),
        crop_top_left=prepared.framing.crop_top_left,
        enlarged_width=width * scale,
    )


def _spread_out(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random points [count, 3] in 0..1, spread evenly: each coordinate falls once into each `count`-th of the range.

    So even a few views show all zooms and places. Source: McKay, Beckman, Conover, Latin hypercube sampling
    (Technometrics, 1979).
    """
    order = rng.permuted(np.tile(np.arange(count), (3, 1)), axis=1).T
    return (order + rng.random((count, 3))) / max(count, 1)


def _crop(whole: View, zoom_share: float, left_share: float, top_share: float) -> View:
    """Enlarge `whole` and crop it to its own size again.

    The shares, 0 to 1, choose the zoom from 1 to `LARGEST_ZOOM`, and the place in the room that the zoom gives.
    """
    width, height = whole.picture.size
    zoom = 1 + (LARGEST_ZOOM - 1) * zoom_share
    left, top = left_share * (zoom - 1) * width, top_share * (zoom - 1) * height
    box = (left / zoom, top / zoom, (left + width) / zoom, (top + height) / zoom)

    def crop(image: Image.Image) -> Image.Image:
        return image.resize((width, height), Image.Resampling.LANCZOS, box=box)

    whole_top, whole_left = whole.crop_top_left
    return replace(
        whole,
        picture=crop(whole.picture),
        mask=crop(whole.mask) if whole.mask else None,
        crop_top_left=(whole_top * zoom + top, whole_left * zoom + left),
        enlarged_width=whole.enlarged_width * zoom,
    )


def _mirrored(view: View) -> View:
    """`view` mirrored, as a crop of the mirrored original."""
    top, left = view.crop_top_left
    from_right = max(view.enlarged_width - left - view.picture.width, 0)
    return replace(
        view,
        picture=ImageOps.mirror(view.picture),
        mask=ImageOps.mirror(view.mask) if view.mask else None,
        crop_top_left=(top, from_right),
    )
