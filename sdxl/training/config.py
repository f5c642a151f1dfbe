"""Settings of a training run.

Knows names, ranges and defaults; does not know cog, files' contents or models.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from dataset_and_utils import TokenMap
from sdxl.errors import UserInputError

DEFAULT_STEPS = 1000
Schedule = Literal["constant", "linear", "cosine"]
LoraTargets = Literal["attention", "transformer", "all"]
OptimizerName = Literal["adamw", "adamw_8bit", "adafactor", "prodigy"]
Precision = Literal["auto", "fp32", "bf16"]

_ABOVE_ZERO = {
    "max_train_steps": 1000,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "lora_rank": 32,
    "prior_images": 100,
    "unet_learning_rate": 1e-6,
    "ti_lr": 3e-4,
    "snr_gamma": 5,
}
_ZERO_OR_MORE = {"random_views": 15, "lora_lr": 1e-4, "checkpointing_steps": 200, "prior_weight": 1}
_CHOICES = {
    "lr_scheduler": Schedule,
    "lora_targets": LoraTargets,
    "optimizer": OptimizerName,
    "precision": Precision,
}
_SHARES = ("noise_offset", "caption_dropout", "mask_floor", "pivot_fraction")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that decides a training run, resolved: two runs with equal configs and data sets are equal."""

    base: str
    """Folder or hub name of the base model."""
    token_map: str
    """Tokens and their numbers of rows, such as "TOK:2"."""
    token_init: str = ""
    """Known words that the tokens' rows start from, such as "TOK:dog"; rows without one start at random."""
    resolution: int
    """Side of the training pictures in pixels; a multiple of 8."""
    max_train_steps: int
    """Optimizer steps, at least 1."""
    train_batch_size: int
    """Pictures a step, at least 1."""
    unet_learning_rate: float
    """Learning rate of the UNet's weights (full mode), above 0."""
    ti_lr: float
    """Learning rate of the new token rows, above 0."""
    is_lora: bool
    """Train LoRA matrices on the UNet's attention instead of the UNet itself."""
    lora_rank: int
    """Rank of the LoRA matrices, at least 1."""
    lora_alpha: int | None = None
    """LoRA's α, above 0: the matrices' product is multiplied by α / rank. None: the rank, for a factor of 1."""
    use_dora: bool = False
    """Train DoRA (arXiv:2402.09353) in the place of LoRA: the size of each output's weights learns apart from its
    direction; slower."""
    lora_targets: LoraTargets = "transformer"
    """Which layers of the UNet get LoRA matrices: the projections of attention; those and all other linear layers of
    the transformer blocks; or the convolutions too."""
    lora_lr: float
    """Learning rate of the LoRA matrices, at least 0; 0 trains the token rows alone."""
    lr_scheduler: Schedule
    """Course of all learning rates over the run, after the warm-up."""
    lr_warmup_steps: int
    """Steps over which the learning rates rise from 0, below `max_train_steps`."""
    seed: int
    """Seed of everything random in the run, 0 to 2³²−1."""
    checkpointing_steps: int
    """Save the fine-tune every so many steps; 0 for never."""
    snr_gamma: float = 5.0
    """γ of the min-SNR weighting of the loss, above 0; a large value such as 1e6 weighs all timesteps alike."""
    noise_offset: float = 0.0
    """How much noise of one value per picture and channel is added to the noise, 0 to 1; above 0 the fine-tune can draw
    darker and brighter pictures. Source: N. Guttenberg, "Diffusion with Offset Noise" (2023)."""
    caption_dropout: float = 0.0
    """Share of pictures, 0 to 1, that are learnt without their caption, as guidance's unconditional branch sees them."""
    mask_floor: float = 0.2
    """Weight, 0 to 1, of what a mask leaves out, where what it shows has 1."""
    mask_base_target: bool = True
    """Outside masks, learn to go on drawing as the base would there, in the place of what the pictures show."""
    random_views: int = 15
    """Parts of each picture, enlarged and cut at random, that are learnt beside the whole, at least 0."""
    horizontal_flip: bool = False
    """Learn every picture mirrored too."""
    prior_prompts: str = ""
    """Prompts, separated by |, whose pictures should stay as the base draws them."""
    prior_images: int = 100
    """How many pictures the base draws for them, at least 1."""
    prior_weight: float = 1.0
    """Weight of the loss on pictures of the prior, where there are some, beside 1 for the subject's."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are averaged in one optimizer step, at least 1."""
    pivot_fraction: float = 0.5
    """Share of the steps, 0 to 1, in which the token rows train; from the pivot on only the UNet's weights do."""
    optimizer: OptimizerName = "adamw"
    """What turns gradients into steps of the UNet's weights or LoRA matrices; token rows always have AdamW."""
    precision: Precision = "auto"
    """How full training holds the UNet's weights; "auto": in fp32 where it fits, else in bf16, rounded stochastically."""
    gradient_checkpointing: bool | None = None
    """On CUDA, compute the UNet's activations again in the backward pass: a third slower, far less memory. None: where
    memory asks for it."""
    compile_blocks: bool = True
    """On CUDA, compile the blocks of a UNet of SDXL's size: half a minute once, kept between runs."""
    cuda_graph: bool = True
    """On CUDA, capture the step as a graph and replay it; without, kernels are launched one by one, for debugging."""

    def __post_init__(self) -> None:
        for name, example in _ABOVE_ZERO.items():
            if not getattr(self, name) > 0:
                raise UserInputError(
                    f"{name} is {getattr(self, name)}, but must be above 0, such as {example}."
                )
        for name, example in _ZERO_OR_MORE.items():
            if not getattr(self, name) >= 0:
                raise UserInputError(
                    f"{name} is {getattr(self, name)}, but must be 0 or more, such as {example}."
                )
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise UserInputError(f"{name} is {getattr(self, name)}, but must be from 0 to 1.")
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in (choices := get_args(kind)):
                raise UserInputError(
                    f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(choices)}."
                )
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise UserInputError(f"lora_alpha is {self.lora_alpha}, but must be 1 or more, such as 32.")
        if not 64 <= self.resolution <= 2048 or self.resolution % 8:
            raise UserInputError(
                f"resolution is {self.resolution}, but must be a multiple of 8 from 64 to 2048, such as 1024."
            )
        if not 0 <= self.lr_warmup_steps < self.max_train_steps:
            raise UserInputError(
                f"lr_warmup_steps is {self.lr_warmup_steps}, but must be from 0 to below the {self.max_train_steps} steps."
            )
        if not 0 <= self.seed < 2**32:
            raise UserInputError(f"seed is {self.seed}, but must be from 0 to 4294967295.")
        TokenMap.parse(self.token_map).parse_init(self.token_init)

    @property
    def pivot_step(self) -> int:
        """The first step (counted from 0) in which the token rows are frozen."""
        return round(self.pivot_fraction * self.max_train_steps)

    def as_json(self) -> dict[str, Any]:
        """All settings, ready for json."""
        return asdict(self)


def resolve_steps(*, max_train_steps: int | None, epochs: int | None, images: int, batch_size: int) -> int:
    """Number of optimizer steps, each of `batch_size` pictures in all: as given, else from `epochs` over `images`, else
    `DEFAULT_STEPS`."""
    if max_train_steps is not None:
        return max_train_steps
    if epochs is not None:
        return -(-epochs * images // max(batch_size, 1))
    return DEFAULT_STEPS


def canonical_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Map the deprecated names of train's inputs to the canonical ones; the only place that knows both.

    Raises:
        UserInputError: both names of one input are given, or neither where one is required.
    """
    resolved = dict(inputs)
    archive = resolved.pop("input_data_tar_or_zip")
    multiplier = resolved.pop("ti_learning_rate_multiplier")
    token = resolved.pop("token_string")
    temperature = resolved.pop("temp")
    if archive is not None:
        if resolved["input_images"] is not None:
            raise UserInputError(
                "input_data_tar_or_zip is the old name of input_images: give only input_images."
            )
        resolved["input_images"] = archive
    if resolved["input_images"] is None:
        raise UserInputError("input_images is missing: give a zip or tar of pictures.")
    if multiplier is not None:
        resolved["ti_lr"] = multiplier * resolved["unet_learning_rate"]
    if token is not None:
        if resolved["token_map"] not in ("TOK:2", f"{token}:2"):
            raise UserInputError("token_string is the old form of token_map: give only token_map.")
        resolved["token_map"] = f"{token}:2"
    if temperature is not None:
        resolved["clipseg_temperature"] = temperature
    return resolved
