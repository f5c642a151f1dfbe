"""Read input pictures, and write drawn ones with the request in their metadata.

Knows file formats; does not know models.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdxl.data.mask_reader import HALF, mostly_grey, read_mask, read_with_hole
from sdxl.files.archives import atomic_path
from sdxl.files.fetching import fetch
from sdxl.serving.plan import REFINER_STRENGTH
from sdxl.serving.png_writer import write_png
from sdxl.serving.request import FORMATS, GenerationRequest
from sdxl.serving.samplers import SCHEDULERS

log = logging.getLogger(__name__)

MAX_PICTURE_BYTES = 100 << 20
"""Largest file of an input picture."""
_EXIF, _USER_COMMENT = 0x8769, 0x9286
_LONGEST_COMMENT = 60_000
"""Bytes; the whole EXIF of a jpg holds at most 65 thousand."""


def read_inputs(
    image: object | None, mask: object | None, folder: Path, *, inverted: bool = False
) -> tuple[Image.Image | None, Image.Image | None]:
    """The pictures of the inputs image and mask: RGB, and grey with 255 where it is repainted. None stays None.

    Each is a path, an http(s) URL or a `data:` URI. Without a mask, transparent areas of the image are its mask.

    folder: made for downloads, and removed afterwards.
    inverted: the mask is inverted later, so what it keeps is repainted.

    Raises:
        DownloadError: one cannot be fetched, or is larger than `MAX_PICTURE_BYTES`.
        UserInputError: there is no such file, it is no picture, or it is unclear what the mask masks.
    """
    picture = painted = None
    if image is not None:
        with _fetched(image, folder) as file:
            picture, painted = read_with_hole(file, name="image")
    if mask is not None:
        with _fetched(mask, folder) as file:
            painted, _ = read_mask(file, name="mask")
        _remark_on(painted, inverted=inverted)
    elif painted is not None:
        what = "all else is repainted" if inverted else "they are repainted"
        log.info("image has transparent areas and no mask is given: %s.", what)
    return picture, painted


@contextlib.contextmanager
def _fetched(source: object, folder: Path) -> Iterator[Path]:
    """The file of an input. What is downloaded is removed afterwards."""
    folder.mkdir()
    yield fetch(str(source), folder, max_bytes=MAX_PICTURE_BYTES)
    shutil.rmtree(folder)


def _remark_on(mask: Image.Image, *, inverted: bool) -> None:
    """Log what is probably not meant."""
    values = 255 - np.asarray(mask) if inverted else np.asarray(mask)
    if values.min() >= HALF:
        log.warning(
            "mask is completely %s: the whole picture is repainted.", "black" if inverted else "white"
        )
    elif mostly_grey(values):
        log.warning("mask is mostly neither black nor white: grey areas are redrawn in part.")


def describe(request: GenerationRequest, index: int, *, model: str) -> str:
    """The request of picture `index` as text in the form of AUTOMATIC1111's web UI, which many programs show.

    model: name of the base.
    """
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    facts = {
        "Steps": request.num_inference_steps,
        "Sampler": SCHEDULERS[request.scheduler].label,
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": request.seed_of(index),
        "Size": f"{request.width}x{request.height}",
        "Model": f'"{model}"' if any(mark in model for mark in ",:") else model,
    }
    if request.guidance_rescale:
        facts["CFG Rescale"] = f"{request.guidance_rescale:g}"
    if not request.prompt_weights:
        facts["Emphasis"] = "None"  # brackets are text
    if request.timestep_spacing != "base":
        facts["Timestep spacing"] = request.timestep_spacing
    if request.speed != "exact":
        facts["Speed"] = request.speed
    if request.image is not None:
        facts["Denoising strength"] = f"{request.prompt_strength:g}"
    if request.refine == "expert_ensemble_refiner":
        facts["Refiner switch at"] = f"{request.high_noise_frac:g}"
    elif request.refine == "base_image_refiner":
        facts["Refiner steps"] = request.refine_steps or request.num_inference_steps
        facts["Refiner strength"] = REFINER_STRENGTH
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items()))
    return "\n".join(lines)


def save(picture: Image.Image, path: Path, *, quality: int, parameters: str | None) -> None:
    """Write `picture` to `path` atomically; the path's suffix is a key of `FORMATS`.

    quality: 1 to 100; ignored for png.
    parameters: text to embed. As in AUTOMATIC1111's web UI, it goes into the text chunk `parameters` of a png, and into
        the EXIF user comment of other formats.
    """
    kind = FORMATS[path.suffix.removeprefix(".")]
    with atomic_path(path) as partial:
        if kind == "PNG":
            write_png(picture, partial, {} if parameters is None else {"parameters": parameters})
            return
        options: dict[str, Any] = {"quality": quality}
        if kind == "JPEG":
            options["subsampling"] = 0  # the watermark is in the chroma
        if parameters is not None:
            options["exif"] = _exif(parameters)
        picture.save(partial, format=kind, **options)


def _exif(comment: str) -> Image.Exif:
    """EXIF with a user comment, cut at what fits into a jpg."""
    exif = Image.Exif()
    text = comment.encode("utf-16-be")[:_LONGEST_COMMENT].decode("utf-16-be", errors="ignore")
    exif.get_ifd(_EXIF)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif


def read_parameters(path: Path) -> str | None:
    """The text that `save` embedded, or None."""
    with Image.open(path) as picture:
        if text := picture.info.get("parameters"):
            return str(text)
        comment = picture.getexif().get_ifd(_EXIF).get(_USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        return comment[8:].decode("utf-16-be")
    return None
