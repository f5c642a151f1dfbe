"""What the log says before a training starts.

Knows settings and devices; does not know how training works.
"""

import logging

import torch

from sdxl.training.config import TrainingConfig
from sdxl.training.contradictions import without_effect_here

log = logging.getLogger(__name__)


def announce(config: TrainingConfig, device: torch.device, *, masks: bool) -> None:
    """Log what is trained, and which settings have no effect. masks: whether any picture has a mask."""
    for told in without_effect_here(config, masks=masks, cuda=device.type == "cuda"):
        log.warning("%s", told)
    what = f"a LoRA of rank {config.lora_rank}" if config.is_lora else "the whole UNet"
    log.info(
        "Training %s of %s and the tokens of %s on %s: %d steps of %d pictures at %d×%d pixels, with seed %d. "
        "The tokens freeze after step %d.",
        *(what, config.base, config.token_map, device, config.max_train_steps, config.train_batch_size),
        *(config.resolution, config.resolution, config.seed, config.pivot_step),
    )
