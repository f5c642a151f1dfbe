"""Settings of preprocessing.

Knows names, ranges and defaults; does not know how they are used. Importing it is cheap, so that entry points can
check their inputs before they import torch.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from dataset_and_utils import TokenMap
from sdxl.data.caption_text import check_caption_text, count_token, tokens_in
from sdxl.errors import UserInputError


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """All settings of preprocessing, checked."""

    target_size: int = 1024
    """Side of the square pictures in the dataset folder, in pixels: a multiple of 8. The default is SDXL 1.0's size."""
    bucketing: bool = False
    """Crop each picture to the nearest size of `buckets(target_size)` instead of to a square."""
    global_caption: str | None = None
    """Caption of every picture, if the archive contains no captions."""
    caption_prefix: str = "a photo of TOK, "
    """How a model's captions begin. Used if there are neither captions in the archive nor a global caption."""
    token_map: TokenMap | None = None
    """If given, every caption must name one of its tokens."""
    mask_target_prompts: str | None = None
    """What matters in the pictures, in words separated by commas. Masks leave out the rest."""
    use_face_detection_instead: bool = False
    """Mask everything except faces, and ignore `mask_target_prompts`."""
    mask_temperature: float = 1.0
    """Softness of the masks' edges, above 0."""
    crop_based_on_salience: bool = True
    """Crop around what the masks show instead of around the centre. Detected faces always stay whole if they fit."""

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
        for token in tokens_in(self.caption_prefix):
            if count_token(self.caption_prefix, token) > 1:
                raise UserInputError(f'"{self.caption_prefix}" names {token} twice: name it once.')

    def without_effect(self) -> Iterator[str]:
        """A sentence for each setting that has no effect, whatever the pictures are."""
        asks = bool(split_prompts(self.mask_target_prompts))
        if asks and self.use_face_detection_instead:
            yield "mask_target_prompts has no effect with use_face_detection_instead."
        masks = asks or self.use_face_detection_instead
        if self.mask_temperature != PreprocessConfig.mask_temperature and not masks:
            yield (
                f"The temperature of masks, {self.mask_temperature:g}, has no effect without mask_target_prompts or "
                "use_face_detection_instead."
            )

    def as_json(self) -> dict[str, Any]:
        """All settings, ready for JSON, except the size and the tokens, which are settings of the training too."""
        settings = asdict(self)
        del settings["target_size"], settings["token_map"]
        return settings


def split_prompts(text: str | None) -> list[str]:
    """The prompts in `mask_target_prompts`, separated by commas.

    Raises:
        UserInputError: only commas.
    """
    prompts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if text and text.strip() and not prompts:
        raise UserInputError(
            f'mask_target_prompts is {text!r}, but must name something, such as "a dog, a cat".'
        )
    return prompts
