"""How full training holds a UNet on a device, from what is free there and what the settings say.

Knows the UNet, the settings and the group of processes; does not know how the choice is made (`memory_plan.py`), or losses.
"""

import logging

import torch
from diffusers import UNet2DConditionModel

from sdxl.errors import UserInputError
from sdxl.gpu import activations_in_bf16, capability_of, computes_bf16
from sdxl.speed.memory import free_bytes, free_host_bytes
from sdxl.speed.triton_here import triton_runs
from sdxl.training.config import TrainingConfig
from sdxl.training.data_parallel import gathered, world_size
from sdxl.training.memory_plan import MemoryPlan, choose_plan
from sdxl.training.optimizers import SHAREABLE
from sdxl.training.sharding import can_share

log = logging.getLogger(__name__)


def plan_for(
    unet: UNet2DConditionModel,
    config: TrainingConfig,
    teacher: UNet2DConditionModel | None,
    device: torch.device,
) -> MemoryPlan:
    """How to hold the weights while they train on `device`. A CPU always counts as having enough memory."""
    is_there = unet.device.type == device.type  # a device may be named with or without its number
    size = sum(parameter.nbytes for parameter in unet.parameters()) if is_there else 0
    held = 0 if teacher is None else sum(parameter.nbytes for parameter in teacher.parameters())
    return choose_plan(
        free_bytes=min(gathered(free_bytes(device))) + size,  # all processes must choose alike
        host_bytes=free_host_bytes() if device.type == "cuda" else 0,
        shared_by=_shared_by(unet, config),
        also_shared=held,
        parameters=sum(parameter.numel() for parameter in unet.parameters()),
        optimizer=config.optimizer,
        batch=config.train_batch_size,
        resolution=config.resolution,
        precision=config.precision,
        checkpointing=config.gradient_checkpointing,
        bf16=activations_in_bf16(device),
    )


def takes_copies(plan: MemoryPlan, config: TrainingConfig, device: torch.device) -> bool:
    """Whether the UNet computes with bf16 copies of its fp32 weights: where that is as exact as autocast, and kernels compile.

    Several backward passes add up their gradients, which takes fp32.
    """
    one_pass = config.gradient_accumulation_steps == 1 and not config.prior_prompts and config.taught_in_batch
    return (
        (plan.weights, plan.optimizer, plan.shared_by) == (torch.float32, "adamw", 1)
        and one_pass
        and device.type == "cuda"
        and computes_bf16(capability_of(device))
        and triton_runs()
    )


def _shared_by(unet: UNet2DConditionModel, config: TrainingConfig) -> tuple[int, ...]:
    """Among how many processes the UNet may be shared, best first; 1 is a copy for each.

    Raises:
        UserInputError: `shard` asks for it, but they cannot share it equally.
    """
    if config.shard is False or config.optimizer not in SHAREABLE:
        return (1,)
    if can_share(unet):
        return (world_size(),) if config.shard else (1, world_size())
    if config.shard and world_size() > 1:
        raise UserInputError(
            f"shard is true, but {world_size()} processes cannot share SDXL's layers equally: start 2, 4, 8 or 16, or leave "
            "out shard."
        )
    if config.shard:
        log.warning("shard has no effect, because only one process trains: start several with torchrun.")
    return (1,)
