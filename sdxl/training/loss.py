"""The denoising loss of a batch.

Knows SDXL's parts and the maths of diffusion; does not know batches' origin, optimizers or the GPU's tricks.

Shape suffixes: b pictures, c latent channels, h w latent pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from dataset_and_utils import Example
from sdxl.model.components import Components
from sdxl.training.config import TrainingConfig
from sdxl.training.diffusion import (
    sample_noise,
    sample_timesteps,
    training_target,
)
from sdxl.training.half_copies import input_dtype
from sdxl.training.taught import TaughtExample
from sdxl.training.text_conditioning import TextConditioning, read_captions


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of what a step learns."""

    batch: Example
    captions: TextConditioning | None = None
    """As they are read by now; None reads them in the loss, so that what trains of the text gets gradients."""


@dataclass(frozen=True, kw_only=True)
class Noised:
    """A part with noise, ready for the UNet."""

    noisy: Tensor
    timesteps: Tensor
    text: TextConditioning
    time_ids: Tensor
    target: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class DenoisingLoss:
    """How well the UNet removes noise from a batch: L = E[ w(t) · ‖target − UNet(x_t, t, prompt)‖² ].

    Source: DDPM (arXiv:2006.11239), eq. 14, with the weights w(t) of min-SNR-γ (arXiv:2303.09556).
    """

    components: Components
    config: TrainingConfig
    generator: torch.Generator
    """Draws noise, timesteps and dropped captions."""
    base_outside_masks: Callable[..., Any] | None
    """Called like the base's UNet: outside masks it teaches what it would predict there. None: the pictures do."""
    subject_below: float = 1.0
    """The share of the timesteps, those with less noise, in which the subject is learned."""

    @property
    def base_reads_apart(self) -> bool:
        """Whether the base teaches outside masks, and reads captions otherwise than the fine-tune: without the LoRA of the
        text encoders."""
        return self.base_outside_masks is not None and self.config.text_encoder_lora

    @cached_property
    def _dtype(self) -> torch.dtype:
        return input_dtype(self.components.unet)

    def __call__(self, *parts: Part) -> list[Tensor]:
        """The loss of each part, a scalar. Parts of one shape go through the UNet together."""
        noised = [self._noised(part) for part in parts]
        losses = []
        for one, prediction in zip(noised, self._predictions(noised), strict=True):
            scheduler, config = self.components.noise_scheduler, self.config
            weights = min_snr_weights(scheduler, one.timesteps, config.snr_gamma)
            losses.append(masked_mse(prediction, one.target, one.mask, weights, config.mask_floor))
        return losses

    def _noised(self, part: Part) -> Noised:
        """What the UNet is shown of a part, and what it should predict."""
        components, config, generator, batch = self.components, self.config, self.generator, part.batch
        scheduler, dtype = components.noise_scheduler, self._dtype

        text = part.captions or read_captions(
            components.text_encoders,
            batch.token_ids,
            also_as_base=self.base_reads_apart and not isinstance(batch, TaughtExample),
        )
        if isinstance(batch, TaughtExample):
            return Noised(
                noisy=batch.latents,
                timesteps=batch.timesteps,
                text=text,
                time_ids=batch.time_ids,
                target=batch.targets,
                mask=batch.mask,
            )
        # Dropping some captions trains the unconditional branch of classifier-free guidance (arXiv:2207.12598).
        text = text.dropped(config.caption_dropout, generator)

        # Noise at a random time: x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε (DDPM, eq. 4).
        noise = sample_noise(batch.latents.shape, config.noise_offset, generator)
        timesteps = sample_timesteps(scheduler, len(batch.latents), generator)
        timesteps = (timesteps * self.subject_below).long()
        noisy = scheduler.add_noise(batch.latents, noise, timesteps).to(dtype)  # type: ignore[arg-type]
        target = training_target(scheduler, batch.latents, noise, timesteps)

        # The base is the teacher outside masks: the fine-tune must not learn the background.
        if self.base_outside_masks is not None:
            known = (text.of_base or text).for_unet(batch.time_ids, dtype)
            with torch.no_grad():
                from_base = self.base_outside_masks(noisy, timesteps, **known).sample.to(target.dtype)
            target = torch.lerp(from_base, target, batch.mask)
        return Noised(
            noisy=noisy,
            timesteps=timesteps,
            text=text,
            time_ids=batch.time_ids,
            target=target,
            mask=batch.mask,
        )

    def _predictions(self, parts: Sequence[Noised]) -> list[Tensor]:
        """What the UNet predicts for each part [b, c, h, w]: in one call if all have one shape, else in one for each."""
        if len({(one.noisy.shape[1:], one.text.hidden.shape[1:]) for one in parts}) > 1:
            return [self._predictions([one])[0] for one in parts]
        unet = self.components.unet
        text = TextConditioning.joined([replace(one.text, of_base=None) for one in parts])
        given = text.for_unet(torch.cat([one.time_ids for one in parts]), self._dtype)
        hidden = given["encoder_hidden_states"]
        if hidden.is_cuda and not hidden.requires_grad:
            # Encoded captions need no gradient. But one without would compile all blocks again at the pivot;
            # computing the gradient for nothing costs about a millisecond.
            given["encoder_hidden_states"] = hidden.detach().requires_grad_()
        noisy, timesteps = (
            torch.cat([getattr(one, name) for one in parts]) for name in ("noisy", "timesteps")
        )
        return list(unet(noisy, timesteps, **given).sample.split([len(one.noisy) for one in parts]))


def min_snr_weights(scheduler: DDPMScheduler, timesteps_b: Tensor, gamma: float) -> Tensor:
    """Weight [b] of each picture's loss: min(SNR, γ) / SNR for noise prediction, min(SNR, γ) / (SNR + 1) for v.

    It keeps the many easy, nearly clean timesteps from outweighing those that decide colour and composition.
    Source: Hang et al., min-SNR-γ (arXiv:2303.09556), section 3.4.
    """
    snr = compute_snr(scheduler, timesteps_b)
    if scheduler.config["prediction_type"] == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)  # min(SNR, γ) / SNR, which is 1 in the limit of zero SNR


def masked_mse(
    prediction_bchw: Tensor, target_bchw: Tensor, mask_b1hw: Tensor, weights_b: Tensor, floor: float = 0.0
) -> Tensor:
    """Mean squared error inside the mask, in fp32, weighted by picture. Every picture counts alike, however small its
    mask is.

    floor: weight, 0 to 1, of the area outside the mask; the area inside has 1.
    """
    mask_b1hw = floor + (1 - floor) * mask_b1hw
    error_b1hw = F.mse_loss(prediction_bchw.float(), target_bchw.float(), reduction="none").mean(
        1, keepdim=True
    )
    per_picture_b = (error_b1hw * mask_b1hw).sum((1, 2, 3)) / mask_b1hw.sum((1, 2, 3)).clamp_min(1e-6)
    return (per_picture_b * weights_b).mean()
