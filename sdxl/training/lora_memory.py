"""How a run that trains a LoRA holds the frozen UNet and its activations, chosen from the free memory.

Best first: all activations are kept; they are recomputed; the UNet's linear layers are also held in int8, with half of bf16's
bytes. Where there is room, its linear layers may get copies in fp8. Knows bytes and dtypes; does not know how a step works.
"""

import logging

import torch
from diffusers import UNet2DConditionModel

from sdxl.gpu import activations_in_bf16
from sdxl.speed.fp8 import is_supported
from sdxl.speed.fp8_products import copies_bytes
from sdxl.speed.memory import free_bytes
from sdxl.training.config import TrainingConfig
from sdxl.training.memory_plan import activation_bytes

log = logging.getLogger(__name__)

_TRAINED_BYTES = 16
"""For each trained number: fp32 weight, gradient, and AdamW's two moments."""
_ENCODING_BYTES = 11 * 2**30
"""What encoding pictures needs, and a UNet in bf16: text encoders and autoencoder, and its activations. An estimate."""
_IN_FP32 = 5 * 2**30
"""How much larger SDXL's UNet is in fp32, as full training loads it."""


def waits_on_cpu(config: TrainingConfig, device: torch.device) -> bool:
    """Whether the UNet stays on the CPU while pictures are encoded, because the GPU has no room for it beside that."""
    return free_bytes(device) < _ENCODING_BYTES + (0 if config.is_lora else _IN_FP32)


def in_int8(unet: UNet2DConditionModel, config: TrainingConfig, device: torch.device) -> bool:
    """Whether the UNet's linear layers are held in int8 when it trains on `device`: as requested, else only if nothing else fits."""
    if config.precision != "auto":
        return config.precision == "int8"
    if device.type != "cuda" or config.use_dora:
        return False
    return _least(unet, config, device) > free_bytes(device)


def in_fp8(unet: UNet2DConditionModel, config: TrainingConfig, device: torch.device) -> bool:
    """Whether the UNet's linear layers multiply in fp8 when it trains on `device`: if that is wanted, the GPU can, and the
    copies fit."""
    if not config.fp8 or not is_supported(device):
        return False
    fits = _least(unet, config, device) + copies_bytes(unet) <= free_bytes(device)
    if not fits:
        log.warning("There is no memory for copies of the base in fp8: its products stay in bf16.")
    return fits


def recomputes(unet: UNet2DConditionModel, config: TrainingConfig) -> bool:
    """Whether to recompute activations, for a UNet that has its LoRA: as requested, else only if they would not fit."""
    if config.gradient_checkpointing is not None:
        return config.gradient_checkpointing
    return _needed(unet, config, unet.device, recompute=False) > free_bytes(unet.device)


def _least(unet: UNet2DConditionModel, config: TrainingConfig, device: torch.device) -> int:
    """Bytes that are still to be allocated on `device`, with as few activations as the settings allow."""
    to_come = (
        0 if unet.device.type == device.type else sum(parameter.nbytes for parameter in unet.parameters())
    )
    recompute = config.gradient_checkpointing is not False
    return to_come + _needed(unet, config, device, recompute=recompute)


def _needed(
    unet: UNet2DConditionModel, config: TrainingConfig, device: torch.device, *, recompute: bool
) -> int:
    """Bytes for the activations, and for the LoRA if it is there."""
    weights = sum(parameter.numel() for parameter in unet.parameters())
    trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    return _TRAINED_BYTES * trained + activation_bytes(
        weights,
        batch=config.train_batch_size,
        resolution=config.resolution,
        checkpointing=recompute,
        bf16=activations_in_bf16(device),
    )
