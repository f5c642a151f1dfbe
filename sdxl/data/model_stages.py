"""The stages of preprocessing that use models: find what matters, enlarge small pictures, write captions.

Knows in which order pictures pass through a model; does not know how the models work. Each model is imported only if
it is needed, because torch takes seconds to import.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from sdxl.data.config import PreprocessConfig, split_prompts
from sdxl.data.framed_pictures import PNG_LEVEL, FramedPicture
from sdxl.data.framing import Salience, crop_box
from sdxl.data.picture_reader import read_image
from sdxl.data.source_folder import Source
from sdxl.errors import DownloadError, WeightsError

log = logging.getLogger(__name__)

_LOOK = (800, 800)
"""(height, width) that models need to see; larger JPEGs are decoded at a fraction of their size."""


def find_salience(files: Source, config: PreprocessConfig) -> dict[Path, Salience | None]:
    """Search every picture without a mask for what matters: faces, or the things of `mask_target_prompts`.

    Returns picture → what was found. Pictures where nothing was found map to None, and the log names them. The result
    is empty if the settings ask for neither faces nor things.

    Raises:
        DownloadError, WeightsError: the settings ask for things, but the segmenter cannot be fetched or loaded.
    """
    images = [image for image in files.images if image not in files.masks]
    prompts = split_prompts(config.mask_target_prompts)
    if not images:
        return {}
    if config.use_face_detection_instead:
        found, what = _find_faces(images, config.mask_temperature), "No face"
    elif prompts:
        found = _find_things(images, prompts, config.mask_temperature)
        what = f"Nothing like {' or '.join(prompts)}"
    else:
        return {}
    without = ", ".join(image.name for image in images if found[image] is None)
    if without:
        log.warning("%s was found in %s: the masks of these pictures show all of them.", what, without)
    return found


def _find_faces(images: Sequence[Path], temperature: float) -> dict[Path, Salience | None]:
    from sdxl.data.face_masks import face_salience

    progress = tqdm(images, desc="Looking for faces", unit="picture")
    return {image: face_salience(read_image(image, at_least=_LOOK)[0], temperature) for image in progress}


def _find_things(
    images: Sequence[Path], prompts: Sequence[str], temperature: float
) -> dict[Path, Salience | None]:
    from sdxl.data.segmenter import segmenter

    found: dict[Path, Salience | None] = {}
    with segmenter() as model:
        for image in tqdm(images, desc=f"Looking for {', '.join(prompts)}", unit="picture"):
            mask = model.mask(read_image(image, at_least=_LOOK)[0], prompts, temperature)
            found[image] = None if mask is None else Salience(mask=mask)
    return found


def upscale_small(pictures: Sequence[FramedPicture]) -> None:
    """Redraw the pictures whose crops were enlarged: the upscaler enlarges the crop, then Lanczos resizes it.

    If the upscaler cannot be fetched or loaded, the pictures stay as they are, and the log says so.
    """
    small = [picture for picture in pictures if picture.crop.scale > 1]
    if not small:
        return
    from sdxl.data.upscaler import upscaler

    try:
        with upscaler() as model:
            for picture in tqdm(small, desc="Enlarging small pictures", unit="picture"):
                whole = read_image(picture.source)[0]

                # Enlarge only the crop, extended to whole pixels.
                left, top, right, bottom = crop_box(whole, picture.crop)
                outer_left, outer_top = int(left), int(top)
                outer_right = min(math.ceil(right), whole.width)
                outer_bottom = min(math.ceil(bottom), whole.height)
                larger = model.enlarge(whole.crop((outer_left, outer_top, outer_right, outer_bottom)))

                box = (
                    (left - outer_left) * model.scale,
                    (top - outer_top) * model.scale,
                    (right - outer_left) * model.scale,
                    (bottom - outer_top) * model.scale,
                )
                height, width = picture.crop.target_size
                final = larger.resize((width, height), Image.Resampling.LANCZOS, box=box)
                final.save(picture.file, compress_level=PNG_LEVEL)
    except (DownloadError, WeightsError) as error:
        log.warning("%d small pictures are enlarged by plain interpolation. %s", len(small), error)


def write_missing_captions(
    pictures: Sequence[FramedPicture], given: Mapping[Path, str] | None, config: PreprocessConfig
) -> list[str]:
    """The pictures' captions: the given ones, or else captions that the captioner writes.

    If the captioner cannot be fetched or loaded, all pictures get the caption prefix, and the log says so.
    """
    if given is not None:
        return [given[picture.source] for picture in pictures]
    from sdxl.data.captioner import captioner

    prefix = config.caption_prefix.strip()
    captions = []
    try:
        with captioner() as model:
            for picture in tqdm(pictures, desc="Writing captions", unit="picture"):
                with Image.open(picture.file) as opened:
                    captions.append(model.caption(opened, prefix))
        log.info("A model wrote the captions: check them.")
    except (DownloadError, WeightsError) as error:
        captions = [prefix.strip(" ,")] * len(pictures)
        log.warning('All pictures get the caption "%s". %s', captions[0], error)
    return captions
