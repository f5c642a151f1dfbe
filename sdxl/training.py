"""The recipe: DreamBooth fine-tuning of the UNet together with pivotal-tuning textual inversion.

Read it top to bottom: what trains, when the pivot is, and the step. It knows tensors and modules; it does not know
files, archives or cog.

Sources: DreamBooth (arXiv:2208.12242), Textual Inversion (arXiv:2208.01618), Pivotal Tuning (arXiv:2106.05744),
LoRA (arXiv:2106.09685), SDXL (arXiv:2307.01952).
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from tqdm import tqdm

from dataset_and_utils import Example, ExampleDataset, TokenMap
from sdxl import token_rows
from sdxl.components import Components, add_placeholder_tokens
from sdxl.config import TrainingConfig
from sdxl.diffusion import encode_prompt, masked_mse, min_snr_weights, sample_timesteps, training_target
from sdxl.errors import TrainingDivergedError
from sdxl.token_rows import TokenRows

log = logging.getLogger(__name__)

_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
_FEED_FORWARD = ["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
_CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
LORA_TARGETS = {
    "attention": _ATTENTION,
    "transformer": _ATTENTION + _FEED_FORWARD,
    "all": _ATTENTION + _FEED_FORWARD + _CONVOLUTIONS,
}
"""Public name → ends of the names of the UNet's layers that get LoRA matrices."""
WEIGHT_DECAY = 1e-4
"""AdamW's decay of LoRA matrices; full weights and token rows have none, since 0 is not where they started."""
MAX_GRAD_NORM = 1.0
"""Gradients are clipped to this norm, token rows and UNet weights apart: one must not scale the other's step."""

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
"""Our names → diffusers': its plain "constant" knows no warm-up."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What a training gives: tensors on the CPU, in the dtypes in which they are stored."""

    kind: str
    """"unet" or "lora"."""
    weights: dict[str, Tensor]
    """UNet parameter name → tensor, or `unet.….lora_A.weight` and `…lora_B.weight` → tensor."""
    token_rows: list[Tensor]
    """[tokens, dim] for each text encoder."""
    token_map: TokenMap


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


@dataclass(frozen=True, kw_only=True)
class _Trainable:
    """The weights of the UNet that train, and how they are handed on."""

    parameters: list[nn.Parameter]
    learning_rate: float
    weight_decay: float
    export: Callable[[], dict[str, Tensor]]


def fine_tune(
    components: Components,
    dataset: ExampleDataset,
    config: TrainingConfig,
    *,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_checkpoint: Callable[[int, TrainedModel], None] = lambda step, model: None,
) -> TrainedModel:
    """Train `components` on `dataset`; the components' UNet is changed in place (full mode) or carries an adapter.

    Raises:
        TrainingDivergedError: the loss is not a number.
    """
    device = components.device
    generator = torch.Generator(device).manual_seed(config.seed)
    torch.manual_seed(config.seed)  # peft initialises LoRA matrices from the global generator

    # What trains: the UNet's weights or LoRA matrices all along, the new token rows up to the pivot.
    token_map = TokenMap.parse(config.token_map)
    rows = _install_rows(components, token_map, token_map.parse_init(config.token_init), generator)
    trainable = _lora(components, config) if config.is_lora else _full(components, config)
    optimizer = _optimizer(trainable, rows, config, device)
    schedule = get_scheduler(
        _SCHEDULES[config.lr_scheduler],
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )

    def snapshot() -> TrainedModel:
        return TrainedModel(
            kind="lora" if config.is_lora else "unet",
            weights=trainable.export(),
            token_rows=[row.rows.detach().cpu().clone() for row in rows],
            token_map=token_map,
        )

    prompts: tuple[Tensor, Tensor] | None = None  # of every example, once the rows are frozen
    batches = _batches(len(dataset), config.train_batch_size, generator)
    progress = tqdm(
        range(config.max_train_steps), desc="Training tokens and UNet", unit="step", mininterval=0.5
    )
    for step in progress:
        if step == config.pivot_step:
            progress.set_description("Training UNet")
            prompts = _freeze_rows(components, dataset, rows)

        # -------------------------------------------------------------------------------------- a single training step
        chosen = next(batches)
        batch = dataset.collate(chosen.tolist())
        with _precision(device):
            if prompts is None:
                hidden, pooled = encode_prompt(components.text_encoders, batch.token_ids)
            else:
                hidden, pooled = (encoded[chosen] for encoded in prompts)
            loss = _loss(components, batch, hidden, pooled, generator, config.snr_gamma)
        loss.backward()
        for group in (
            optimizer.param_groups
        ):  # each by itself: token rows must not scale the UNet's step, or it theirs
            nn.utils.clip_grad_norm_(group["params"], MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        learning_rates = schedule.get_last_lr()
        schedule.step()
        if prompts is None:
            for row in rows:
                row.pull_to_scale()
        # ------------------------------------------------------------------------------------------------------------

        value = loss.item()
        if not math.isfinite(value):
            raise TrainingDivergedError(
                f"The loss became {value} in step {step + 1}: lower the learning rates, or look for broken pictures."
            )
        progress.set_postfix(loss=f"{value:.4f}", refresh=False)
        ti_rate = float(learning_rates[1]) if prompts is None else 0.0
        on_step(
            StepReport(
                step=step + 1,
                total=config.max_train_steps,
                loss=value,
                learning_rate=float(learning_rates[0]),
                ti_learning_rate=ti_rate,
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
    hidden: Tensor,
    pooled: Tensor,
    generator: torch.Generator,
    snr_gamma: float,
) -> Tensor:
    """The denoising loss of `batch` under its text conditioning [b, t, d] and [b, d], at random noise and times."""
    scheduler = components.noise_scheduler
    noise = torch.randn(batch.latents.shape, generator=generator, device=components.device)
    timesteps = sample_timesteps(scheduler, len(batch.latents), generator)
    noisy = scheduler.add_noise(batch.latents, noise, timesteps)  # type: ignore[arg-type]
    prediction = components.unet(
        noisy,
        timesteps,
        encoder_hidden_states=hidden,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": batch.time_ids},
    ).sample
    target = training_target(scheduler, batch.latents, noise, timesteps)
    weights = min_snr_weights(scheduler, timesteps, snr_gamma)
    return masked_mse(prediction, target, batch.mask, weights)


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


def _freeze_rows(
    components: Components, dataset: ExampleDataset, rows: list[TokenRows]
) -> tuple[Tensor, Tensor]:
    """The pivot: stop training the rows, encode every caption once, and move the text encoders off the device.

    Returns the text conditioning of every example: [n, t, d] and [n, d].
    """
    for row in rows:
        row.rows.requires_grad_(False).grad = None
    with _precision(components.device), torch.no_grad():
        encoded = [
            encode_prompt(components.text_encoders, dataset.collate([index]).token_ids)
            for index in range(len(dataset))
        ]
    for encoder in components.text_encoders:
        encoder.to(torch.device("cpu"))  # type: ignore[arg-type]
    return torch.cat([hidden for hidden, _ in encoded]), torch.cat([pooled for _, pooled in encoded])


def _optimizer(
    trainable: _Trainable, rows: list[TokenRows], config: TrainingConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) over two groups: the UNet's weights, then the token rows."""
    return torch.optim.AdamW(
        [
            {
                "params": trainable.parameters,
                "lr": trainable.learning_rate,
                "weight_decay": trainable.weight_decay,
            },
            {"params": [row.rows for row in rows], "lr": config.ti_lr, "weight_decay": 0.0},
        ],
        fused=device.type == "cuda",
    )


def _full(components: Components, config: TrainingConfig) -> _Trainable:
    """Every parameter of the UNet, stored in half precision as inference uses it."""
    unet = components.unet.requires_grad_(True).train()
    if config.gradient_checkpointing and components.device.type == "cuda":
        unet.enable_gradient_checkpointing()

    def export() -> dict[str, Tensor]:
        return {
            name: value.detach().to("cpu", torch.float16).contiguous()
            for name, value in unet.state_dict().items()
        }

    return _Trainable(
        parameters=list(unet.parameters()),
        learning_rate=config.unet_learning_rate,
        weight_decay=0.0,
        export=export,
    )


def _lora(components: Components, config: TrainingConfig) -> _Trainable:
    """LoRA matrices on the layers of `lora_targets`, trained in fp32 beside the frozen UNet, stored as diffusers reads
    them."""
    unet = components.unet
    unet.add_adapter(
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_rank,
            init_lora_weights="gaussian",
            target_modules=LORA_TARGETS[config.lora_targets],
        )
    )
    cast_training_params(unet, dtype=torch.float32)
    unet.train()
    if config.gradient_checkpointing and components.device.type == "cuda":
        unet.enable_gradient_checkpointing()

    def export() -> dict[str, Tensor]:
        state = get_peft_model_state_dict(unet)  # diffusers reads these names for every kind of layer alike
        return {f"unet.{name}": value.detach().float().cpu().clone() for name, value in state.items()}

    return _Trainable(
        parameters=[parameter for parameter in unet.parameters() if parameter.requires_grad],
        learning_rate=config.lora_lr,
        weight_decay=WEIGHT_DECAY,
        export=export,
    )


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices [size] into `count` examples without end: shuffled passes one after another, cut into batches."""
    queue = torch.empty(0, dtype=torch.long, device=generator.device)
    while True:
        while len(queue) < size:
            queue = torch.cat([queue, torch.randperm(count, generator=generator, device=generator.device)])
        yield queue[:size]
        queue = queue[size:]


def _precision(device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 autocast on CUDA; plain fp32 on a CPU, whose bf16 is slower."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
