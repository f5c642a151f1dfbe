"""The denoising loop, for every mode and sampler; the one place that calls a UNet to draw.

Knows diffusers' schedulers; does not know prompts, pictures or where weights come from.

A run of n denoising steps is the schedule's *intervals* 0 … n−1; text to image covers all of them, image to image the
last ones, and a base and a refiner share them. Shapes: b pictures, [b, 4, h, w] latents.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What a UNet is told beside the latents, for b pictures; without guidance the rows are b, else 2b: the negative
    prompt's first, then the prompt's."""

    embeds: Tensor
    """Text encoders' hidden states [b or 2b, 77, dim]."""
    pooled: Tensor
    """Pooled prompts [b or 2b, dim]."""
    time_ids: Tensor
    """Size conditioning [b or 2b, 6], or of the refiner [b or 2b, 5]."""
    guidance_scale: float
    """Classifier-free guidance (arXiv:2207.12598); 1 is off."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What inpainting keeps of a picture."""

    latents: Tensor
    """The picture's latents [b, 4, h, w], without noise."""
    noise: Tensor
    """Noise [b, 4, h, w] that is added to them at each step's level."""
    mask: Tensor
    """[1, 1, h, w]: 1 is drawn, 0 kept."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """Intervals `start` to `stop` (exclusive) of a schedule, as the sampler takes them."""

    timesteps: Tensor
    """One entry a call of the UNet."""
    following: list[Tensor | None]
    """The timestep whose noise level each call leaves the latents at; None for no noise."""
    begin_index: int


def course(scheduler: Any, start: int, stop: int) -> Course:
    """The calls of a scheduler, whose timesteps are set, for intervals `start` to `stop`.

    Heun's method (arXiv:2206.00364, algorithm 1) takes two calls an interval and the last interval one; the PLMS of
    PNDM (arXiv:2202.09778) takes its first interval twice, wherever it begins.
    """
    every = scheduler.timesteps
    if isinstance(scheduler, PNDMScheduler):
        plain = torch.cat([every[:1], every[2:]])
        chosen = plain[start:stop]
        ahead = [*plain[start + 1 : stop + 1], None][: len(chosen)]
        if len(chosen) > 1:
            chosen = torch.cat([chosen[:2], chosen[1:]])
            ahead = [ahead[0], *ahead]
        return Course(timesteps=chosen, following=ahead, begin_index=start)
    calls = 2 if isinstance(scheduler, HeunDiscreteScheduler) else 1
    first, last = calls * start, min(calls * stop, len(every))
    following = [*every[first + 1 : last + 1], None][: max(last - first, 0)]
    return Course(timesteps=every[first:last], following=following, begin_index=first)


def intervals_above(scheduler: Any, fraction: float) -> int:
    """How many intervals begin in the first `fraction` (0 to 1) of the noise: where a refiner takes over."""
    cutoff = round(scheduler.config.num_train_timesteps * (1 - fraction))
    every = scheduler.timesteps
    distinct = torch.cat([every[:1], every[2:]]) if isinstance(scheduler, PNDMScheduler) else every
    if isinstance(scheduler, HeunDiscreteScheduler):
        distinct = every[::2]
    return int((distinct >= cutoff).sum())


def noise_like(latents: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise in the shape of `latents`, picture i drawn from `generators[i]` alone."""
    return randn_tensor(
        tuple(latents.shape), generator=list(generators), device=latents.device, dtype=latents.dtype
    )


def begin(scheduler: Any, planned: Course, image_latents: Tensor | None, noise: Tensor) -> Tensor:
    """The latents a course starts from: `noise` alone, or `image_latents` under `noise` at the course's level."""
    if image_latents is None:
        return noise * scheduler.init_noise_sigma
    if not len(planned.timesteps):
        return image_latents
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(planned.begin_index)
    return scheduler.add_noise(image_latents, noise, planned.timesteps[:1])


def denoise(
    unet: Callable[..., Any],
    scheduler: Any,
    planned: Course,
    latents: Tensor,
    conditioning: Conditioning,
    *,
    generators: Sequence[torch.Generator],
    kept: Kept | None = None,
    on_call: Callable[[], object] = lambda: None,
) -> Tensor:
    """Take `latents` through a course; `unet` is one or is called like one, and `on_call` after each call of it."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(planned.begin_index)
    takes = inspect.signature(scheduler.step).parameters
    extra = {"generator": list(generators)} if "generator" in takes else {}
    for timestep, next_timestep in zip(planned.timesteps, planned.following, strict=True):
        noise = predict_noise(unet, scheduler, timestep, latents, conditioning)
        latents = scheduler.step(noise, timestep, latents, **extra, return_dict=False)[0]
        if kept is not None:
            around = kept.latents
            if next_timestep is not None:
                around = scheduler.add_noise(around, kept.noise, next_timestep.reshape(1))
            latents = (1 - kept.mask) * around + kept.mask * latents
        on_call()
    return latents


def predict_noise(
    unet: Callable[..., Any], scheduler: Any, timestep: Tensor, latents: Tensor, conditioning: Conditioning
) -> Tensor:
    """The guided prediction [b, 4, h, w] at `timestep`; the only call of a UNet, at 2b rows with guidance."""
    guided = conditioning.guidance_scale > 1
    rows = torch.cat([latents] * 2) if guided else latents
    predicted = unet(
        scheduler.scale_model_input(rows, timestep),
        timestep,
        encoder_hidden_states=conditioning.embeds,
        added_cond_kwargs={"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids},
        return_dict=False,
    )[0]
    if not guided:
        return predicted
    without, along = predicted.chunk(2)
    return without + conditioning.guidance_scale * (along - without)
