"""Settings of a training run and of the process.

Knows names, ranges and defaults; does not know cog, files' contents or models.
"""

import os
import random
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dataset_and_utils import TokenMap
from sdxl.errors import UserInputError

DEFAULT_STEPS = 1000
Schedule = Literal["constant", "linear", "cosine"]
LoraTargets = Literal["attention", "transformer", "all"]


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
    """Rank of the LoRA matrices, at least 1; their alpha equals it."""
    lora_targets: LoraTargets = "attention"
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
    pivot_fraction: float = 0.5
    """Share of the steps, 0 to 1, in which the token rows train; from the pivot on only the UNet's weights do."""
    gradient_checkpointing: bool = True
    """On CUDA, compute the UNet's activations again in the backward pass: a third slower, far less memory."""

    def __post_init__(self) -> None:
        positive = {
            "max_train_steps": "steps",
            "train_batch_size": "pictures",
            "lora_rank": "dimensions",
            "unet_learning_rate": "such as 1e-6",
            "ti_lr": "such as 3e-4",
            "snr_gamma": "such as 5",
        }
        for name, unit in positive.items():
            if not getattr(self, name) > 0:
                raise UserInputError(f"{name} is {getattr(self, name)}, but must be above 0 ({unit}).")
        if not self.lora_lr >= 0:
            raise UserInputError(f"lora_lr is {self.lora_lr}, but must be 0 or more, such as 1e-4.")
        if not 64 <= self.resolution <= 2048 or self.resolution % 8:
            raise UserInputError(
                f"resolution is {self.resolution}, but must be a multiple of 8 from 64 to 2048, such as 1024."
            )
        if not 0 <= self.lr_warmup_steps < self.max_train_steps:
            raise UserInputError(
                f"lr_warmup_steps is {self.lr_warmup_steps}, but must be from 0 to below the {self.max_train_steps} steps."
            )
        if self.lr_scheduler not in (names := get_args(Schedule)):
            raise UserInputError(
                f"lr_scheduler is {self.lr_scheduler!r}, but must be one of {', '.join(names)}."
            )
        if self.lora_targets not in (names := get_args(LoraTargets)):
            raise UserInputError(
                f"lora_targets is {self.lora_targets!r}, but must be one of {', '.join(names)}."
            )
        if not 0 <= self.pivot_fraction <= 1:
            raise UserInputError(f"pivot_fraction is {self.pivot_fraction}, but must be from 0 to 1.")
        if not 0 <= self.seed < 2**32:
            raise UserInputError(f"seed is {self.seed}, but must be from 0 to 4294967295.")
        if self.checkpointing_steps < 0:
            raise UserInputError(f"checkpointing_steps is {self.checkpointing_steps}, but must be 0 or more.")
        TokenMap.parse(self.token_map).parse_init(self.token_init)

    @property
    def pivot_step(self) -> int:
        """The first step (counted from 0) in which the token rows are frozen."""
        return round(self.pivot_fraction * self.max_train_steps)

    def as_json(self) -> dict[str, Any]:
        """All settings, ready for json."""
        return asdict(self)


def resolve_steps(*, max_train_steps: int | None, epochs: int | None, images: int, batch_size: int) -> int:
    """Number of optimizer steps: as given, else from `epochs` over `images`, else `DEFAULT_STEPS`."""
    if max_train_steps is not None:
        return max_train_steps
    if epochs is not None:
        return -(-epochs * images // max(batch_size, 1))
    return DEFAULT_STEPS


def resolve_seed(seed: int | None) -> int:
    """The seed as given (0 is one), else a random one."""
    return random.SystemRandom().randrange(2**32) if seed is None else seed


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


def check_caption_text(text: str) -> None:
    """Refuse placeholders in the beginning of captions.

    Raises:
        UserInputError: `text` holds something like <s0>.
    """
    placeholder = re.search(r"<s[0-9]+>", text)
    if placeholder is not None:
        raise UserInputError(
            f'"{text}" holds {placeholder[0]}, which the text encoders have not learned before training, and token_map '
            "puts it in by itself: write a word such as TOK instead."
        )


def new_workspace(name: str) -> Path:
    """Make the folder of one run, under `SDXL_WORKSPACE` (default: the system's folder for temporary files)."""
    parent = Path(os.environ.get("SDXL_WORKSPACE") or tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
