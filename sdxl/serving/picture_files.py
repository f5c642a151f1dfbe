"""Pictures → files, with the request in their metadata.

Knows file formats; does not know models.
"""

import zlib
from pathlib import Path
from typing import get_args

from PIL import Image, PngImagePlugin

from sdxl.errors import UserInputError
from sdxl.files.archives import atomic_path
from sdxl.serving.generation import REFINER_STRENGTH, GenerationRequest, Refine

FORMATS = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG"}
"""Public name, which is also the suffix → Pillow's name."""
_PNG = {"compress_level": 1, "compress_type": zlib.Z_RLE}
"""zlib's fastest level, looking for runs alone: on drawn pictures two to three times as fast as Pillow's default, for files
a tenth smaller."""
_SAMPLERS = {
    "DDIM": "DDIM",
    "DPMSolverMultistep": "DPM++ 2M",
    "HeunDiscrete": "Heun",
    "KarrasDPM": "DPM++ 2M Karras",
    "K_EULER_ANCESTRAL": "Euler a",
    "K_EULER": "Euler",
    "PNDM": "PLMS",
}
"""Public name of a sampler → its name in AUTOMATIC1111's web UI."""
_EXIF, _USER_COMMENT = 0x8769, 0x9286
_LONGEST_COMMENT = 60_000
"""Bytes; a jpg's EXIF holds 65 thousand in all."""


def check_format(output_format: str, quality: int) -> None:
    """Refuse what `save` cannot write.

    Raises:
        UserInputError: names the input.
    """
    if output_format not in FORMATS:
        raise UserInputError(f"output_format is {output_format!r}, but must be one of {', '.join(FORMATS)}.")
    if not 1 <= quality <= 100:
        raise UserInputError(f"output_quality is {quality}, but must be from 1 to 100.")


def describe(request: GenerationRequest, index: int, *, model: str) -> str:
    """The request of its picture `index` in the text form of AUTOMATIC1111's web UI, which many readers show."""
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    facts = {
        "Steps": request.num_inference_steps,
        "Sampler": _SAMPLERS[request.scheduler],
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": request.seed + index,
        "Size": f"{request.width}x{request.height}",
        "Model": f'"{model}"' if any(mark in model for mark in ",:") else model,
    }
    if request.image is not None:
        facts["Denoising strength"] = f"{request.prompt_strength:g}"
    _, ensemble, over_the_picture = get_args(Refine)
    if request.refine == ensemble:
        facts["Refiner switch at"] = f"{request.high_noise_frac:g}"
    elif request.refine == over_the_picture:
        facts["Refiner steps"] = request.refine_steps or request.num_inference_steps
        facts["Refiner strength"] = REFINER_STRENGTH
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items()))
    return "\n".join(lines)


def save(picture: Image.Image, path: Path, *, quality: int, parameters: str | None) -> None:
    """Write `picture` to `path`, whole or not at all; its suffix is a key of `FORMATS`.

    `parameters` goes where AUTOMATIC1111's web UI puts it: a png's text chunk `parameters`, the EXIF user comment of
    the others. `quality` is 1 to 100; png has none.
    """
    kind = FORMATS[path.suffix.removeprefix(".")]
    options: dict = dict(_PNG) if kind == "PNG" else {"quality": quality}
    if kind == "JPEG":
        options["subsampling"] = 0  # the watermark lies in the chroma
    if parameters is not None and kind == "PNG":
        chunks = options["pnginfo"] = PngImagePlugin.PngInfo()
        add = chunks.add_text if parameters.isascii() else chunks.add_itxt
        add("parameters", parameters)
    elif parameters is not None:
        exif = Image.Exif()
        comment = parameters.encode("utf-16-be")[:_LONGEST_COMMENT].decode("utf-16-be", errors="ignore")
        exif.get_ifd(_EXIF)[_USER_COMMENT] = b"UNICODE\0" + comment.encode("utf-16-be")
        options["exif"] = exif
    with atomic_path(path) as partial:
        picture.save(partial, format=kind, **options)


def read_parameters(path: Path) -> str | None:
    """What `save` wrote as `parameters`, or None."""
    with Image.open(path) as picture:
        if text := picture.info.get("parameters"):
            return str(text)
        comment = picture.getexif().get_ifd(_EXIF).get(_USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        return comment[8:].decode("utf-16-be")
    return None
