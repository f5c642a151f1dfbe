"""The recipe: DreamBooth fine-tuning of the UNet together with pivotal-tuning textual inversion.

Read it top to bottom: what trains, when the pivot is, and the step. It knows tensors and modules; it does not know
files, archives or cog.

Sources: DreamBooth (arXiv:2208.12242), Textual Inversion (arXiv:2208.01618), Pivotal Tuning (arXiv:2106.05744),
LoRA (arXiv:2106.09685), SDXL (arXiv:2307.01952).
"""

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataset_and_utils import Example, ExampleDataset, TokenMap
from sdxl.errors import TrainingDivergedError
from sdxl.model.components import Components, add_placeholder_tokens
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.speed.cuda_graphs import GraphedWork
from sdxl.training import token_rows
from sdxl.training.batches import Batches
from sdxl.training.config import Schedule, TrainingConfig
from sdxl.training.data_parallel import average, rank, world_size
from sdxl.training.diffusion import (
    drop_prompts,
    encode_prompt,
    masked_mse,
    min_snr_weights,
    sample_noise,
    sample_timesteps,
    training_target,
)
from sdxl.training.optimizers import CAPTURABLE, Group, make_optimizers
from sdxl.training.token_rows import TokenRows
from sdxl.training.trainable import as_base, full_unet, lora

log = logging.getLogger(__name__)

MAX_GRAD_NORM = 1.0
"""Gradients are clipped to this norm, token rows and UNet weights apart: one must not scale the other's step."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did."""

    step: int
    """Counted from 1."""
    total: int
    loss: float
    learning_rate: float
    """Of the UNet's weights or LoRA matrices."""
    ti_learning_rate: float
    """Of the token rows; 0 after the pivot."""
    steps_per_second: float
    """Of late; 0 before it is known."""


def fine_tune(  # noqa: PLR0915 - the recipe is one text
    components: Components,
    dataset: ExampleDataset,
    config: TrainingConfig,
    *,
    prior: ExampleDataset | None = None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_checkpoint: Callable[[int, TrainedFineTune], None] = lambda step, model: None,
) -> TrainedFineTune:
    """Train `components` on `dataset`; the components' UNet is changed in place (full mode) or carries an adapter.

    prior: pictures of what the base should go on drawing as it does, learnt beside the subject's.

    Raises:
        TrainingDivergedError: the loss is not a number; `on_checkpoint` has got the weights before that step.
    """
    device = components.device
    generator = torch.Generator(device).manual_seed(config.seed)
    torch.manual_seed(config.seed)  # peft initialises LoRA matrices from the global generator

    # What trains: the UNet's weights or LoRA matrices all along, the new token rows up to the pivot.
    base_unet = as_base(components.unet, config) if _teaches_outside_masks(dataset, config) else None
    token_map = TokenMap.parse(config.token_map)
    rows = _install_rows(components, token_map, token_map.parse_init(config.token_init), generator)
    generator.manual_seed(config.seed + rank())  # from here on processes that train together differ
    trainable = (lora if config.is_lora else full_unet)(components.unet, config)
    optimizers = make_optimizers(
        trainable.optimizer,
        Group(params=trainable.parameters, lr=trainable.learning_rate, weight_decay=trainable.weight_decay),
        Group(params=[row.rows for row in rows], lr=config.ti_lr),
        device=device,
    )
    full_rates = [float(group["lr"]) for group in _groups(optimizers)]

    # What a step sees: pictures of one shape, and of the prior.
    micro_batches = config.gradient_accumulation_steps
    subject = Batches(
        dataset, config.train_batch_size, micro_batches=micro_batches, seed=config.seed + rank()
    )
    sources = [(subject, 1.0)]
    if prior is not None:
        kept = Batches(
            prior,
            config.train_batch_size,
            micro_batches=micro_batches,
            seed=config.seed + world_size() + rank(),
        )
        sources.append((kept, config.prior_weight))
        _fix_prompts(components, kept)
    graphed = GraphedWork(device, generator, enabled=config.cuda_graph)
    one_graph = all(len(batches.buckets) == 1 for batches, _ in sources)
    rows_train = True

    def gradients(drawn: tuple[int, ...]) -> Tensor:
        """Forward, loss, backward and clipping of the drawn buckets; returns the loss and the gradients' norms."""
        if not one_graph:
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=False)  # all captured steps add to the same gradients
        total = torch.zeros((), device=device)
        for (batches, weight), number in zip(sources, drawn, strict=True):
            for batch, prompts in batches.buckets[number].micro_batches():
                with _autocast(device, trainable.autocast):
                    loss = _loss(components, batch, prompts, generator, config, base_unet)
                    loss = loss * (weight / micro_batches)
                loss.backward()
                total += loss.detach()
        found = [p.grad for group in _groups(optimizers) for p in group["params"] if p.grad is not None]
        average([*found, total])  # the loss too: all processes must stop where one of them must
        # Each group by itself: token rows must not scale the UNet's step, or it theirs.
        norms = [nn.utils.clip_grad_norm_(group["params"], MAX_GRAD_NORM) for group in _groups(optimizers)]
        return torch.stack([total, *norms])

    def update() -> Tensor:
        for optimizer in optimizers:
            optimizer.step()
        if rows_train:
            for row in rows:
                row.pull_to_scale()
        return rows[0].rows

    def snapshot() -> TrainedFineTune:
        return TrainedFineTune(
            kind=trainable.kind,
            weights=trainable.export(),
            token_rows=[row.rows.detach().cpu().clone() for row in rows],
            token_map=token_map,
        )

    progress = tqdm(
        range(config.max_train_steps), desc="Training tokens and UNet", unit="step", mininterval=0.5
    )
    for step in progress:
        if step == config.pivot_step:
            progress.set_description("Training UNet")
            rows_train = False
            graphed.forget()
            _freeze_rows(components, subject, rows)
            optimizers[-1].param_groups.pop()

        # -------------------------------------------------------------------------------------- a single training step
        share = learning_rate_share(
            config.lr_scheduler, step, warmup=config.lr_warmup_steps, total=config.max_train_steps
        )
        learning_rates = [rate * share for rate in full_rates]
        _set_rates(optimizers, learning_rates)
        drawn = tuple(batches.draw() for batches, _ in sources)
        if one_graph and not graphed.holds(drawn):
            for optimizer in optimizers:
                optimizer.zero_grad()  # made anew by every step, and by a captured one at the same place
        loss, *norms = graphed(drawn, lambda drawn=drawn: gradients(drawn)).tolist()
        if not all(map(math.isfinite, (loss, *norms))):
            on_checkpoint(step, snapshot())
            raise TrainingDivergedError(
                f"The loss became {loss} in step {step + 1}: lower the learning rates, or look for broken pictures; "
                "the weights from before that step are kept."
            )
        graphed("update", update) if trainable.optimizer in CAPTURABLE else update()
        # ------------------------------------------------------------------------------------------------------------

        progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        on_step(
            StepReport(
                step=step + 1,
                total=config.max_train_steps,
                loss=loss,
                learning_rate=learning_rates[0],
                ti_learning_rate=learning_rates[1] if rows_train else 0.0,
                steps_per_second=progress.format_dict["rate"] or 0.0,
            )
        )
        if config.checkpointing_steps and (step + 1) % config.checkpointing_steps == 0:
            on_checkpoint(step + 1, snapshot())
    for encoder, row in zip(components.text_encoders, rows, strict=True):
        token_rows.remove(encoder, row)
    return snapshot()


def _loss(
    components: Components,
    batch: Example,
    prompts: tuple[Tensor, Tensor] | None,
    generator: torch.Generator,
    config: TrainingConfig,
    base_unet: Callable[..., Any] | None,
) -> Tensor:
    """The denoising loss of `batch` at random noise and times; its captions are encoded unless `prompts` are given."""
    scheduler = components.noise_scheduler
    hidden, pooled = prompts or encode_prompt(components.text_encoders, batch.token_ids)
    hidden, pooled = drop_prompts(hidden, pooled, config.caption_dropout, generator)
    noise = sample_noise(batch.latents.shape, config.noise_offset, generator)
    timesteps = sample_timesteps(scheduler, len(batch.latents), generator)
    noisy = scheduler.add_noise(batch.latents, noise, timesteps)  # type: ignore[arg-type]
    noisy, hidden, pooled = (value.to(components.unet.dtype) for value in (noisy, hidden, pooled))
    if prompts is not None and hidden.is_cuda:
        hidden = hidden.detach().requires_grad_()  # as before the pivot: else blocks would be compiled anew
    condition = {
        "encoder_hidden_states": hidden,
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": batch.time_ids},
    }
    target = training_target(scheduler, batch.latents, noise, timesteps)
    if base_unet is not None:
        with torch.no_grad():
            as_the_base_draws = base_unet(noisy, timesteps, **condition).sample.to(target.dtype)
        target = torch.lerp(as_the_base_draws, target, batch.mask)
    prediction = components.unet(noisy, timesteps, **condition).sample
    weights = min_snr_weights(scheduler, timesteps, config.snr_gamma)
    return masked_mse(prediction, target, batch.mask, weights, config.mask_floor)


def _teaches_outside_masks(dataset: ExampleDataset, config: TrainingConfig) -> bool:
    """Whether any picture leaves something to the base."""
    return config.mask_base_target and any(bool((e.mask < 1).any()) for e in dataset.examples)


def learning_rate_share(schedule: Schedule, step: int, *, warmup: int, total: int) -> float:
    """The factor, 0 to 1, of all learning rates in `step` (from 0) of `total`: a linear rise over `warmup` steps, then
    constant, or falling to 0 along a line or half a cosine."""
    if step < warmup:
        return step / warmup
    gone = (step - warmup) / (total - warmup)
    return {"constant": 1.0, "linear": 1 - gone, "cosine": 0.5 * (1 + math.cos(math.pi * gone))}[schedule]


def _install_rows(
    components: Components, token_map: TokenMap, init: Mapping[str, str], generator: torch.Generator
) -> list[TokenRows]:
    """New trainable rows for the map's tokens in both text encoders; `init` names known words they start from."""
    ids = add_placeholder_tokens(components, token_map)
    rows = []
    for encoder, tokenizer, new in zip(components.text_encoders, components.tokenizers, ids, strict=True):
        words = {
            new[token_map.new_tokens.index(token)]: tokenizer(word, add_special_tokens=False).input_ids
            for token, word in init.items()
        }
        rows.append(token_rows.install(encoder, new, generator, words))
    return rows


def _freeze_rows(components: Components, subject: Batches, rows: list[TokenRows]) -> None:
    """The pivot: stop training the rows, encode every caption once, and move the text encoders off the device."""
    for row in rows:
        row.rows.requires_grad_(False).grad = None
    _fix_prompts(components, subject)
    for encoder in components.text_encoders:
        encoder.to(torch.device("cpu"))  # type: ignore[arg-type]


@torch.no_grad()
def _fix_prompts(components: Components, batches: Batches) -> None:
    """Encode every caption of the examples once, one by one: all views of a picture share theirs."""
    for bucket in batches.buckets:
        distinct, which = torch.cat(bucket.examples.token_ids, 1).unique(dim=0, return_inverse=True)
        with _autocast(components.device, True):
            encoded = [
                encode_prompt(components.text_encoders, (first, second))
                for first, second in (row.chunk(2, 1) for row in distinct.split(1))
            ]
        hidden, pooled = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        bucket.prompts = hidden[which], pooled[which]


def _groups(optimizers: list[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """All groups of parameters: the UNet's weights first, then the token rows while they train."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def _set_rates(optimizers: list[torch.optim.Optimizer], rates: list[float]) -> None:
    for group, rate in zip(
        _groups(optimizers), rates, strict=False
    ):  # the rows' group is gone after the pivot
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # where a captured step reads it
        else:
            group["lr"] = rate


def _autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager:
    """bf16 autocast on CUDA, without its cache, which would keep a bf16 copy of all fp32 weights. None on a CPU, whose
    bf16 is slower, and where all weights are multiplied as they are held."""
    if device.type != "cuda" or not enabled:
        return contextlib.nullcontext()
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
