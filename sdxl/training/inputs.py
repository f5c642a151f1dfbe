"""The inputs of `train`, typed and checked at once.

Knows public names, old and new, and which setting each one becomes; does not know cog, files or models.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dataset_and_utils import TokenMap
from sdxl import settings
from sdxl.data.config import PreprocessConfig
from sdxl.errors import UserInputError
from sdxl.files.result_upload import Target, parse_target
from sdxl.training.config import (
    TrainingConfig,
    TrainingOptions,
    check_limits,
    limited,
    resolve_views,
    words_of,
)
from sdxl.training.contradictions import refuse_contradictions
from sdxl.training.presets import PRESETS, given, resolve, resolve_steps

_ANY_RESOLUTION = 1024
_MANY_PICTURES = 10**9
"""Stand-ins for what only the base and the pictures tell, so that all else is checked before they are read."""


@dataclass(frozen=True, kw_only=True)
class TrainInputs:
    """What a user asked for. The base and the pictures still decide what is None here.

    Defaults have their home in `TrainingOptions` and `PreprocessConfig`.
    """

    input_images: str
    """Path, http(s) URL or data: URI of the archive."""
    base: str | None
    """The base: a folder, a hub repository or a single file. None: the one that `SDXL_BASE` names."""
    resolution: int | None
    """Side of the training pictures in pixels. None: the base's own."""
    num_train_epochs: int | None = limited(ge=1)
    """How often every picture is shown; excludes `max_train_steps`."""
    max_train_steps: int | None = limited(ge=1)
    """Optimizer steps. None: as many as the epochs need, or as the preset says."""
    resume: str | None = None
    """A state to go on from: a path, a URL or "auto"."""
    init_from: str | None = None
    """A fine-tune to start from: a path, a URL or a name on the hub."""
    upload_url: Target | None = None
    """Where the tar goes. A secret."""
    push_to: str | None = None
    """The repository on the hub to which the result goes."""
    seed: int | None = limited(ge=0, le=2**32 - 1)
    """None for a random one, or for that of the state to go on from."""
    global_caption: str | None
    caption_prefix: str
    bucketing: bool
    mask_target_prompts: str | None
    crop_based_on_salience: bool
    use_face_detection_instead: bool
    clipseg_temperature: float
    """These seven are fields of `PreprocessConfig`; see there."""
    options: TrainingOptions

    def __post_init__(self) -> None:
        check_limits(self)
        if self.upload_url is not None and self.push_to is not None:
            raise UserInputError("upload_url and push_to are both given: give one of them.")
        refuse_contradictions(
            self.options, max_train_steps=self.max_train_steps, num_train_epochs=self.num_train_epochs
        )
        resolution = _ANY_RESOLUTION if self.resolution is None else self.resolution
        self.preprocess_config(resolution)
        self.training_config(resolution=resolution, images=_MANY_PICTURES)

    @property
    def source_of_base(self) -> str:
        """What names the base."""
        return self.base or settings.base_name()

    @property
    def base_is_called(self) -> str:
        """The input or setting that names the base, for messages."""
        return "base" if self.base else "SDXL_BASE"

    @property
    def instead_of_preset(self) -> list[str]:
        """The inputs that were given instead of what the preset decides."""
        steps = ("max_train_steps", "num_train_epochs")
        return [name for name in steps if getattr(self, name) is not None] + [*given(self.options)]

    @property
    def asked(self) -> dict[str, Any]:
        """The inputs that differ from their defaults, except for the names of files and secrets."""
        defaults = {
            entry.name: entry.default
            for kind in (PreprocessConfig, TrainingOptions)
            for entry in fields(kind)
        }
        defaults["clipseg_temperature"] = defaults["mask_temperature"]
        files = ("input_images", "base", "resume", "init_from", "upload_url", "push_to", "options")
        own = {name: value for name, value in vars(self).items() if name not in files}
        return {
            name: value
            for name, value in {**vars(self.options), **own}.items()
            if value != defaults.get(name)
        }

    @property
    def token_map(self) -> TokenMap:
        """The tokens to learn."""
        return TokenMap.parse(self.options.token_map)

    def preprocess_config(self, resolution: int) -> PreprocessConfig:
        """How to prepare the pictures.

        Raises:
            UserInputError: a setting is wrong.
        """
        return PreprocessConfig(
            target_size=resolution,
            global_caption=self.global_caption,
            caption_prefix=self.caption_prefix,
            token_map=self.token_map,
            bucketing=self.bucketing,
            mask_target_prompts=self.mask_target_prompts,
            crop_based_on_salience=self.crop_based_on_salience,
            use_face_detection_instead=self.use_face_detection_instead,
            mask_temperature=self.clipseg_temperature,
        )

    def training_config(
        self,
        *,
        resolution: int,
        images: int,
        processes: int = 1,
        seed: int | None = None,
        base: str = "",
        token_init: str | None = None,
    ) -> TrainingConfig:
        """How to train on `images` prepared pictures, in `processes` that train together.

        seed: that of the run, if it is known already.
        base: the base's name for the record.
        token_init: the words that token rows start from, such as "TOK:dog". None: those that the user named.

        Raises:
            UserInputError: a setting is wrong.
        """
        options, speed = self.options, settings.speed()
        at_once = options.learned_at_once * options.gradient_accumulation_steps * processes
        words = words_of(options.token_init) if token_init is None else token_init
        steps = resolve_steps(
            options.preset,
            max_train_steps=self.max_train_steps,
            epochs=self.num_train_epochs,
            images=images,
            at_once=at_once,
        )
        decided = resolve(options, token_init=words, steps=steps)
        views = resolve_views(options.random_views, draws=steps * at_once, images=images)
        return TrainingConfig(
            **{**vars(options), **decided, "token_init": words, "random_views": views},
            base=base,
            resolution=resolution,
            max_train_steps=steps,
            seed=(self.seed or 0) if seed is None else seed,
            cuda_graph=speed != "eager",
            compile_blocks=speed in ("compiled", "fp8"),
            fp8=speed == "fp8" and options.is_lora and not options.use_dora,
        )


def train_inputs(given: Mapping[str, Any]) -> TrainInputs:
    """Turn the arguments of `train` into `TrainInputs`. The only place that knows the deprecated names.

    Raises:
        UserInputError: a value is wrong, an input is missing, or both names of one input are given.
    """
    values = dict(given)
    values.pop("config", None)  # its inputs are in the others by now
    archive = values.pop("input_data_tar_or_zip")
    multiplier = values.pop("ti_learning_rate_multiplier")
    token = values.pop("token_string")
    temperature = values.pop("temp")

    if archive is not None:
        if values["input_images"] is not None:
            raise UserInputError(
                "input_data_tar_or_zip is the old name of input_images: give only input_images."
            )
        values["input_images"] = archive
    if values["input_images"] is None:
        raise UserInputError("input_images is missing: give a zip or tar of pictures.")
    if multiplier is not None:
        if values["ti_lr"] is not None:
            raise UserInputError("ti_learning_rate_multiplier is the old form of ti_lr: give only ti_lr.")
        rate = values["unet_learning_rate"]
        if rate is None:  # a wrong preset is refused below
            rate = PRESETS.get(values["preset"], PRESETS["good"]).unet_learning_rate
        values["ti_lr"] = multiplier * rate
        if values["is_lora"]:  # then the rate has no other use
            values["unet_learning_rate"] = None
    if token is not None:
        if values["token_map"] not in (TrainingOptions.token_map, f"{token}:2"):
            raise UserInputError("token_string is the old form of token_map: give only token_map.")
        values["token_map"] = f"{token}:2"
    if temperature is not None:
        if values["clipseg_temperature"] not in (PreprocessConfig.mask_temperature, temperature):
            raise UserInputError(
                "temp is the old name of clipseg_temperature: give only clipseg_temperature."
            )
        values["clipseg_temperature"] = temperature

    url = values.pop("upload_url")
    values["upload_url"] = parse_target(url, "upload_url") if url else None
    values["push_to"] = values["push_to"] or None
    options = TrainingOptions(**{entry.name: values.pop(entry.name) for entry in fields(TrainingOptions)})
    values["input_images"] = str(values["input_images"])
    return TrainInputs(**values, options=options)
