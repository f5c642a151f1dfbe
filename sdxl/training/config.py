"""Settings of a training run: names, ranges and defaults.

Knows what a user may choose and what a run needs to know; does not know cog, files or models. Imports nothing heavy,
so that wrong settings end in an error at once.
"""

from dataclasses import MISSING, asdict, dataclass, field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dataset_and_utils import TokenMap
from sdxl.data.caption_text import require_short
from sdxl.errors import UserInputError

MOST_PREVIEWS = 8
"""Prompts in `preview_prompts`: each is drawn several times."""
MOST_PRIOR_PROMPTS = 1000
"""Prompts in `prior_prompts`: the base draws at least one picture of each."""

MOST_VIEWS = 63
"""Random crops of one picture. More lie too close to each other to bring anything new."""
_MOST_VIEWS_IN_ALL = 2048
"""Random crops of all pictures that are made by default: half a gigabyte of latents at 1024×1024, and minutes to encode."""
_DRAWS_OF_A_VIEW = 40
"""Draws of a picture for each crop of it. 4000 draws of six pictures give 17 crops each, about as many as were measured
to be good. Each crop is then seen 20 times, because half of the draws show the whole picture."""

AUTO, NO_WORD = "auto", "none"
"""Values of `token_init` beside words: find the words in the captions, or start all rows at random."""

PresetName = Literal["quick", "good", "patient"]
Schedule = Literal["constant", "linear", "cosine"]
LoraTargets = Literal["attention", "transformer", "all"]
FullResult = Literal["whole", "difference", "lora"]
OptimizerName = Literal["adamw", "adamw_8bit", "adafactor", "prodigy"]
Precision = Literal["auto", "fp32", "bf16", "int8"]


def limited(
    default: Any = MISSING, *, ge: float | None = None, gt: float | None = None, le: float | None = None
) -> Any:
    """A dataclass field whose value must be at least `ge`, above `gt` and at most `le`. None is always in range."""
    return field(default=default, metadata={"ge": ge, "gt": gt, "le": le})


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What a user may choose about training. The one home of these defaults, ranges and choices."""

    token_map: str = "TOK:2"
    """Tokens and their numbers of rows, such as "TOK:2"."""
    preset: PresetName = "good"
    """Decides the settings below whose default is None, and the steps: see `sdxl/training/presets.py`."""
    token_init: str = AUTO
    """Words of the base that the token rows start from, such as "TOK:dog", or `AUTO` or `NO_WORD`. Rows without a word
    start at random."""
    train_batch_size: int = limited(4, ge=1)
    """Pictures in a batch."""
    unet_learning_rate: float | None = limited(None, gt=0)
    """Learning rate of the UNet's weights in full training."""
    ti_lr: float | None = limited(None, gt=0)
    """Learning rate of the token rows."""
    is_lora: bool = True
    """Train LoRA matrices instead of the UNet itself."""
    lora_rank: int | None = limited(None, ge=1, le=1024)
    """Rank of the LoRA matrices."""
    lora_alpha: int | None = limited(None, ge=1)
    """LoRA's α: the product of the matrices is multiplied by α / rank. None: the rank, for a factor of 1."""
    use_dora: bool = False
    """Train DoRA (arXiv:2402.09353) instead of LoRA: it learns the norm of each output's weights separately from their
    direction. Slower."""
    lora_targets: LoraTargets | None = None
    """Which layers of the UNet get LoRA matrices: the projections of attention, all linear layers of the transformer
    blocks, or the convolutions too."""
    lora_lr: float | None = limited(None, ge=0)
    """Learning rate of the LoRA matrices. 0 trains the token rows alone."""
    text_encoder_lora: bool = False
    """Train LoRA matrices on both text encoders too, up to the pivot."""
    text_encoder_lr: float = limited(1e-5, gt=0)
    """Learning rate of these."""
    lr_scheduler: Schedule = "constant"
    """How all learning rates change over the run, after the warm-up."""
    lr_warmup_steps: int | None = limited(None, ge=0)
    """Steps in which the learning rates rise from 0; fewer than the steps of the run."""
    checkpointing_steps: int = limited(0, ge=0)
    """Save the fine-tune after every so many steps. 0: never."""
    save_every: int = limited(250, ge=0)
    """Save the run's state after every so many steps, and when it stops, so that it can go on. 0: never."""
    checks: int = limited(6, ge=0, le=100)
    """How often the fine-tune is checked on the way, and the best of these moments handed over. 0: the last step is."""
    keep_checked: bool = False
    """Keep the fine-tunes of all checked moments, in `checkpoints`."""
    preview_prompts: str = ""
    """What the previews show, prompts separated by |; empty: prompts made from the captions; "none": no previews."""
    single_file: bool = False
    """Write a full fine-tune also as a single-file checkpoint."""
    full_result: FullResult = "whole"
    """The form of a full fine-tune: all weights, their difference from the base rounded to a byte each, or the nearest LoRA."""
    snr_gamma: float = limited(5.0, gt=0)
    """γ of the min-SNR weighting of the loss. A large value such as 1e6 gives all timesteps the same weight."""
    noise_offset: float = limited(0.0, ge=0, le=1)
    """Strength of a second noise with one value per picture and channel. Above 0 the fine-tune can draw darker and
    brighter pictures. Source: N. Guttenberg, "Diffusion with Offset Noise" (2023)."""
    caption_dropout: float = limited(0.0, ge=0, le=1)
    """Share of pictures that are learned without their caption, like guidance's unconditional branch."""
    mask_floor: float = limited(0.2, ge=0, le=1)
    """Weight of the area outside masks in the loss. The area inside has 1."""
    mask_base_target: bool = True
    """Outside masks, learn what the base would draw instead of what the pictures show."""
    random_views: int | None = limited(None, ge=0, le=MOST_VIEWS)
    """How many random crops of each picture are learned, in addition to the whole picture. None: as many as suit the
    steps and the number of pictures."""
    horizontal_flip: bool = False
    """Learn every picture mirrored too."""
    prior_prompts: str = ""
    """Prompts, separated by |, that the fine-tune should draw as the base does."""
    prior_images: int = limited(100, ge=1)
    """How many pictures the base draws for these prompts."""
    prior_weight: float = limited(1.0, ge=0)
    """Weight of the loss on these pictures. The loss on the subject's pictures has 1."""
    preservation: float = limited(1.0, ge=0)
    """Weight of the loss that keeps what the base predicts under other captions. The subject's loss has 1; 0: off."""
    preservation_prompts: str = ""
    """Such captions, separated by |, beside the pictures' own ones without the new tokens; empty for common ones."""
    gradient_accumulation_steps: int = limited(1, ge=1)
    """Batches whose gradients are averaged in one optimizer step."""
    pivot_fraction: float = limited(0.5, ge=0, le=1)
    """Share of the steps in which the token rows train. From the pivot on, only the UNet or LoRA does."""
    optimizer: OptimizerName = "adamw"
    """Optimizer of the UNet or LoRA. Token rows always train with AdamW."""
    precision: Precision = "auto"
    """How the UNet's weights are held. In full training "auto" is fp32 if that fits, else bf16 with stochastic rounding. Beside a
    LoRA "int8" holds the frozen linear layers in 8 bits, and "auto" does so only if nothing else fits."""
    gradient_checkpointing: bool | None = None
    """On CUDA, recompute the UNet's activations in the backward pass: a third slower, much less memory. None: only if
    memory requires it."""

    shard: bool | None = None
    """In full training by several processes, share the UNet's weights, gradients and optimizer state among them. None: only if
    memory requires it."""

    def __post_init__(self) -> None:
        check_limits(self)
        TokenMap.parse(self.token_map).parse_init(words_of(self.token_init))
        for name in ("prior_prompts", "preservation_prompts"):
            if text := getattr(self, name):
                prompts_of(text, name=name)
        if (
            self.preview_prompts
            and len(prompts_of(self.preview_prompts, name="preview_prompts")) > MOST_PREVIEWS
        ):
            raise UserInputError(f"preview_prompts may have at most {MOST_PREVIEWS} prompts: give fewer.")

    @property
    def taught_at_once(self) -> int:
        """How many pictures of a batch the base teaches: a quarter of it with `preservation`."""
        return max(self.train_batch_size // 4, 1) if self.preservation else 0

    @property
    def learned_at_once(self) -> int:
        """How many pictures of a batch show the subject: the rest of it, at least one."""
        return max(self.train_batch_size - self.taught_at_once, 1)

    @property
    def at_once_without_gradients(self) -> int:
        """How many pictures a call of the UNet without gradients takes: four for each of a batch. Without activations to keep, a
        picture takes a tenth of the memory."""
        return 4 * self.train_batch_size

    @property
    def taught_in_batch(self) -> bool:
        """Whether what the base teaches has room in the subject's batch. Otherwise it is a batch of its own."""
        return self.learned_at_once + self.taught_at_once <= self.train_batch_size


def words_of(token_init: str) -> str:
    """The words that `token_init` itself names, "" for `AUTO` and `NO_WORD`."""
    return "" if token_init in (AUTO, NO_WORD) else token_init


def _complete(name: str) -> Any:
    """The field `name` of `TrainingOptions` with its limits, but without a default."""
    return field(metadata=TrainingOptions.__dataclass_fields__[name].metadata)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(TrainingOptions):
    """Everything that decides a training run. Two runs with equal configs and datasets give equal results."""

    # The inputs that a preset decides if the user does not, and the words that were found. Here they are complete.
    token_init: str = ""
    unet_learning_rate: float = _complete("unet_learning_rate")
    ti_lr: float = _complete("ti_lr")
    lora_rank: int = _complete("lora_rank")
    lora_targets: LoraTargets = field()
    lora_lr: float = _complete("lora_lr")
    lr_warmup_steps: int = _complete("lr_warmup_steps")
    base: str
    """The base's name: a folder, a hub repository or a single file, without the secrets of a URL."""
    resolution: int = limited(ge=64, le=2048)
    """Side of the training pictures in pixels; a multiple of 8."""
    max_train_steps: int = limited(ge=1)
    """Optimizer steps."""
    seed: int = limited(ge=0, le=2**32 - 1)
    """Seed of everything random in the run."""
    compile_blocks: bool = True
    """On CUDA, compile the blocks of a UNet of SDXL's size. This takes half a minute once and is kept between runs."""
    fp8: bool = False
    """On GPUs that can, multiply by the linear layers of a LoRA's frozen base in 8-bit floats."""
    cuda_graph: bool = True
    """On CUDA, capture the step as a graph and replay it. Turn it off to launch kernels one by one, for debugging."""

    def __post_init__(self) -> None:
        if self.resolution % 8 or not 64 <= self.resolution <= 2048:
            raise UserInputError(
                f"resolution is {self.resolution}, but must be a multiple of 8 from 64 to 2048, such as 1024."
            )
        super().__post_init__()
        if self.lr_warmup_steps >= self.max_train_steps:
            raise UserInputError(
                f"lr_warmup_steps is {self.lr_warmup_steps}, but must be below the {self.max_train_steps} steps of the run."
            )

    @property
    def pivot_step(self) -> int:
        """The first step (counted from 0) in which the token rows are frozen."""
        return round(self.pivot_fraction * self.max_train_steps)

    def as_json(self) -> dict[str, Any]:
        """All settings, ready for json."""
        return asdict(self)


def choices(kind: type, name: str) -> tuple[str, ...] | None:
    """The values that the field `name` of a dataclass may have if its type is a `Literal`, also an optional one, else
    None."""
    hint = get_type_hints(kind)[name]
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)


def check_limits(config: Any) -> None:
    """Check every field of a dataclass against its `limited` range and its `Literal` choices.

    Raises:
        UserInputError: a value is outside; the message names the field.
    """
    for entry in fields(config):
        value, allowed = getattr(config, entry.name), choices(type(config), entry.name)
        if value is None:
            continue
        if allowed is not None and value not in allowed:
            raise UserInputError(f"{entry.name} is {value!r}, but must be one of {', '.join(allowed)}.")
        ge, gt, le = (entry.metadata.get(limit) for limit in ("ge", "gt", "le"))
        # Written so that NaN, which compares as false with everything, is refused.
        inside = (ge is None or value >= ge) and (gt is None or value > gt) and (le is None or value <= le)
        if inside:
            continue
        example = f", such as {entry.default}" if entry.default not in (MISSING, None, 0) else ""
        if le is not None:
            raise UserInputError(f"{entry.name} is {value}, but must be from {ge} to {le}{example}.")
        wanted = f"above {gt}" if gt is not None else f"{ge} or more"
        raise UserInputError(f"{entry.name} is {value}, but must be {wanted}{example}.")


def prompts_of(text: str, *, name: str = "prior_prompts") -> tuple[str, ...]:
    """The prompts of the setting `name`, which are separated by |.

    Raises:
        UserInputError: there is no prompt in the text, or too many, or one is too long.
    """
    prompts = tuple(part.strip() for part in text.split("|") if part.strip())
    if not prompts:
        raise UserInputError(f"{name} contains no prompt: write some, such as 'a photo of a dog'.")
    if len(prompts) > MOST_PRIOR_PROMPTS:
        raise UserInputError(
            f"{name} has {len(prompts)} prompts, but may have at most {MOST_PRIOR_PROMPTS}: give fewer."
        )
    for prompt in prompts:
        require_short(prompt, f"A prompt of {name}")
    return prompts


def resolve_views(random_views: int | None, *, draws: int, images: int) -> int:
    """How many random crops of each of `images` pictures to learn in a run that draws `draws` pictures in all:
    `random_views` if given, else enough that a crop is not seen much more often than in runs that were measured. A short
    run gets none. A single picture has none either: its subject was learned better without."""
    if random_views is not None:
        return random_views
    if images == 1:
        return 0
    return min(round(draws / images / _DRAWS_OF_A_VIEW), MOST_VIEWS, _MOST_VIEWS_IN_ALL // images)
