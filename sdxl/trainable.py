"""What trains of the UNet: all of it, or LoRA matrices beside it; and how either is handed on.

Knows parameters; does not know losses, text or files.
"""

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdxl.config import TrainingConfig
from sdxl.precision import WeightPrecision, choose_precision

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
    _prepare(unet, config)

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
        export=export,
    )


def lora(unet: UNet2DConditionModel, config: TrainingConfig) -> Trainable:
    """LoRA matrices (arXiv:2106.09685), or DoRA's (arXiv:2402.09353), on the layers of `lora_targets`, trained in fp32
    beside the frozen UNet, stored as diffusers reads them.

    The matrices start from torch's global generator.
    """
    alpha = config.lora_alpha or config.lora_rank
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
    _prepare(unet, config)
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
        export=export,
    )


def as_base(unet: UNet2DConditionModel, config: TrainingConfig) -> Callable[..., Any]:
    """The UNet as it is before it trains, to be called like it: the same one without its adapter for LoRA, else a copy,
    in half precision on CUDA."""
    if not config.is_lora:
        copy = deepcopy(unet).requires_grad_(False)
        return copy.to(torch.bfloat16) if unet.device.type == "cuda" else copy  # type: ignore[arg-type]

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
    on_gpu = unet.device.type == "cuda"
    return choose_precision(
        free_bytes=torch.cuda.mem_get_info(unet.device)[0] + size if on_gpu else 2**62,
        parameters=sum(parameter.numel() for parameter in unet.parameters()),
        optimizer=config.optimizer,
        batch=config.train_batch_size,
        resolution=config.resolution,
        precision=config.precision,
        checkpointing=config.gradient_checkpointing,
    )


def _prepare(unet: UNet2DConditionModel, config: TrainingConfig) -> None:
    unet.train()
    if config.gradient_checkpointing and unet.device.type == "cuda":
        # Nothing in SDXL's UNet is random, and saving the state of random numbers would wait for the GPU.
        unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
