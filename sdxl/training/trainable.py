"""What trains of the UNet: all of it, or LoRA matrices that are added to it; and how both are exported.

Knows the UNet's parameters and how they are prepared for training; does not know losses, text or files.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sdxl.gpu import training_half
from sdxl.speed.compiled_blocks import compile_blocks, fuse_blocks
from sdxl.speed.fp8_products import multiply_in_fp8
from sdxl.speed.int8_weights import hold_in_int8
from sdxl.speed.lean_lora import make_lean
from sdxl.speed.triton_here import triton_runs
from sdxl.training.config import TrainingConfig
from sdxl.training.data_parallel import rank
from sdxl.training.full_memory import plan_for, takes_copies
from sdxl.training.half_copies import HalfCopies, exact
from sdxl.training.lora_memory import in_fp8, in_int8, recomputes
from sdxl.training.optimizers import Group
from sdxl.training.sharding import share, whole

log = logging.getLogger(__name__)

_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
_FEED_FORWARD = ["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
_CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
LORA_TARGETS = {
    "attention": _ATTENTION,
    "transformer": _ATTENTION + _FEED_FORWARD,
    "all": _ATTENTION + _FEED_FORWARD + _CONVOLUTIONS,
}
"""Public name → how the names of the layers that get LoRA matrices end."""
_WORTH_COMPILING = 1e8
"""A UNet with more weights than this saves more time in a run than the half minute that compiling takes."""
LORA_WEIGHT_DECAY = 1e-4
"""Decay of LoRA matrices, which start near 0. The full UNet has none: decay would pull it to 0, away from the base."""


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """The weights of the UNet that train, and how they are exported."""

    kind: str
    """"unet" or "lora"."""
    weights: Group
    optimizer: str
    """A key of `OPTIMIZERS`."""
    mixed_precision: bool
    """Whether, on CUDA, layers compute in bf16 although their weights or inputs have another dtype."""
    encoders: Group = field(default_factory=lambda: Group(params=[], lr=0.0))
    """The LoRA matrices of the text encoders, if they train."""
    export: Callable[[], dict[str, Tensor]]
    """The current weights: tensors on the CPU, with the names and dtypes in which they are stored."""
    lent: Callable[[Mapping[str, Tensor]], AbstractContextManager[None]] | None = None
    """While the context lasts, the UNet has other exported weights; afterwards its own, to the last bit. None: that would cost
    too much."""


def full_unet(
    unet: UNet2DConditionModel,
    config: TrainingConfig,
    base_unet: Callable[..., Any] | None = None,
    device: torch.device | None = None,
) -> Trainable:
    """Every parameter of the UNet, exported in half precision as inference uses it.

    Several processes share the UNet if memory requires it or `shard` says so, and `base_unet`, the teacher, with it. Only the
    first of them then gets what is exported.

    device: where to train; by default where the UNet is.

    Raises:
        NotEnoughMemoryError: the weights fit on the device neither in fp32 nor in bf16.
        UserInputError: `shard` asks for what cannot be shared.
    """
    teacher = base_unet if isinstance(base_unet, UNet2DConditionModel) else None
    device = device or unet.device
    plan = plan_for(unet, config, teacher, device)
    if device.type == "cuda" or plan.shared_by > 1:
        log.log(logging.WARNING if plan.tight else logging.INFO, plan.reason)
    unet.requires_grad_(True)
    plan.apply(unet)
    unet.to(device)  # type: ignore[arg-type]
    _prepare(unet, config, checkpointing=plan.checkpointing)
    shards = copies = None
    if takes_copies(plan, config, device):
        copies = HalfCopies(unet)
    if plan.shared_by > 1:
        shards = share(unet)
        if teacher is not None:
            share(teacher)

    def export() -> dict[str, Tensor]:
        found = {}
        for name, value in unet.named_parameters():
            complete = whole(exact(value).detach())  # by all processes together
            if shards is None or rank() == 0:
                found[name] = complete.to("cpu", torch.float16).contiguous()
        return found

    special = shards or copies
    params = list(unet.parameters()) if special is None else special.parameters
    return Trainable(
        kind="unet",
        weights=Group(
            params=params,
            lr=config.unet_learning_rate,
            shards=shards,
            copies=copies,
            state_on_host=plan.state_on_host,
        ),
        optimizer=plan.optimizer,
        mixed_precision=True,
        export=export,
    )


def lora(unet: UNet2DConditionModel, config: TrainingConfig, device: torch.device | None = None) -> Trainable:
    """LoRA matrices (arXiv:2106.09685), or DoRA's (arXiv:2402.09353), on the layers of `lora_targets`.

    They train in fp32 while the UNet stays frozen, and are exported as diffusers reads them. torch's global generator
    draws their initial values.

    device: where to train; by default where the UNet is.
    """
    device = device or unet.device
    if in_int8(unet, config, device):
        log.info("The base's linear layers are held in 8 bits: half the memory, and slightly less exact.")
        hold_in_int8(unet)
    elif in_fp8(unet, config, device):
        log.info("Products with the base's linear layers are in fp8.")
        multiply_in_fp8(unet)
    unet.to(device)  # type: ignore[arg-type]
    add_lora(unet, config, LORA_TARGETS[config.lora_targets])
    _prepare(unet, config, checkpointing=recomputes(unet, config))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    return Trainable(
        kind="lora",
        weights=Group(params=parameters, lr=config.lora_lr, weight_decay=LORA_WEIGHT_DECAY),
        optimizer=config.optimizer,
        mixed_precision=config.use_dora,  # our own LoRA layers mix precisions themselves; peft's DoRA needs autocast
        export=lambda: exported_lora(unet, "unet", config),
        lent=partial(_lent_lora, unet, parameters, config),
    )


def add_lora(model: Any, config: TrainingConfig, targets: list[str], **which: Any) -> None:
    """Add fp32 matrices to the layers of `model` whose names end in one of `targets`.

    which: further settings of peft's configuration.
    """
    with model.device:  # otherwise peft makes every matrix on the CPU and moves it
        model.add_adapter(
            LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha or config.lora_rank,
                use_dora=config.use_dora,
                init_lora_weights="gaussian",
                target_modules=targets,
                **which,
            )
        )
    cast_training_params(model, dtype=torch.float32)  # in half precision small updates would vanish
    if not config.use_dora:
        make_lean(model)


def exported_lora(model: Any, part: str, config: TrainingConfig) -> dict[str, Tensor]:
    """The matrices of `model`, which is the `part` "unet" or a text encoder, on the CPU in fp32."""
    # With these names diffusers reads every kind of layer. It assumes that alpha equals the rank, so multiply the second
    # matrices by alpha / rank.
    scale = _alpha_by_rank(config)
    # peft would ask the hub whether the vocabulary has grown. The token rows are exported on their own.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {
        f"{part}.{name}": value.detach().float().mul(scale if "lora_B" in name else 1.0).cpu().contiguous()
        for name, value in state.items()
    }


def _alpha_by_rank(config: TrainingConfig) -> float:
    return (config.lora_alpha or config.lora_rank) / config.lora_rank


@contextmanager
def _lent_lora(
    unet: UNet2DConditionModel, parameters: list[Any], config: TrainingConfig, weights: Mapping[str, Tensor]
) -> Iterator[None]:
    """While the context lasts, the `parameters` of the UNet's LoRA are `weights`, as `exported_lora` made them."""
    own = [parameter.detach().clone() for parameter in parameters]
    state = {
        name.removeprefix("unet."): value / _alpha_by_rank(config) if "lora_B" in name else value
        for name, value in weights.items()
        if name.startswith("unet.")
    }
    try:
        set_peft_model_state_dict(unet, state)
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, own, strict=True):
                parameter.copy_(before)


def as_base(
    unet: UNet2DConditionModel, config: TrainingConfig, device: torch.device | None = None
) -> Callable[..., Any]:
    """The UNet as it is before it trains, to be called like it.

    For LoRA it is the same UNet with its adapter turned off. Otherwise it is a copy, on CUDA in half precision.

    device: where it is called; by default where the UNet is.
    """
    device = device or unet.device
    if not config.is_lora:
        half = training_half(device) if device.type == "cuda" else unet.dtype
        with torch.device("meta"):
            copy = UNet2DConditionModel.from_config(unet.config)
        assert isinstance(copy, UNet2DConditionModel)
        # Cast each tensor while it is copied: a second UNet in fp32 might not fit.
        weights = {name: value.to(device, half, copy=True) for name, value in unet.state_dict().items()}
        copy.load_state_dict(weights, assign=True)
        if config.cuda_graph:
            fuse_blocks(copy)
        return copy.requires_grad_(False)

    def without_adapter(*args: Any, **kwargs: Any) -> Any:
        unet.disable_adapters()
        try:
            return unet(*args, **kwargs)
        finally:
            unet.enable_adapters()

    return without_adapter


def _prepare(unet: UNet2DConditionModel, config: TrainingConfig, *, checkpointing: bool) -> None:
    """Put the UNet into training mode and make it fast on CUDA."""
    unet.train()
    if unet.device.type != "cuda":
        return
    if checkpointing:
        # Nothing in SDXL's UNet is random, and saving the state of random generators would wait for the GPU.
        unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    log.info("Activations are %s.", "recomputed in the backward pass" if checkpointing else "kept in memory")
    if config.cuda_graph:
        fuse_blocks(unet)
    large = sum(parameter.numel() for parameter in unet.parameters()) > _WORTH_COMPILING
    if config.compile_blocks and large and triton_runs():
        compile_blocks(unet, fullgraph=not config.use_dora)  # peft's DoRA cannot be traced as one graph
