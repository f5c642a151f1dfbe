"""The stages of preprocessing that ask models, each over the whole set: what matters, enlarging, captions.

Knows files of pictures and in which order models are needed; does not know inputs' names on the outside, nor training.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from dataset_and_utils import TokenMap
from sdxl.data.captioning import captioner, check_caption_text, names_in, tokens_in
from sdxl.data.dataset_folder import Source
from sdxl.data.framed_pictures import PNG_LEVEL, Prepared, enlarged
from sdxl.data.framing import Salience, crop_box, read_image
from sdxl.data.masking import face_salience, segmenter, split_prompts
from sdxl.data.upscaling import upscaler
from sdxl.errors import DownloadError, UserInputError, WeightsError

log = logging.getLogger(__name__)

_LOOK = (800, 800)
"""Size that pictures are decoded to at least, where a model only looks at them."""


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
# Models that draw and write


def upscale_small(pictures: Sequence[Prepared], folder: Path) -> None:
    """Draw again, by the upscaler, the pictures whose crops had to be enlarged; then Lanczos brings them to size.

    Without the upscaler they stay as Lanczos made them, and the log says so.
    """
    small = [picture for picture in pictures if enlarged(picture.cut) > 1]
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
                final.save(folder / picture.file_name, compress_level=PNG_LEVEL)
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
