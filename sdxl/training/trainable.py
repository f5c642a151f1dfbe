"""What trains of the UNet: all of it, or LoRA matrices beside it; and how either is handed on.

Knows parameters; does not know losses, text or files.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdxl.speed.compiled_blocks import compile_blocks, fuse_blocks
from sdxl.speed.lean_lora import make_lean
from sdxl.speed.memory import free_bytes
from sdxl.training.config import TrainingConfig
from sdxl.training.precision import WeightPrecision, activation_bytes, choose_precision

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
_WORTH_COMPILING = 1e8
"""Weights from which compiling the blocks, half a minute when it is first done, pays in a run."""
LORA_WEIGHT_DECAY = 1e-4
"""AdamW's decay of LoRA matrices; full weights have none, since 0 is not where they started."""


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """The weights of the UNet that train, and how they are handed on."""

    kind: str
    """"unet" or "lora"."""
    parameters: list[nn.Parameter]
    learning_rate: float
    weight_decay: float
    optimizer: str
    """A key of `OPTIMIZERS`."""
    autocast: bool
    """Whether weights are multiplied in another precision than they are held in, on CUDA."""
    export: Callable[[], dict[str, Tensor]]
    """The weights as they are now: tensors on the CPU, in names and dtypes in which they are stored."""


def full_unet(unet: UNet2DConditionModel, config: TrainingConfig) -> Trainable:
    """Every parameter of the UNet, stored in half precision as inference uses it.

    Raises:
        NotEnoughMemoryError: neither fp32 nor bf16 weights fit on the device.
    """
    precision = _precision(unet, config)
    if unet.device.type == "cuda":
        log.log(logging.WARNING if precision.tight else logging.INFO, precision.reason)
    unet.requires_grad_(True)
    precision.apply(unet)
    _prepare(unet, config, checkpointing=precision.checkpointing)

    def export() -> dict[str, Tensor]:
        return {
            name: value.detach().to("cpu", torch.float16).contiguous()
            for name, value in unet.state_dict().items()
        }

    return Trainable(
        kind="unet",
        parameters=list(unet.parameters()),
        learning_rate=config.unet_learning_rate,
        weight_decay=0.0,
        optimizer=precision.optimizer,
        autocast=True,
        export=export,
    )


def lora(unet: UNet2DConditionModel, config: TrainingConfig) -> Trainable:
    """LoRA matrices (arXiv:2106.09685), or DoRA's (arXiv:2402.09353), on the layers of `lora_targets`, trained in fp32
    beside the frozen UNet, stored as diffusers reads them.

    The matrices start from torch's global generator.
    """
    alpha = config.lora_alpha or config.lora_rank
    with unet.device:  # else peft makes every matrix on the CPU and moves it
        unet.add_adapter(
            LoraConfig(
                r=config.lora_rank,
                lora_alpha=alpha,
                use_dora=config.use_dora,
                init_lora_weights="gaussian",
                target_modules=LORA_TARGETS[config.lora_targets],
            )
        )
    cast_training_params(unet, dtype=torch.float32)
    if not config.use_dora:
        make_lean(unet)
    _prepare(unet, config, checkpointing=_lora_checkpointing(unet, config))
    scale = alpha / config.lora_rank

    def export() -> dict[str, Tensor]:
        # Under these names diffusers reads every kind of layer alike. It takes alpha for the rank where none is told:
        # the second matrices carry the factor.
        state = get_peft_model_state_dict(unet)
        return {
            f"unet.{name}": value.detach().float().mul(scale if "lora_B" in name else 1.0).cpu().contiguous()
            for name, value in state.items()
        }

    return Trainable(
        kind="lora",
        parameters=[parameter for parameter in unet.parameters() if parameter.requires_grad],
        learning_rate=config.lora_lr,
        weight_decay=LORA_WEIGHT_DECAY,
        optimizer=config.optimizer,
        autocast=config.use_dora,
        export=export,
    )


def as_base(unet: UNet2DConditionModel, config: TrainingConfig) -> Callable[..., Any]:
    """The UNet as it is before it trains, to be called like it: the same one without its adapter for LoRA, else a copy,
    in half precision on CUDA."""
    if not config.is_lora:
        half = torch.bfloat16 if unet.device.type == "cuda" else unet.dtype
        with torch.device("meta"):
            copy = UNet2DConditionModel.from_config(unet.config)
        assert isinstance(copy, UNet2DConditionModel)
        # Cast as it is copied: a second one in fp32 might not fit.
        weights = {name: value.to(half, copy=True) for name, value in unet.state_dict().items()}
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


def _precision(unet: UNet2DConditionModel, config: TrainingConfig) -> WeightPrecision:
    """How the weights are held while they train: as well as free memory allows; on a CPU always as asked for."""
    size = sum(parameter.nbytes for parameter in unet.parameters())
    return choose_precision(
        free_bytes=free_bytes(unet.device) + size,
        parameters=sum(parameter.numel() for parameter in unet.parameters()),
        optimizer=config.optimizer,
        batch=config.train_batch_size,
        resolution=config.resolution,
        precision=config.precision,
        checkpointing=config.gradient_checkpointing,
    )


def _lora_checkpointing(unet: UNet2DConditionModel, config: TrainingConfig) -> bool:
    """Whether activations are computed again: as asked for, else where they would not fit beside the LoRA."""
    if config.gradient_checkpointing is not None:
        return config.gradient_checkpointing
    weights = sum(parameter.numel() for parameter in unet.parameters())
    trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    need = 16 * trained + activation_bytes(
        weights, batch=config.train_batch_size, resolution=config.resolution, checkpointing=False
    )
    return need > free_bytes(unet.device)


def _prepare(unet: UNet2DConditionModel, config: TrainingConfig, *, checkpointing: bool) -> None:
    unet.train()
    if unet.device.type != "cuda":
        return
    if checkpointing:
        # Nothing in SDXL's UNet is random, and saving the state of random numbers would wait for the GPU.
        unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    log.info("Activations are %s", "computed again in the backward pass" if checkpointing else "kept")
    if config.cuda_graph:
        fuse_blocks(unet)
    if config.compile_blocks and sum(parameter.numel() for parameter in unet.parameters()) > _WORTH_COMPILING:
        compile_blocks(unet, fullgraph=not config.use_dora)  # peft's DoRA breaks the graph
