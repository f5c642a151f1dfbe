"""The views of a picture that a training learns: the whole, random crops of it, and both mirrored.

Knows pixels and SDXL's size conditioning; does not know captions, models or how views are encoded.

SDXL is conditioned on the original size of a picture and on where it was cropped (arXiv:2307.01952, section 2.2). So a
crop can be learned as a crop: the fine-tune sees the subject at other sizes and places, but does not learn to draw it
cut off. Crops are cut from the picture's large copy, so that they are as sharp as the picture itself.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageOps

from sdxl.data.dataset_folder import PreparedPicture
from sdxl.data.framing import Size

LARGEST_ZOOM = 1.3
"""Crops show the subject at most this many times larger than the whole picture does. Where the original has fewer
pixels, its pixels are the limit."""
WHOLE_SHARE = 0.5
"""Share of the draws of a picture that show all of it, if it has crops. The whole picture is what prompts ask for, so it
must not be one of many."""


@dataclass(frozen=True, kw_only=True)
class View:
    """Pixels to learn, with their size conditioning."""

    share: float
    """How often this view is drawn: the shares of a picture's views add up to 1."""
    picture: Image.Image
    mask: Image.Image | None
    original_size: Size
    """(height, width) of the original file in pixels."""
    crop_top_left: tuple[float, float]
    """(top, left) of this view in the resized original, in pixels of `picture`."""
    resized_width: float
    """Width of the whole resized original, in pixels of `picture`."""

    @property
    def time_ids(self) -> list[float]:
        """SDXL's size conditioning: original height and width, crop top and left, target height and width."""
        return [*self.original_size, *self.crop_top_left, self.picture.height, self.picture.width]


def views_of(prepared: PreparedPicture, rng: np.random.Generator, *, crops: int, flip: bool) -> list[View]:
    """All views of a prepared picture, of one size: the whole picture, `crops` random crops if the original has the
    pixels for any, and with `flip` all of these mirrored."""
    whole = _whole(prepared)
    views = [whole]
    if crops and prepared.large is not None:
        with Image.open(prepared.large) as opened:
            large = opened.convert("RGB")
        share = (1 - WHOLE_SHARE) / crops
        cut = [_crop(whole, large, share, *place) for place in _spread_out(crops, rng)]
        views = [replace(whole, share=WHOLE_SHARE), *cut]
    if not flip:
        return views
    views = [replace(view, share=view.share / 2) for view in views]
    return views + [_mirrored(view) for view in views]


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
        share=1.0,
        picture=picture,
        mask=mask,
        original_size=(height, width),
        crop_top_left=prepared.framing.crop_top_left,
        resized_width=width * scale,
    )


def _spread_out(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random points [count, 3] in 0..1, spread evenly: each coordinate falls once into each `count`-th of the range.

    So even a few views show all zooms and places. Source: McKay, Beckman, Conover, Latin hypercube sampling
    (Technometrics, 1979).
    """
    order = rng.permuted(np.tile(np.arange(count), (3, 1)), axis=1).T
    return (order + rng.random((count, 3))) / max(count, 1)


def _crop(
    whole: View, large: Image.Image, share: float, zoom_place: float, left_place: float, top_place: float
) -> View:
    """A crop of `large`, which shows what `whole` shows, at the size of `whole`.

    The places, 0 to 1, choose the zoom from 1 to the largest for which `large` has the pixels, and where in the room
    that the zoom gives the crop lies.
    """
    width, height = whole.picture.size
    most = min(LARGEST_ZOOM, large.width / width, large.height / height)
    zoom = 1 + (most - 1) * zoom_place
    left, top = left_place * (zoom - 1) * width, top_place * (zoom - 1) * height

    def crop(image: Image.Image, how: Image.Resampling) -> Image.Image:
        across, down = image.width / width / zoom, image.height / height / zoom
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        return image.resize((width, height), how, box=box)

    whole_top, whole_left = whole.crop_top_left
    return replace(
        whole,
        share=share,
        picture=crop(large, Image.Resampling.LANCZOS),
        mask=crop(whole.mask, Image.Resampling.BILINEAR) if whole.mask else None,
        crop_top_left=(whole_top * zoom + top, whole_left * zoom + left),
        resized_width=whole.resized_width * zoom,
    )


def _mirrored(view: View) -> View:
    """`view` mirrored, as a crop of the mirrored original."""
    top, left = view.crop_top_left
    from_right = max(view.resized_width - left - view.picture.width, 0)
    return replace(
        view,
        picture=ImageOps.mirror(view.picture),
        mask=ImageOps.mirror(view.mask) if view.mask else None,
        crop_top_left=(top, from_right),
    )
