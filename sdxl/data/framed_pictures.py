"""Resize and crop every picture and its mask, and write them into the dataset folder.

Knows files of pictures and masks; does not know captions or models.
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
from sdxl.data.config import PreprocessConfig
from sdxl.data.dataset_folder import (
    FramingNumbers,
    mask_file,
    picture_file,
)
from sdxl.data.framing import (
    Framing,
    Salience,
    Size,
    buckets,
    crop_box,
    cut,
    nearest_bucket,
    place_crop,
)
from sdxl.data.large_pictures import keep_large, most_detail, pixels_of_large, write_large
from sdxl.data.mask_reader import mostly_grey, read_mask
from sdxl.data.picture_reader import MAX_PIXELS, is_plain_png, on_white, read_header, read_layered
from sdxl.data.pixel_budget import PixelBudget
from sdxl.data.source_folder import Source
from sdxl.errors import DatasetError

log = logging.getLogger(__name__)

PNG_LEVEL = 3
"""Compression of the written files: twice as fast as the default 6, for a few percent more bytes."""
OPEN_PIXELS = MAX_PIXELS
"""Pixels of pictures and masks that are decoded at once, whatever the number of threads: some gigabytes at worst."""
SMALLEST_SIDE = 8
"""Pixels. A smaller picture shows nothing: it is less than one pixel of SDXL's latents."""
_BLACK, _WHITE = 2, 224
"""A mask without any value above the first, of 255, is black. One with a value from the second on has a white area."""


@dataclass(frozen=True, kw_only=True)
class FramedPicture:
    """A picture in the dataset folder, and where it came from."""

    file: Path
    """`N.src.png`."""
    source: Path
    """The file it was made from."""
    crop: Framing
    """How `source` was resized and cropped."""
    framing: Framing
    """How the original was. Differs from `crop` if `source` itself came from a dataset folder."""
    facts: Facts


@dataclass(frozen=True, kw_only=True)
class _SourcePicture:
    """What is known of a picture before it is opened."""

    file: Path
    name: str
    """Its path in the archive, for messages."""
    mask: Path | None
    """The mask file that came with it."""
    mask_name: str
    """The mask's path in the archive, for messages; empty if there is none."""
    earlier: FramingNumbers | None
    """The framing columns of captions.csv, if the picture came from a dataset folder."""
    searched: bool
    """Whether a model searched for what matters. If it found nothing, the mask shows the whole picture."""
    salience: Salience | None
    """What the model found."""


def frame_all(
    files: Source,
    salience: Mapping[Path, Salience | None],
    earlier: Mapping[Path, FramingNumbers],
    folder: Path,
    config: PreprocessConfig,
) -> list[FramedPicture]:
    """Write every picture, and its mask if it has one, into `folder`.

    salience: the pictures that a model searched → what it found.
    earlier: the pictures that come from a dataset folder → the numbers of their framing.

    Raises:
        DatasetError: a picture or mask cannot be read, a picture is tiny or very long, or a mask is black or differs in
            size from its picture.
    """
    budget = PixelBudget(OPEN_PIXELS)

    def frame(numbered: tuple[int, Path]) -> FramedPicture:
        index, image = numbered
        mask = files.masks.get(image)
        picture = _SourcePicture(
            file=image,
            name=files.relative(image),
            mask=mask,
            mask_name="" if mask is None else files.relative(mask),
            earlier=earlier.get(image),
            searched=image in salience,
            salience=salience.get(image),
        )
        with budget.taken(_pixels_to_decode(picture, config)):
            return _frame(picture, picture_file(folder, index), config)

    # Threads suffice: Pillow releases the GIL while it decodes and resizes.
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        results = pool.map(frame, enumerate(files.images))
        return list(tqdm(results, total=len(files.images), desc="Preparing pictures", unit="picture"))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, do not start any further picture


def _needed(config: PreprocessConfig) -> Size:
    """The (height, width) that every crop and its large copy come from; larger JPEGs are decoded at a fraction of their size."""
    longest = config.target_size
    if config.bucketing:
        longest = max(max(size) for size in buckets(config.target_size))
    return most_detail((longest, longest))


def _pixels_to_decode(source: _SourcePicture, config: PreprocessConfig) -> int:
    """How many pixels `_frame` decodes. The log says so if a file holds more than is used of it."""
    headers = [(source.name, read_header(source.file, at_least=_needed(config), name=source.name))]
    if source.mask is not None:
        headers.append((source.mask_name, read_header(source.mask, name=source.mask_name)))
    for name, header in headers:
        if told := header.told(name):
            log.warning("%s", told)
    return sum(header.pixels for _, header in headers) + pixels_of_large(source.file)


def _frame(source: _SourcePicture, target: Path, config: PreprocessConfig) -> FramedPicture:
    """Resize and crop one picture and its mask, and write both."""
    side = config.target_size
    layered, size = read_layered(source.file, at_least=_needed(config), name=source.name)
    image = on_white(layered)
    if min(size) < SMALLEST_SIDE:
        raise DatasetError(
            f"{source.name} is {size[1]}×{size[0]} pixels, which shows nothing: leave it out, or use a larger original."
        )

    # A mask that came with the picture takes precedence over what a model found.
    mask, salience = None, source.salience
    if source.mask is not None:
        mask = _read_own_mask(source, size)
        small = mask.reduce(max(1, min(mask.size) // 256))
        salience = Salience(mask=np.asarray(small, dtype=np.float32) / 255)
    elif source.searched:
        mask = _drawn(salience)

    # A picture of a dataset folder that already has a wanted size stays as it is.
    earlier = None
    if source.earlier is not None:
        height, width, top, left = source.earlier
        earlier = Framing(original_size=(height, width), crop_top_left=(top, left), target_size=size)
        if size in [(side, side), *buckets(side)]:
            return _copy(source, target, image, mask, earlier)

    target_size = nearest_bucket(size, side) if config.bucketing else (side, side)
    # Detected faces are kept whole even if the crop is otherwise centred.
    follows = salience is not None and (config.crop_based_on_salience or salience.keep)
    crop = place_crop(size, target_size, salience if follows else None)
    if mask is not None:
        cropped_mask = _crop_mask(mask, crop)
        if _brightest(cropped_mask) <= _BLACK:
            log.warning("The centre of %s shows nothing of its mask: cropped around the mask.", source.name)
            crop = place_crop(size, target_size, salience)
            cropped_mask = _crop_mask(mask, crop)
        cropped_mask.save(mask_file(target), compress_level=PNG_LEVEL)
    framed = cut(image, crop)
    framed.save(target, compress_level=PNG_LEVEL)

    framing = earlier.followed_by(crop) if earlier is not None else crop
    write_large(image, crop, framing, target)
    facts = _measure(framed, framing, source, transparent=_transparent(layered))
    return FramedPicture(file=target, source=source.file, crop=crop, framing=framing, facts=facts)


def _copy(
    source: _SourcePicture, target: Path, image: Image.Image, mask: Image.Image | None, framing: Framing
) -> FramedPicture:
    """Keep a picture of a dataset folder, and its mask, at their size: byte by byte if plain decoders read them right."""
    size = framing.target_size
    unchanged = Framing(original_size=size, crop_top_left=(0, 0), target_size=size)
    if is_plain_png(source.file):
        shutil.copyfile(source.file, target)
    else:
        cut(image, unchanged).save(target, compress_level=PNG_LEVEL)
    if source.mask is not None and mask is not None and _is_grey_png(source.mask, mask):
        shutil.copyfile(source.mask, mask_file(target))
    elif mask is not None:
        _crop_mask(mask, unchanged).save(mask_file(target), compress_level=PNG_LEVEL)
    keep_large(source.file, source.name, image, target)
    facts = _measure(image, framing, source)
    return FramedPicture(file=target, source=source.file, crop=unchanged, framing=framing, facts=facts)


def _is_grey_png(file: Path, mask: Image.Image) -> bool:
    """Whether a mask's file holds just the grey values of `mask`, as a mask of a dataset folder does."""
    if not is_plain_png(file):
        return False
    with Image.open(file) as opened:
        return opened.mode == "L" and opened.tobytes() == mask.tobytes()


def _read_own_mask(source: _SourcePicture, size: Size) -> Image.Image:
    """The mask, in grey, that came with a picture of `size`."""
    assert source.mask is not None
    mask, mask_size = read_mask(source.mask, name=source.mask_name)
    if mask_size != size:
        remedy = "turn the mask like its picture" if mask_size == size[::-1] else "give both the same size"
        raise DatasetError(
            f"{source.mask_name} is {mask_size[1]}×{mask_size[0]}, but {source.name} is {size[1]}×{size[0]}: "
            f"{remedy}."
        )
    if (brightest := _brightest(mask)) <= _BLACK:
        raise DatasetError(
            f"{source.mask_name} is black (its brightest value is {brightest} of 255): "
            f"paint white what matters in {source.name}."
        )
    if source.earlier is None:  # masks of a dataset folder may be soft, and cropped
        if brightest < _WHITE:
            log.warning(
                "%s has a brightest value of %d of 255: paint white what counts fully.",
                source.mask_name,
                brightest,
            )
        elif mostly_grey(np.asarray(mask)):
            log.warning(
                "%s is mostly neither black nor white: paint white what matters and all else black.",
                source.mask_name,
            )
    return mask


def _drawn(salience: Salience | None) -> Image.Image:
    """Salience as a grey mask; white if there is none."""
    values = np.ones((8, 8), np.float32) if salience is None else salience.mask
    return Image.fromarray((values * 255).round().astype(np.uint8))


def _crop_mask(mask: Image.Image, framing: Framing) -> Image.Image:
    """Resize and crop `mask`, a mask of the whole picture at any scale. Bilinear, because Lanczos overshoots."""
    height, width = framing.target_size
    if (mask.height, mask.width) == framing.target_size and framing.crop_top_left == (0, 0):
        return mask
    return mask.resize((width, height), Image.Resampling.BILINEAR, box=crop_box(mask, framing))


def _brightest(mask: Image.Image) -> int:
    """The largest grey value of a mask, 0 to 255."""
    return mask.getextrema()[1]  # type: ignore[return-value]


def _transparent(layered: Image.Image) -> float:
    """The share of a picture that is more transparent than not, 0 to 1."""
    return float((np.asarray(layered.getchannel("A")) < 128).mean()) if layered.mode == "RGBA" else 0.0


def _has_two_tones(grey: np.ndarray) -> bool:
    """Whether a picture of 0 to 1 is black and white with hardly anything between, like a mask."""
    black, white = float((grey < 0.04).mean()), float((grey > 0.96).mean())
    return min(black, white) > 0.01 and black + white > 0.97


def _measure(
    framed: Image.Image, framing: Framing, source: _SourcePicture, *, transparent: float = 0.0
) -> Facts:
    """The facts that advice is based on."""
    height, width = framing.original_size
    grey = framed.convert("L")
    grey.thumbnail((512, 512), Image.Resampling.BOX)
    values = np.asarray(grey, dtype=np.float32) / 255
    return Facts(
        name=source.name,
        height=height,
        width=width,
        enlarged=framing.scale,
        cut_off=framing.cut_off,
        brightness=float(values.mean()),
        sharpness=sharpness(values),
        fingerprint=fingerprint(framed),
        thumbnail=thumbnail(framed),
        transparent=transparent,
        two_tones=source.mask is None and _has_two_tones(values),
        face_heights=() if source.salience is None else source.salience.face_heights,
    )
