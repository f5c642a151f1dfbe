"""What the base teaches: its predictions for noisy pictures, under captions that are to keep their meaning.

They are computed before anything trains. So a step needs no call of the base, and full training no second UNet. Knows
examples, noise and the UNet; does not know losses or steps.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from dataset_and_utils import Example, ExampleDataset
from sdxl.model.components import Components
from sdxl.speed.autocast import autocast
from sdxl.speed.compiled_blocks import uncompiled
from sdxl.training.batches import by_shape
from sdxl.training.config import TrainingConfig
from sdxl.training.data_parallel import world_size
from sdxl.training.diffusion import sample_noise
from sdxl.training.half_copies import input_dtype
from sdxl.training.taught import TaughtDataset, TaughtExample
from sdxl.training.text_conditioning import TextConditioning, read_captions

USES = 4
"""How often a run learns each prediction, at least. With more, fewer must be computed, but a run sees less varied noise."""
MOST = 256
"""Predictions of one run."""


@torch.no_grad()
def taught_examples(
    kept: ExampleDataset,
    components: Components,
    base_unet: Callable[..., Any],
    config: TrainingConfig,
    *,
    mixed_precision: bool,
) -> TaughtDataset:
    """Examples of `kept` with noise at random times, and what the base predicts for them. Equal in all processes.

    base_unet: called like the base's UNet. Nothing in it may have trained yet.
    mixed_precision: whether it needs autocast.
    """
    noisy, times = _with_noise(kept, components, config)
    stacked, targets = ExampleDataset(noisy), {}
    most = config.at_once_without_gradients
    batches = [
        rows[start : start + most] for rows in by_shape(stacked) for start in range(0, len(rows), most)
    ]
    with tqdm(total=len(noisy), desc="Asking the base", unit="prediction") as progress:
        for rows in batches:
            batch = stacked.collate(rows)
            text = _read(components, batch, config)
            told = text.for_unet(batch.time_ids, batch.latents.dtype)
            with uncompiled(), autocast(components.device, mixed_precision):
                found = base_unet(batch.latents, times[rows], **told).sample
            targets.update(zip(rows, found, strict=True))
            progress.update(len(rows))
    return TaughtDataset(
        [
            TaughtExample(**vars(example), timesteps=times[row], targets=targets[row])
            for row, example in enumerate(noisy)
        ]
    )


def count_of(config: TrainingConfig) -> int:
    """How many predictions a run learns from."""
    draws = config.max_train_steps * config.gradient_accumulation_steps * config.taught_at_once
    return min(max(draws * world_size() // USES, 1), MOST)


def _with_noise(
    kept: ExampleDataset, components: Components, config: TrainingConfig
) -> tuple[list[Example], torch.Tensor]:
    """Random examples with noise, and their timesteps [n]: one in each n-th of all timesteps."""
    generator = torch.Generator().manual_seed(config.seed)
    scheduler, count = components.noise_scheduler, count_of(config)
    shuffled = [torch.randperm(len(kept), generator=generator) for _ in range(-(-count // len(kept)))]
    # In fp64: in fp32 the last share may be rounded up to 1, which is no timestep.
    shares = (torch.arange(count).double() + torch.rand(count, generator=generator)) / count
    times = (shares * scheduler.config["num_train_timesteps"]).long().to(components.device)
    dtype = input_dtype(components.unet)
    noisy = []
    for row, time in zip(torch.cat(shuffled)[:count].tolist(), times, strict=True):
        example = kept[row]
        noise = sample_noise(example.latents[None].shape, config.noise_offset, generator)
        latents = scheduler.add_noise(example.latents[None], noise.to(times.device), time[None])  # type: ignore[arg-type]
        noisy.append(replace(example, latents=latents[0].to(dtype)))
    return noisy, times


def _read(components: Components, batch: Example, config: TrainingConfig) -> TextConditioning:
    """The captions of a batch as the base reads them."""
    with autocast(components.device):
        text = read_captions(components.text_encoders, batch.token_ids, also_as_base=config.text_encoder_lora)
    return text.of_base or text
