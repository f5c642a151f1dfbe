"""The denoising loop for every mode and sampler; the only place in serving that calls a UNet.

Knows diffusers' schedulers; does not know prompts, pictures or where weights come from.

A schedule of n denoising steps has the *intervals* 0 … n−1. A pass over a schedule runs some of them in a row; `plan`
decides which. Shapes: latents are [b, 4, h, w] for b pictures.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sdxl.serving.shortcuts import Call, Features


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """The inputs of a UNet besides the latents and the timestep, for b pictures.

    With guidance there are 2b rows: first those of the negative prompt, then those of the prompt. Without, b rows.
    """

    embeds: Tensor
    """Hidden states of the text encoders [b or 2b, 77·n, dim], n chunks of the prompts side by side."""
    pooled: Tensor
    """Pooled prompts [b or 2b, dim]."""
    time_ids: Tensor
    """Size conditioning [b or 2b, 6]; for the refiner [b or 2b, 5]."""
    guidance_scale: float
    """Strength of classifier-free guidance (arXiv:2207.12598); 1 and less turn it off."""
    guidance_rescale: float = 0.0
    """Share, 0 to 1, of the guided prediction that gets back the spread of the prediction for the prompt."""

    @property
    def guided(self) -> bool:
        """Whether there are rows of the negative prompt."""
        return self.guidance_scale > 1

    @staticmethod
    def joined(parts: "Sequence[Conditioning]") -> "Conditioning":
        """Several as one, with the pictures in their order. All have the same guidance and equally many chunks."""

        def rows(name: str) -> Tensor:
            halves = [getattr(part, name).chunk(2 if part.guided else 1) for part in parts]
            return torch.cat([half for side in zip(*halves, strict=True) for half in side])

        return replace(parts[0], embeds=rows("embeds"), pooled=rows("pooled"), time_ids=rows("time_ids"))

    def unguided(self) -> "Conditioning":
        """The same without the negative prompt."""
        if not self.guided:
            return self
        rows = {name: getattr(self, name).chunk(2)[1] for name in ("embeds", "pooled", "time_ids")}
        return replace(self, **rows, guidance_scale=1.0)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The part of the input picture that inpainting keeps.

    A cell that is repainted in part is kept until its share of the noise is left, as if it began with so much less
    `prompt_strength`. So each cell has the noise of the step and no mixture of two, which would be blurred.

    Source: Differential Diffusion (arXiv:2306.00950), algorithm 1.
    """

    latents: Tensor
    """Latents of the picture [b, 4, h, w], without noise."""
    noise: Tensor
    """The noise [b, 4, h, w] to add to them, at the level of each step."""
    mask: Tensor
    """How much is repainted [1, 1, h, w]: 1 from the first step on, 0 never."""
    begin: Tensor | None = None
    """The first timestep of the first pass, of which the mask gives shares; None where no step runs."""

    def put_into(self, latents: Tensor, scheduler: Any, timestep: Tensor | None) -> Tensor:
        """`latents` [b, 4, h, w] with the picture where it is kept at the noise of `timestep`, None for no noise."""
        around, share = self.latents, 0
        if timestep is not None:
            assert self.begin is not None, "a step runs"
            around = scheduler.add_noise(around, self.noise, timestep.reshape(1))
            share = timestep / self.begin
        return torch.where(self.mask > share, latents, around)


@dataclass(frozen=True, kw_only=True)
class Course:
    """The calls of the UNet for some intervals of a schedule."""

    timesteps: Tensor
    """One timestep per call."""
    following: list[Tensor | None]
    """For each call, the timestep whose noise level the latents have afterwards; None for no noise."""
    begin_index: int
    """Index of the first call among the calls of the whole schedule."""


def course(scheduler: Any, start: int, stop: int) -> Course:
    """The calls for the intervals `start` to `stop` (exclusive) of a scheduler whose timesteps are set.

    Most samplers call the UNet once per interval. Heun's method (arXiv:2206.00364, algorithm 1) calls it twice, except in
    the last interval. PLMS, diffusers' PNDM (arXiv:2202.09778), runs the first interval twice, wherever it starts.
    """
    every = scheduler.timesteps
    if isinstance(scheduler, PNDMScheduler):
        # The list repeats its second timestep for a start at interval 0: remove it, cut, and repeat where this course starts.
        plain = torch.cat([every[:1], every[2:]])
        chosen = plain[start:stop]
        following = [*plain[start + 1 : stop + 1], None][: len(chosen)]
        if len(chosen) > 1:
            chosen = torch.cat([chosen[:2], chosen[1:]])
            following = [following[0], *following]
        return Course(timesteps=chosen, following=following, begin_index=start)
    calls = 2 if isinstance(scheduler, HeunDiscreteScheduler) else 1
    first, last = calls * start, min(calls * stop, len(every))
    following = [*every[first + 1 : last + 1], None][: max(last - first, 0)]
    return Course(timesteps=every[first:last], following=following, begin_index=first)


def intervals_above(scheduler: Any, fraction: float) -> int:
    """How many intervals start within the first `fraction` (0 to 1) of the noise: those before a refiner takes over."""
    cutoff = round(scheduler.config.num_train_timesteps * (1 - fraction))
    every = scheduler.timesteps
    distinct = torch.cat([every[:1], every[2:]]) if isinstance(scheduler, PNDMScheduler) else every
    if isinstance(scheduler, HeunDiscreteScheduler):
        distinct = every[::2]
    return int((distinct >= cutoff).sum())


def noise_like(latents: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise in the shape of `latents`; picture i depends on `generators[i]` alone."""
    return randn_tensor(
        tuple(latents.shape), generator=list(generators), device=latents.device, dtype=latents.dtype
    )


def begin(scheduler: Any, planned: Course, latents: Tensor | None, noise: Tensor) -> Tensor:
    """The latents at the start of a course: `latents` with `noise` at the course's level, or only `noise` for None."""
    if latents is None:
        return noise * scheduler.init_noise_sigma
    if not len(planned.timesteps):
        return latents
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(planned.begin_index)
    return scheduler.add_noise(latents, noise, planned.timesteps[:1])


def denoise(
    unet: Callable[..., Any],
    scheduler: Any,
    planned: Course,
    latents: Tensor,
    conditioning: Conditioning,
    *,
    generators: Sequence[torch.Generator],
    calls: Sequence[Call] | None = None,
    kept: Kept | None = None,
    on_call: Callable[[], object] = lambda: None,
) -> Tensor:
    """Denoise `latents` along a course.

    unet: a `ReusingUNet`, or for calls that do everything also anything that is called like a UNet.
    calls: what each call of the course does; None for everything.
    on_call: runs after each call of the UNet.
    """
    # The scheduler counts its calls; a course may start in the middle of the schedule.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(planned.begin_index)

    # Ancestral samplers add noise in each step: picture i draws it from its own generator.
    parameters = inspect.signature(scheduler.step).parameters
    extra = {"generator": list(generators)} if "generator" in parameters else {}

    unguided = conditioning.unguided()
    calls = [Call()] * len(planned.timesteps) if calls is None else calls
    for timestep, next_timestep, call in zip(planned.timesteps, planned.following, calls, strict=True):
        condition = conditioning if call.guided else unguided
        noise = predict_noise(unet, scheduler, timestep, latents, condition, call.features)
        latents = scheduler.step(noise, timestep, latents, **extra, return_dict=False)[0]

        # Inpainting: put the kept part of the picture back, with the noise that the latents have after this step.
        if kept is not None:
            latents = kept.put_into(latents, scheduler, next_timestep)
        on_call()
    return latents


def predict_noise(
    unet: Callable[..., Any],
    scheduler: Any,
    timestep: Tensor,
    latents: Tensor,
    conditioning: Conditioning,
    features: Features,
) -> Tensor:
    """The guided prediction [b, 4, h, w] at `timestep`, of noise or v, by one call of the UNet."""
    rows = torch.cat([latents] * 2) if conditioning.guided else latents
    predicted = unet(
        scheduler.scale_model_input(rows, timestep),
        timestep,
        encoder_hidden_states=conditioning.embeds,
        added_cond_kwargs={"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids},
        return_dict=False,
        **({} if features == "none" else {"features": features}),
    )[0]
    if not conditioning.guided:
        return predicted
    negative, positive = predicted.chunk(2)
    guided_by = negative + conditioning.guidance_scale * (positive - negative)
    return rescaled(guided_by, positive, conditioning.guidance_rescale)


def rescaled(guided: Tensor, positive: Tensor, share: float) -> Tensor:
    """`guided` [b, 4, h, w] with a `share`, 0 to 1, of it brought to the standard deviation of `positive` in each picture.

    Guidance spreads a prediction more than the sampler expects, which overexposes pictures of bases with zero terminal SNR.

    Source: Lin et al. (arXiv:2305.08891), section 3.4.
    """
    if not share:
        return guided
    spread, wanted = (value.float().std((1, 2, 3), keepdim=True) for value in (guided, positive))
    return (guided * (share * wanted / spread + 1 - share)).to(guided.dtype)
