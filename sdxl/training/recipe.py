"""The recipe: DreamBooth fine-tuning of the UNet together with pivotal-tuning textual inversion.

Read `fine_tune` from top to bottom: what trains, what a step sees, the pivot, and the step. It knows the order of
things; it does not know how a step is computed (`step.py`), files, archives or cog.

Sources: DreamBooth (arXiv:2208.12242), Textual Inversion (arXiv:2208.01618), Pivotal Tuning (arXiv:2106.05744),
LoRA (arXiv:2106.09685), SDXL (arXiv:2307.01952).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from dataset_and_utils import ExampleDataset, TokenMap
from sdxl.errors import TrainingDivergedError
from sdxl.model.components import Components
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.speed.memory import peak_gib
from sdxl.training.batches import Batches
from sdxl.training.caption_encoding import encode_captions
from sdxl.training.config import Schedule, TrainingConfig, prompts_of
from sdxl.training.data_parallel import rank, world_size
from sdxl.training.encoder_lora import with_encoder_lora
from sdxl.training.loss import DenoisingLoss
from sdxl.training.optimizers import Group, Optimizers
from sdxl.training.preservation import PROMPTS, kept_examples, learned_below, weight_for
from sdxl.training.run_state import RunState, undisturbed
from sdxl.training.starting_point import StartingPoint
from sdxl.training.states import RunStates
from sdxl.training.step import TrainingStep
from sdxl.training.teaching import taught_examples
from sdxl.training.token_rows import NewTokens
from sdxl.training.trainable import Trainable, as_base, full_unet, lora
from sdxl.training.watch import Watch


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did."""

    step: int
    """Counted from 1."""
    total: int
    """Steps of the run."""
    loss: float
    learning_rate: float
    """Of the UNet's weights or LoRA matrices."""
    ti_learning_rate: float
    """Of the token rows; 0 after the pivot."""
    steps_per_second: float
    """Over the last steps; 0 until it is known."""
    seconds: float
    """Since the first step of this process began; 0 without a progress bar."""
    memory_gib: float
    """The most GPU memory that this process has held so far; 0 on a CPU."""


def fine_tune(
    components: Components,
    dataset: ExampleDataset,
    config: TrainingConfig,
    *,
    prior: ExampleDataset | None = None,
    begin_with: StartingPoint | None = None,
    states: RunStates | None = None,
    watch: Watch | None = None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_checkpoint: Callable[[int, TrainedFineTune], None] = lambda step, model: None,
) -> TrainedFineTune:
    """Train `components` on `dataset`. Full training changes their UNet in place, and may leave it in bf16; a LoRA stays in it
    as an adapter. Only what is returned is exact.

    prior: pictures that the base drew. They are learned together with the subject's, so that the base's skills remain.
    begin_with: a fine-tune to start from. states: saves the run's state on the way, and may hold one to go on from.
    watch: checks the fine-tune on the way, and chooses the moment to hand over. Without it, that is the last one.

    Raises:
        TrainingDivergedError: the loss is not a number. `on_checkpoint` has received the weights before that step.
    """
    # One seed decides everything random: LoRA matrices by torch's global generator, all else by ours.
    generator = torch.Generator(components.device).manual_seed(config.seed)
    torch.manual_seed(config.seed)

    # What trains: the new token rows up to the pivot, the UNet's weights or LoRA matrices in every step. Processes that
    # train together start from equal weights. From then on each draws its own noise.
    outside_masks = _outside_masks(components, dataset, config)
    # The weights come before the rows, because peft freezes all that it finds in a model.
    trainable = _trainable(components, config, outside_masks)
    tokens = NewTokens(components, TokenMap.parse(config.token_map), config.token_init, generator)
    generator.manual_seed(config.seed + rank())
    states, watch, mixed = states or RunStates(), watch or Watch(), trainable.mixed_precision
    watch.begin(components, config, mixed_precision=mixed, goes_on=states.goes_on)

    # What a step sees: a batch of the subject, one of the prior, and one that the base teaches while nothing has trained.
    sources = _sources(components, dataset, prior, config, mixed_precision=mixed)
    below = learned_below(config.preservation, pictures=dataset.pictures)
    loss = DenoisingLoss(components, config, generator, outside_masks, below)
    if begin_with is not None:
        begin_with.apply(components.unet, tokens)
    weights, encoders = trainable.weights, trainable.encoders
    rows, device = Group(params=tokens.parameters, lr=config.ti_lr), components.device
    optimizers = Optimizers(trainable.optimizer, weights=weights, rows=rows, encoders=encoders, device=device)
    step = TrainingStep(loss, sources, optimizers, tokens, config, generator, mixed_precision=mixed)

    # A state is all that has changed since here. A run that goes on from one starts after its step.
    snapshot = partial(_snapshot, trainable, tokens)
    done = watch.caught_up(states.begin(RunState(optimizers, sources, generator, watch)), snapshot)
    progress = _progress(done, config.max_train_steps)
    for number in progress:
        # The pivot: the rows now describe the subject. Freeze all that reads the text, so that captions need encoding only
        # once and the text encoders can leave the GPU. The UNet goes on learning what the rows cannot say.
        if optimizers.rows_train and number >= config.pivot_step:
            progress.set_description("Training UNet")
            encode_captions(components, sources, also_as_base=loss.base_reads_apart)
            for part in (watch, step, tokens, optimizers, components):
                part.freeze_text()

        # A single training step.
        share = _rate_share(config, number)
        optimizers.set_rates(weights=weights.lr * share, rows=rows.lr * share, encoders=encoders.lr * share)
        value, norms = step.gradients(tuple(batches.draw() for batches in sources))
        if not all(map(math.isfinite, (value, *norms))):  # stop before broken gradients reach the weights
            on_checkpoint(number, snapshot())
            raise _diverged(number + 1, value)
        with states.completing(number + 1):  # until its end the weights are between two steps
            step.update()

        with undisturbed(components.device):  # whatever they draw
            of_rows = rows.lr * share * optimizers.rows_train
            on_step(_report(progress, number + 1, value, weights.lr * share, of_rows))
            if config.checkpointing_steps and (number + 1) % config.checkpointing_steps == 0:
                on_checkpoint(number + 1, snapshot())
            if watch.stops_after(number + 1, snapshot):
                break

    tokens.remove()
    return watch.chosen(snapshot(), trainable.lent)


def learning_rate_share(schedule: Schedule, step: int, *, warmup: int, total: int) -> float:
    """The factor, 0 to 1, of all learning rates in `step` (from 0) of `total` steps.

    It rises linearly over `warmup` steps. Then it is constant, or falls to 0 linearly or along half a cosine.
    """
    if step < warmup:
        return step / warmup
    done = (step - warmup) / (total - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]


def _trainable(
    components: Components, config: TrainingConfig, outside_masks: Callable[..., Any] | None
) -> Trainable:
    """What trains beside the token rows."""
    if not config.is_lora:
        return full_unet(components.unet, config, outside_masks, components.device)
    trainable = lora(components.unet, config, components.device)
    return with_encoder_lora(trainable, components, config) if config.text_encoder_lora else trainable


def _rate_share(config: TrainingConfig, step: int) -> float:
    return learning_rate_share(
        config.lr_scheduler, step, warmup=config.lr_warmup_steps, total=config.max_train_steps
    )


def _sources(
    components: Components,
    dataset: ExampleDataset,
    prior: ExampleDataset | None,
    config: TrainingConfig,
    *,
    mixed_precision: bool,
) -> list[Batches]:
    """The batches of a step: the subject's first, then those of captions without new tokens. These are encoded here, unless
    the text encoders are still to change.

    Of these, the prior's pictures are learned like the subject's. With `preservation` the base teaches a part of the batch:
    the subject's pictures under other captions. What it says of them is computed here too, so nothing may have trained yet.
    """

    def batches(examples: ExampleDataset, number: int, size: int, weight: float) -> Batches:
        return Batches(
            examples,
            size,
            micro_batches=config.gradient_accumulation_steps,
            seed=config.seed + number * world_size() + rank(),
            weight=weight,
        )

    sources = [batches(dataset, 0, config.learned_at_once, 1.0)]
    if prior is not None:
        sources.append(batches(prior, 1, config.train_batch_size, config.prior_weight))
    if config.preservation:
        named = config.preservation_prompts
        prompts = prompts_of(named, name="preservation_prompts") if named else PROMPTS
        token_map = TokenMap.parse(config.token_map)
        kept = kept_examples(dataset, components, token_map, token_init=config.token_init, prompts=prompts)
        # Nothing has trained yet, so a full UNet is the base. With a LoRA, the UNet is the base while its adapter is off.
        base_unet = as_base(components.unet, config) if config.is_lora else components.unet
        taught = taught_examples(kept, components, base_unet, config, mixed_precision=mixed_precision)
        weight = weight_for(config.preservation, pictures=dataset.pictures)
        sources.append(batches(taught, 2, config.taught_at_once, weight))
    if not config.text_encoder_lora:
        encode_captions(components, sources[1:])
    return sources


def _outside_masks(
    components: Components, dataset: ExampleDataset, config: TrainingConfig
) -> Callable[..., Any] | None:
    """The base's UNet if it is to teach outside masks, and any leaves something out."""
    if not config.mask_base_target or not any(bool((one.mask < 1).any()) for one in dataset.examples):
        return None
    return as_base(components.unet, config, components.device)


def _snapshot(trainable: Trainable, tokens: NewTokens) -> TrainedFineTune:
    """Copies of everything that trains, on the CPU."""
    return TrainedFineTune(
        kind=trainable.kind, weights=trainable.export(), token_rows=tokens.export(), token_map=tokens.map
    )


def _progress(done: int, total: int) -> tqdm:
    """The numbers of the steps, from 0, that are left of `total` after `done`, with a progress bar."""
    steps = range(done, total)
    return tqdm(
        steps, desc="Training tokens and UNet", unit="step", mininterval=0.5, initial=done, total=total
    )


def _report(progress: tqdm, step: int, loss: float, rate: float, ti_rate: float) -> StepReport:
    progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
    shown = progress.format_dict
    return StepReport(
        step=step,
        total=progress.total,
        loss=loss,
        learning_rate=rate,
        ti_learning_rate=ti_rate,
        steps_per_second=shown["rate"] or 0.0,
        seconds=shown["elapsed"],
        memory_gib=peak_gib(),
    )


def _diverged(step: int, loss: float) -> TrainingDivergedError:
    return TrainingDivergedError(
        f"The loss became {loss} in step {step}: lower the learning rates, or look for broken pictures; the weights from "
        "before that step are kept."
    )
