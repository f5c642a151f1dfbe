"""What a user may ask for: every option of a request, its default, its range and its choices.

The only home of defaults, ranges and choices; predict.py repeats them literally for Cog, and a test compares the two.
Each record checks itself when it is made. Knows no models and imports no torch, so that wrong inputs are refused at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from PIL import Image

from sdxl.data.caption_text import require_short
from sdxl.errors import UserInputError
from sdxl.model.prompt_weights import parts_of
from sdxl.serving.prompt_lists import MOST_PROMPTS, prompts_in
from sdxl.serving.samplers import SCHEDULERS, SPACINGS

if TYPE_CHECKING:
    from sdxl.serving.canvas import Canvas
    from sdxl.serving.masks import Surroundings

Record = TypeVar("Record", "DrawingOptions", "LayoutOptions", "FineTuneOptions", "DeliveryOptions")

MULTIPLE = 8
"""Pixels per latent pixel: SDXL draws sides that are multiples of it."""
SIDES = (64, 2048)
"""Shortest and longest side, in pixels."""
ASPECT_RATIOS = {
    "1:1": (1024, 1024),
    "5:4": (896, 1152),
    "4:3": (896, 1152),
    "3:2": (832, 1216),
    "16:9": (768, 1344),
    "21:9": (640, 1536),
    "4:5": (1152, 896),
    "3:4": (1152, 896),
    "2:3": (1216, 832),
    "9:16": (1344, 768),
    "9:21": (1536, 640),
}
"""Preset → (height, width) in pixels for a base of 1024 pixels: the training sizes of SDXL that come nearest to the
ratio (arXiv:2307.01952, appendix I)."""
FORMATS = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG"}
"""File format, also the file's suffix → Pillow's name."""
MOST_LORAS = 16
"""LoRAs in `extra_lora`: each is fetched, read and kept in memory."""
Refine = Literal["no_refiner", "expert_ensemble_refiner", "base_image_refiner"]

CHOICES = {
    "aspect_ratio": ("custom", *ASPECT_RATIOS),
    "scheduler": tuple(SCHEDULERS),
    "timestep_spacing": SPACINGS,
    "speed": ("exact", "fast"),
    "refine": get_args(Refine),
    "output_format": tuple(FORMATS),
}
"""Input → its choices."""
RANGES = {
    "num_outputs": (1, 4),
    "num_inference_steps": (1, 500),
    "guidance_scale": (0, 50),
    "guidance_rescale": (0, 1),
    "prompt_strength": (0, 1),
    "mask_blur": (0, 256),
    "mask_padding": (0, 2048),
    "seed": (0, 2**32 - 1),
    "high_noise_frac": (0, 1),
    "refine_steps": (1, 500),
    "lora_scale": (-2, 2),
    "text_encoder_lora_scale": (-2, 2),
    "extra_lora_scale": (-2, 2),
    "extra_lora_text_encoder_scale": (-2, 2),
    "output_quality": (1, 100),
}
"""Input → its smallest and largest value; for a list, those of each number in it."""


@dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    """What to draw and how, except for the size.

    Raises:
        UserInputError: an input is out of its range or not among its choices, a weight in a prompt is too large, or there
            are too many prompts.
    """

    prompt: str
    prompts: str = ""
    """Several prompts instead, one a line or separated by |."""
    negative_prompt: str = ""
    """What to keep out of the picture; empty for nothing."""
    prompt_weights: bool = True
    """Whether brackets in both prompts are weights: see `sdxl.model.prompt_weights`."""
    num_outputs: int = 1
    """Pictures of each prompt."""
    scheduler: str = "K_EULER"
    """A key of `samplers.SCHEDULERS`."""
    timestep_spacing: str = "base"
    """One of `samplers.SPACINGS`."""
    speed: str = "exact"
    """exact: every call of the UNet does everything. fast: see `shortcuts`."""
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    """Strength of classifier-free guidance (arXiv:2207.12598); 1 and less turn it off."""
    guidance_rescale: float = 0.0
    """Share of the guided prediction that gets back its natural spread (arXiv:2305.08891, section 3.4)."""
    prompt_strength: float = 0.8
    """With an input picture: the share of the steps to run on it; 1 ignores the picture."""
    seed: int
    """Picture i is drawn from the seed `seed_of(i)`, whatever the number of pictures."""
    refine: Refine = "no_refiner"
    """expert_ensemble_refiner: the refiner takes over for the last of the noise. base_image_refiner: it redraws the
    finished picture a little."""
    high_noise_frac: float = 0.8
    """For expert_ensemble_refiner: the share of the noise that the base removes before the refiner takes over."""
    refine_steps: int | None = None
    """For base_image_refiner: the steps of its schedule; None for `num_inference_steps`."""

    def __post_init__(self) -> None:
        require_short(self.prompt, "prompt")
        require_short(self.negative_prompt, "negative_prompt")
        for name in ("prompt", "negative_prompt"):
            parts_of(getattr(self, name), weights=self.prompt_weights, name=name)
        for prompt in self.all_prompts:
            parts_of(prompt, weights=self.prompt_weights, name="A prompt of prompts")
        _check(self)
        _check_steps(self)
        pictures = len(self.all_prompts) * self.num_outputs
        if pictures > MOST_PROMPTS:
            raise UserInputError(
                f"{len(self.all_prompts)} prompts with num_outputs={self.num_outputs} make {pictures} pictures, but a "
                f"request may have at most {MOST_PROMPTS}: give fewer."
            )

    @property
    def all_prompts(self) -> tuple[str, ...]:
        """What to draw, in order: `prompts`, or else `prompt` alone."""
        return prompts_in(self.prompts) if self.prompts.strip() else (self.prompt,)

    def seed_of(self, index: int) -> int:
        """The seed of picture `index`: `seed` + `index`, where 0 follows the largest seed, so that it is a seed too."""
        return (self.seed + index) % (RANGES["seed"][1] + 1)

    def on(self, canvas: "Canvas") -> "list[GenerationRequest]":
        """The complete requests: these options on a `canvas`, one for each prompt. All have the same seeds."""
        return [
            GenerationRequest(**{**vars(self), "prompt": prompt, "prompts": ""}, **vars(canvas))
            for prompt in self.all_prompts
        ]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest(DrawingOptions):
    """What to draw, complete and checked: the options, the size and the input picture.

    Raises:
        UserInputError: an input is out of its range, not among its choices, or excludes another.
    """

    width: int
    """Pixels; a multiple of 8 without `image`."""
    height: int
    """Pixels; a multiple of 8 without `image`."""
    image: Image.Image | None = None
    """RGB picture of `width` × `height` to start from."""
    mask: Image.Image | None = None
    """Grey, of the same size: 255 is repainted, 0 is kept, and what lies between is redrawn in part."""
    surroundings: "Surroundings | None" = None
    """What a drawn picture with a mask is put back into; None for `image` itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sides(self.width, self.height, multiple=MULTIPLE if self.image is None else 1)
        _check_mask(self.image, self.mask)

    @property
    def starts_from_image(self) -> bool:
        """Whether any of the input picture is under the first noise."""
        return self.image is not None and self.prompt_strength < 1


@dataclass(frozen=True, kw_only=True)
class LayoutOptions:
    """Which size to draw, and on which input picture, as the user gave them.

    Raises:
        UserInputError: a side is out of range, or inputs exclude each other.
    """

    image: Image.Image | None = None
    mask: Image.Image | None = None
    mask_blur: int = 0
    """Standard deviation of a Gaussian over the mask, in pixels of the picture that is delivered."""
    mask_invert: bool = False
    only_masked: bool = False
    """Whether only the part around the mask is drawn, and put back into the whole picture."""
    mask_padding: int = 32
    """For `only_masked`: pixels of `image` around the mask that are drawn with it."""
    width: int | None = None
    height: int | None = None
    aspect_ratio: str = "custom"

    def __post_init__(self) -> None:
        _check(self)
        _check_mask(self.image, self.mask)
        if self.aspect_ratio != "custom":
            if self.width is not None or self.height is not None:
                raise UserInputError(
                    "aspect_ratio is given together with width or height: give one or the other."
                )
        elif self.image is not None and (self.width is None) != (self.height is None):
            raise UserInputError(
                "Only one of width and height is given: give both, or neither to keep the size of image."
            )
        _check_sides(self.width, self.height, multiple=MULTIPLE if self.image is None else 1)


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions:
    """Which fine-tunes to draw with, and how strongly.

    Raises:
        UserInputError: a scale is out of range, or the scales do not match the LoRAs.
    """

    replicate_weights: str | None = None
    """Path, URL, `data:` URI or hub repository; None for the fine-tune given at setup, if any."""
    lora_scale: float = 1.0
    """1 as it was trained; more than 1 exaggerates, less than 0 does the opposite."""
    text_encoder_lora_scale: float | None = None
    """The same for the LoRA's layers in the text encoders; None for `lora_scale`."""
    extra_lora: Sequence[str] | None = None
    """LoRAs to add, named like `replicate_weights`; empty texts stand for none."""
    extra_lora_scale: Sequence[float] | None = None
    """One scale per LoRA, with or without those of empty texts; None for 1 each."""
    extra_lora_text_encoder_scale: Sequence[float] | None = None
    """The same for their layers in the text encoders; None for `extra_lora_scale`."""

    def __post_init__(self) -> None:
        loras = self.extra_lora or ()
        if len(loras) > MOST_LORAS:
            raise UserInputError(
                f"extra_lora has {len(loras)} entries, but may have at most {MOST_LORAS}: merge LoRAs first."
            )
        for name in ("extra_lora_scale", "extra_lora_text_encoder_scale"):
            scales = getattr(self, name)
            if scales is not None and len(scales) not in (len(loras), len(_filled(loras))):
                raise UserInputError(
                    f"{name} has {len(scales)} numbers for {len(loras)} LoRAs in extra_lora: give one number each."
                )
        _check(self)

    @property
    def extra(self) -> list[tuple[str, float, float | None]]:
        """Each extra LoRA with its scale, and with that for the text encoders, None for the same."""
        loras = _filled(self.extra_lora or ())
        scales = self._of_each(self.extra_lora_scale) or [1.0] * len(loras)
        of_encoders = self._of_each(self.extra_lora_text_encoder_scale) or [None] * len(loras)
        return list(zip(loras, scales, of_encoders, strict=True))

    def _of_each(self, scales: Sequence[float] | None) -> list[float]:
        """One of `scales` for each LoRA that is not an empty text; nothing for None."""
        loras = self.extra_lora or ()
        if scales is None or len(scales) != len(loras):
            return list(scales or ())
        return [scale for lora, scale in zip(loras, scales, strict=True) if lora.strip()]


@dataclass(frozen=True, kw_only=True)
class DeliveryOptions:
    """What happens to the pictures after they are drawn.

    Raises:
        UserInputError: an input is out of its range or not among its choices.
    """

    apply_watermark: bool = True
    disable_safety_checker: bool = False
    output_format: str = "png"
    """A key of `FORMATS`."""
    output_quality: int = 95
    """For webp and jpg."""
    embed_metadata: bool = True

    def __post_init__(self) -> None:
        _check(self)


def made_of(record: type[Record], given: Mapping[str, Any]) -> Record:
    """A record whose fields are among `given`.

    Raises:
        UserInputError: an input is wrong.
    """
    return record(**{entry.name: given[entry.name] for entry in fields(record)})


def _filled(texts: Sequence[str]) -> list[str]:
    return [text for text in texts if text.strip()]


def _check(options: Any) -> None:
    """Compare the fields of a record with `RANGES` and `CHOICES`."""
    for name, value in vars(options).items():
        if name in CHOICES and value not in CHOICES[name]:
            raise UserInputError(f"{name} is {value!r}, but must be one of {', '.join(CHOICES[name])}.")
        if name in RANGES and value is not None:
            low, high = RANGES[name]
            for number in value if isinstance(value, Sequence) else (value,):
                if not low <= number <= high:
                    raise UserInputError(f"{name} is {number}, but must be from {low} to {high}.")


def _check_steps(options: DrawingOptions) -> None:
    most = SCHEDULERS[options.scheduler].most_steps
    for name in ("num_inference_steps", "refine_steps"):
        steps = getattr(options, name)
        if most and steps and steps > most:
            raise UserInputError(
                f"{name} is {steps}, but {options.scheduler} takes at most {most} steps, and 4 to 8 are usual."
            )


def _check_sides(width: int | None, height: int | None, *, multiple: int) -> None:
    for name, side in (("width", width), ("height", height)):
        if side is not None and (not SIDES[0] <= side <= SIDES[1] or side % multiple):
            raise UserInputError(
                f"{name} is {side}, but must be a multiple of 8 from 64 to 2048, such as 1024."
            )


def _check_mask(image: Image.Image | None, mask: Image.Image | None) -> None:
    if mask is not None and image is None:
        raise UserInputError("mask is given without image: give the picture that the mask belongs to.")
