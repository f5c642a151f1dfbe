"""The stages between raw pictures and a dataset folder, each over the whole set: what matters, framing, enlarging, captions.

Knows files of pictures and in which order models are needed; does not know inputs' names on the outside, nor training.
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset_and_utils import TokenMap
from sdxl.advice import Facts, fingerprint, sharpness, thumbnail
from sdxl.captioning import caption_tables, captioner, names_in, tokens_in
from sdxl.config import check_caption_text
from sdxl.dataset_folder import Source, read_framings
from sdxl.errors import DatasetError, DownloadError, UserInputError, WeightsError
from sdxl.framing import Framing, Salience, buckets, crop_box, cut, nearest_bucket, place_crop, read_image
from sdxl.masking import face_salience, segmenter, split_prompts
from sdxl.upscaling import upscaler

log = logging.getLogger(__name__)

_LOOK = (800, 800)
"""Size that pictures are decoded to at least, where a model only looks at them."""
_BLACK = 2
"""Brightest value, of 255, of a mask that shows nothing."""
_PNG_LEVEL = 3
"""Compression of what is written: twice as fast as the default 6 for a few percent more bytes."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Settings of the preprocessing stage."""

    target_size: int
    """Side of the square pictures that come out, in pixels; a multiple of 8."""
    bucketing: bool = False
    """Cut to the nearest of `buckets(target_size)` instead of to the square."""
    global_caption: str | None = None
    """Caption of all pictures, where the archive brings none."""
    caption_prefix: str = "a photo of TOK, "
    """How the captioner's captions begin, where there is neither a caption in the archive nor a global one."""
    token_map: TokenMap | None = None
    """When given, every caption must name one of its tokens."""
    mask_target_prompts: str | None = None
    """What matters, in words, several parted by commas; the rest is masked."""
    use_face_detection_instead: bool = False
    """Mask all but faces, whatever `mask_target_prompts` says."""
    mask_temperature: float = 1.0
    """How soft masks' edges are, above 0."""
    crop_based_on_salience: bool = True
    """Cut around what the masks show instead of around the centre; faces that were looked for are kept whole anyway."""

    def __post_init__(self) -> None:
        if self.target_size < 64 or self.target_size > 2048 or self.target_size % 8:
            raise UserInputError(
                f"A picture size of {self.target_size} does not work: give a multiple of 8 from 64 to 2048, such as 1024."
            )
        if not 0 < self.mask_temperature < 1e6:
            raise UserInputError(
                f"The temperature of masks is {self.mask_temperature}, but must be above 0, such as 1.0."
            )
        split_prompts(self.mask_target_prompts)
        check_caption_text(self.caption_prefix)
        check_caption_text(self.global_caption or "")
        twice = [
            token for token in tokens_in(self.caption_prefix) if names_in(self.caption_prefix, token) > 1
        ]
        if twice:
            raise UserInputError(f'"{self.caption_prefix}" names {twice[0]} twice: captions name it once.')

    def as_json(self) -> dict[str, Any]:
        """All settings but the size and tokens, which are the training's too, ready for json."""
        settings = asdict(self)
        del settings["target_size"], settings["token_map"]
        return settings


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


# ---------------------------------------------------------------------------------------------------------------------
# What matters


def find_salience(files: Source, config: PreprocessConfig) -> dict[Path, tuple[Salience | None, list[float]]]:
    """For each picture without a mask of its own: where what matters is, and its faces' heights in shares of the picture.

    Empty where neither faces nor things are asked for. A picture on which nothing is found gets None: it will have a
    full mask, and the log names it.

    Raises:
        DownloadError, WeightsError: things are asked for, but the segmenter cannot be had.
    """
    images = [image for image in files.images if image not in files.masks]
    prompts = split_prompts(config.mask_target_prompts)
    if not images or not (prompts or config.use_face_detection_instead):
        return {}
    found: dict[Path, tuple[Salience | None, list[float]]] = {}
    if config.use_face_detection_instead:
        for image in tqdm(images, desc="Looking for faces", unit="picture"):
            picture, _ = read_image(image, at_least=_LOOK)
            salience, heights = face_salience(picture, config.mask_temperature)
            found[image] = (salience, [height / picture.height for height in heights])
    else:
        with segmenter() as model:
            for image in tqdm(images, desc=f"Looking for {', '.join(prompts)}", unit="picture"):
                mask = model.mask(read_image(image, at_least=_LOOK)[0], prompts, config.mask_temperature)
                found[image] = (None if mask is None else Salience(mask=mask), [])
    without = [image.name for image in images if found[image][0] is None]
    if without:
        what = "No face" if config.use_face_detection_instead else f"Nothing like {' or '.join(prompts)}"
        log.warning("%s was found in %s: of these the whole picture counts.", what, ", ".join(without))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Framing


def frame_all(
    files: Source,
    salience: Mapping[Path, tuple[Salience | None, list[float]]],
    folder: Path,
    config: PreprocessConfig,
) -> list[Prepared]:
    """Write every picture, and its mask if there are masks, at its size into `folder`."""
    framings = {}
    for table in caption_tables(files.others)[:1]:
        framings = read_framings(table)

    def frame(numbered: tuple[int, Path]) -> Prepared:
        index, image = numbered
        earlier = framings.get(image.name) if image.name.endswith(".src.png") else None
        found, heights = salience.get(image, (None, []))
        stem = folder / str(index)
        name = str(image.relative_to(files.root))
        mask = files.masks.get(image)
        return _frame(image, name, mask, earlier, image in salience, found, heights, stem, config)

    pool = ThreadPoolExecutor(
        max_workers=min(8, os.cpu_count() or 1)
    )  # Pillow lets others run while it computes
    try:
        results = pool.map(frame, enumerate(files.images))
        return list(tqdm(results, total=len(files.images), desc="Preparing pictures", unit="picture"))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or a cancel no further picture is begun


def _frame(
    image: Path,
    name: str,
    mask: Path | None,
    earlier: tuple[int, ...] | None,
    masked: bool,
    salience: Salience | None,
    face_heights: list[float],
    stem: Path,
    config: PreprocessConfig,
) -> Prepared:
    side = config.target_size
    largest = max(max(bucket) for bucket in buckets(side)) if config.bucketing else side
    picture, size = read_image(image, at_least=(largest, largest))
    src, mask_file = stem.with_name(f"{stem.name}.src.png"), stem.with_name(f"{stem.name}.mask.png")
    grey = None
    if mask is not None:
        drawn, mask_size = read_image(mask, ground="black")
        if mask_size != size:
            raise DatasetError(
                f"{mask.name} is {mask_size[1]}×{mask_size[0]}, but {image.name} is {size[1]}×{size[0]}: "
                "give both one size."
            )
        grey = drawn.convert("L")
        if (brightest := grey.getextrema()[1]) <= _BLACK:  # type: ignore[operator]
            raise DatasetError(
                f"{mask.name} is black (its brightest value is {brightest} of 255): paint white what counts in {name}."
            )
        salience = Salience(
            mask=np.asarray(grey.reduce(max(1, min(grey.size) // 256)), dtype=np.float32) / 255
        )

    if earlier is not None and size in [(side, side), *buckets(side)]:
        framing = Framing(original_size=earlier[:2], crop_top_left=earlier[2:], target_size=size)  # type: ignore[arg-type]
        done = Framing(original_size=size, crop_top_left=(0, 0), target_size=size)
        shutil.copyfile(image, src)
        if mask is not None and mask.suffix == ".png":
            shutil.copyfile(mask, mask_file)
        elif grey is not None or masked:
            _cut_mask(grey or _drawn(salience), done).save(mask_file, compress_level=_PNG_LEVEL)
        return _prepared(src, image, name, picture, done, framing, face_heights)

    target = nearest_bucket(size, side) if config.bucketing else (side, side)
    centred = salience is None or not (config.crop_based_on_salience or salience.keep)
    here = place_crop(size, target, None if centred else salience)
    if grey is None and masked:
        grey = _drawn(salience)
    if grey is not None:
        shown = _cut_mask(grey, here)
        if shown.getextrema()[1] <= _BLACK:  # type: ignore[operator]
            log.warning("Of what matters in %s nothing is in its middle: it is cut around that.", name)
            here = place_crop(size, target, salience)
            shown = _cut_mask(grey, here)
        shown.save(mask_file, compress_level=_PNG_LEVEL)
    framed = cut(picture, here)
    framed.save(src, compress_level=_PNG_LEVEL)
    whole = here if earlier is None else _after(earlier, here)
    return _prepared(src, image, name, framed, here, whole, face_heights)


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


def _prepared(
    src: Path,
    image: Path,
    name: str,
    framed: Image.Image,
    here: Framing,
    whole: Framing,
    face_heights: list[float],
) -> Prepared:
    """Measure the framed picture, called `name` in what is said of it."""
    height, width = whole.original_size
    scale = _enlarged(whole)
    goal_height, goal_width = whole.target_size
    grey = framed.convert("L")
    grey.thumbnail((512, 512), Image.Resampling.BOX)
    values = np.asarray(grey, dtype=np.float32) / 255
    facts = Facts(
        name=name,
        height=height,
        width=width,
        enlarged=scale,
        cut_off=max(0.0, 1 - goal_height * goal_width / (height * width * scale**2)),
        brightness=float(values.mean()),
        sharpness=sharpness(values),
        fingerprint=fingerprint(framed),
        thumbnail=thumbnail(framed),
        face_heights=face_heights,
    )
    return Prepared(file_name=src.name, source=image, cut=here, framing=whole, facts=facts)


def _enlarged(framing: Framing) -> float:
    return max(goal / length for goal, length in zip(framing.target_size, framing.original_size, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Models that draw and write


def upscale_small(pictures: Sequence[Prepared], folder: Path) -> None:
    """Draw again, by the upscaler, the pictures whose crops had to be enlarged; then Lanczos brings them to size.

    Without the upscaler they stay as Lanczos made them, and the log says so.
    """
    small = [picture for picture in pictures if _enlarged(picture.cut) > 1]
    if not small:
        return
    try:
        with upscaler() as model:
            for picture in tqdm(small, desc="Enlarging small pictures", unit="picture"):
                whole, here = read_image(picture.source)[0], picture.cut
                left, top, right, bottom = crop_box(whole, here)
                outer = (int(left), int(top), -int(-right // 1), -int(-bottom // 1))
                outer = (*outer[:2], min(outer[2], whole.width), min(outer[3], whole.height))
                larger = model.enlarge(whole.crop(outer))
                inner = tuple(
                    (edge - start) * model.scale
                    for edge, start in zip((left, top, right, bottom), outer[:2] * 2, strict=True)
                )
                height, width = here.target_size
                final = larger.resize((width, height), Image.Resampling.LANCZOS, box=inner)  # type: ignore[arg-type]
                final.save(folder / picture.file_name, compress_level=_PNG_LEVEL)
    except (DownloadError, WeightsError) as error:
        log.warning("%d small pictures are enlarged by plain interpolation. %s", len(small), error)


def write_missing_captions(
    pictures: Sequence[Prepared], given: Mapping[Path, str] | None, folder: Path, config: PreprocessConfig
) -> list[str]:
    """The pictures' captions: as given, else by the captioner from the finished pictures, else the prefix alone.

    Without the captioner all get the prefix, and the log says so.
    """
    if given is not None:
        return [given[picture.source] for picture in pictures]
    prefix = config.caption_prefix.strip()
    texts = []
    try:
        with captioner() as model:
            for picture in tqdm(pictures, desc="Writing captions", unit="picture"):
                with Image.open(folder / picture.file_name) as opened:
                    texts.append(model.caption(opened, prefix))
        log.info("Captions were written by a model: look them through.")
    except (DownloadError, WeightsError) as error:
        texts = [prefix.strip(" ,")] * len(pictures)
        log.warning('All pictures get the caption "%s". %s', texts[0], error)
    return texts
