"""Pictures at their size: each is cut and resized, its mask with it, measured, and written into the dataset folder.

Knows files of pictures and masks; does not know captions, models or settings' names.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from sdxl.data.advice import Facts, fingerprint, sharpness, thumbnail
from sdxl.data.captioning import caption_tables
from sdxl.data.dataset_folder import Source, read_framings
from sdxl.data.framing import (
    Framing,
    Salience,
    Size,
    buckets,
    crop_box,
    cut,
    nearest_bucket,
    place_crop,
    read_image,
)
from sdxl.errors import DatasetError

log = logging.getLogger(__name__)

PNG_LEVEL = 3
"""Compression of what is written: twice as fast as the default 6 for a few percent more bytes."""
_BLACK = 2
"""Brightest value, of 255, of a mask that shows nothing."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One picture of the dataset folder, and where it came from."""

    file_name: str
    """`N.src.png`."""
    source: Path
    cut: Framing
    """What was done to the file."""
    framing: Framing
    """What was ever done to the picture: that of `cut`, unless the file was a prepared one already."""
    facts: Facts


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What is known of a picture before it is opened."""

    image: Path
    name: str
    """What it is called in what is said of it."""
    mask: Path | None
    """The mask that it brings."""
    earlier: tuple[int, ...] | None
    """The numbers of a prepared picture: original height and width, crop top and left."""
    looked_for: bool
    """Whether what matters was looked for, so that it gets a mask."""
    salience: Salience | None
    """What was found."""
    face_heights: list[float]
    """In shares of the picture."""


def frame_all(
    files: Source,
    salience: Mapping[Path, tuple[Salience | None, list[float]]],
    folder: Path,
    *,
    side: int,
    bucketing: bool,
    around_salience: bool,
) -> list[Prepared]:
    """Write every picture, and its mask if there are masks, at its size into `folder`.

    salience: of pictures where what matters was looked for: what was found, and faces' heights.
    side: of the square that pictures are cut to; with `bucketing` they are cut to the nearest of `buckets(side)`.
    around_salience: cut around what matters, not around the centre; faces are kept whole anyway.

    Raises:
        DatasetError: a picture or mask cannot be read, a mask is black or of another size than its picture.
    """
    framings = {}
    for table in caption_tables(files.others)[:1]:
        framings = read_framings(table)

    def frame(numbered: tuple[int, Path]) -> Prepared:
        index, image = numbered
        found, heights = salience.get(image, (None, []))
        known = _Known(
            image=image,
            name=str(image.relative_to(files.root)),
            mask=files.masks.get(image),
            earlier=framings.get(image.name) if image.name.endswith(".src.png") else None,
            looked_for=image in salience,
            salience=found,
            face_heights=heights,
        )
        return _frame(known, folder / f"{index}.src.png", side, bucketing, around_salience)

    pool = ThreadPoolExecutor(
        max_workers=min(8, os.cpu_count() or 1)
    )  # Pillow lets others run while it computes
    try:
        results = pool.map(frame, enumerate(files.images))
        return list(tqdm(results, total=len(files.images), desc="Preparing pictures", unit="picture"))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or a cancel no further picture is begun


def _frame(known: _Known, src: Path, side: int, bucketing: bool, around_salience: bool) -> Prepared:
    largest = max(max(bucket) for bucket in buckets(side)) if bucketing else side
    picture, size = read_image(known.image, at_least=(largest, largest))
    grey, salience = _own_mask(known, size), known.salience
    if grey is not None:
        small = grey.reduce(max(1, min(grey.size) // 256))
        salience = Salience(mask=np.asarray(small, dtype=np.float32) / 255)
    elif known.looked_for:
        grey = _drawn(salience)
    if known.earlier is not None and size in [(side, side), *buckets(side)]:
        return _as_it_is(known, src, picture, grey, size)

    target = nearest_bucket(size, side) if bucketing else (side, side)
    centred = salience is None or not (around_salience or salience.keep)
    here = place_crop(size, target, None if centred else salience)
    if grey is not None:
        shown = _cut_mask(grey, here)
        if shown.getextrema()[1] <= _BLACK:  # type: ignore[operator]
            log.warning("Of what matters in %s nothing is in its middle: it is cut around that.", known.name)
            here = place_crop(size, target, salience)
            shown = _cut_mask(grey, here)
        shown.save(_mask_of(src), compress_level=PNG_LEVEL)
    framed = cut(picture, here)
    framed.save(src, compress_level=PNG_LEVEL)
    whole = here if known.earlier is None else _after(known.earlier, here)
    return _prepared(src, known, framed, here, whole)


def _as_it_is(
    known: _Known, src: Path, picture: Image.Image, grey: Image.Image | None, size: Size
) -> Prepared:
    """A prepared picture of a size that fits is copied byte by byte, and so is its mask."""
    assert known.earlier is not None
    height, width, top, left = known.earlier
    framing = Framing(original_size=(height, width), crop_top_left=(top, left), target_size=size)
    done = Framing(original_size=size, crop_top_left=(0, 0), target_size=size)
    shutil.copyfile(known.image, src)
    if known.mask is not None and known.mask.suffix == ".png":
        shutil.copyfile(known.mask, _mask_of(src))
    elif grey is not None:
        _cut_mask(grey, done).save(_mask_of(src), compress_level=PNG_LEVEL)
    return _prepared(src, known, picture, done, framing)


def _mask_of(src: Path) -> Path:
    return src.with_name(src.name.replace(".src.png", ".mask.png"))


def _own_mask(known: _Known, size: Size) -> Image.Image | None:
    """The mask that a picture of `size` brings, in grey."""
    if known.mask is None:
        return None
    drawn, mask_size = read_image(known.mask, ground="black")
    if mask_size != size:
        raise DatasetError(
            f"{known.mask.name} is {mask_size[1]}×{mask_size[0]}, but {known.image.name} is {size[1]}×{size[0]}: "
            "give both one size."
        )
    grey = drawn.convert("L")
    if (brightest := grey.getextrema()[1]) <= _BLACK:  # type: ignore[operator]
        raise DatasetError(
            f"{known.mask.name} is black (its brightest value is {brightest} of 255): "
            f"paint white what counts in {known.name}."
        )
    return grey


def _drawn(salience: Salience | None) -> Image.Image:
    """The mask that salience is, in grey; all of the picture for none."""
    values = np.ones((8, 8), np.float32) if salience is None else salience.mask
    return Image.fromarray((values * 255).round().astype(np.uint8))


def _cut_mask(grey: Image.Image, framing: Framing) -> Image.Image:
    """The mask of the crop, cut from the mask of the whole picture at any scale; without Lanczos' overshoot."""
    height, width = framing.target_size
    if (grey.width, grey.height) == (width, height) and framing.crop_top_left == (0, 0):
        return grey
    return grey.resize((width, height), Image.Resampling.BILINEAR, box=crop_box(grey, framing))


def _after(earlier: tuple[int, ...], here: Framing) -> Framing:
    """The framing of an original that was framed with the numbers `earlier` and then again as `here` says."""
    scale = max(goal / length for goal, length in zip(here.target_size, here.original_size, strict=True))
    top, left = (
        round(before * scale) + now for before, now in zip(earlier[2:], here.crop_top_left, strict=True)
    )
    return Framing(
        original_size=(earlier[0], earlier[1]), crop_top_left=(top, left), target_size=here.target_size
    )


def _prepared(src: Path, known: _Known, framed: Image.Image, here: Framing, whole: Framing) -> Prepared:
    """Measure the framed picture."""
    height, width = whole.original_size
    scale = enlarged(whole)
    goal_height, goal_width = whole.target_size
    grey = framed.convert("L")
    grey.thumbnail((512, 512), Image.Resampling.BOX)
    values = np.asarray(grey, dtype=np.float32) / 255
    facts = Facts(
        name=known.name,
        height=height,
        width=width,
        enlarged=scale,
        cut_off=max(0.0, 1 - goal_height * goal_width / (height * width * scale**2)),
        brightness=float(values.mean()),
        sharpness=sharpness(values),
        fingerprint=fingerprint(framed),
        thumbnail=thumbnail(framed),
        face_heights=known.face_heights,
    )
    return Prepared(file_name=src.name, source=known.image, cut=here, framing=whole, facts=facts)


def enlarged(framing: Framing) -> float:
    """How many times as large as before a picture is shown; below 1 where it was shrunk."""
    return max(goal / length for goal, length in zip(framing.target_size, framing.original_size, strict=True))
