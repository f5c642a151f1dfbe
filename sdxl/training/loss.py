"""The denoising loss of a batch.

Knows SDXL's parts and the maths of diffusion; does not know batches' origin, optimizers or the GPU's tricks.

Shape suffixes: b pictures, c latent channels, h w latent pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
    drop_prompts,
    encode_prompt,
    sample_noise,
    sample_timesteps,
    training_target,
)

BELOW = 0.7
"""With `preservation` the subject is learned in this share of the timesteps, those with less noise. Above it a picture's
composition is decided, which few pictures over-train first (T-LoRA, arXiv:2507.05964, lowers the rank there)."""


@dataclass(frozen=True, eq=False)
class DenoisingLoss:
    """How well the UNet removes noise from a batch: L = E[ w(t) · ‖target − UNet(x_t, t, prompt)‖² ].

    Source: DDPM (arXiv:2006.11239), eq. 14, with the weights w(t) of min-SNR-γ (arXiv:2303.09556).
    """

    components: Components
    config: TrainingConfig
    generator: torch.Generator
    """Draws noise, timesteps and dropped captions."""
    base_unet: Callable[..., Any] | None
    """Called like the base's UNet; None if nothing needs it."""
    base_outside_masks: bool = False
    """Whether the base teaches outside masks what it would predict there."""

    def __call__(
        self, batch: Example, prompts: tuple[Tensor, Tensor] | None, taught_by_base: bool = False
    ) -> Tensor:
        """The loss of `batch`, a scalar.

        taught_by_base: the target is what the base predicts, instead of what the pictures show.
        prompts: text conditioning [b, t, d] and [b, d]; None encodes the captions, so that token rows get gradients.
        """
        components, config, generator = self.components, self.config, self.generator
        scheduler = components.noise_scheduler

        # The prompt. Dropping some trains the unconditional branch of classifier-free guidance (arXiv:2207.12598).
        hidden, pooled = prompts or encode_prompt(components.text_encoders, batch.token_ids)
        hidden, pooled = drop_prompts(hidden, pooled, config.caption_dropout, generator)

        # Noise at a random time: x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε (DDPM, eq. 4).
        noise = sample_noise(batch.latents.shape, config.noise_offset, generator)
        timesteps = sample_timesteps(scheduler, len(batch.latents), generator)
        if config.preservation and not taught_by_base:
            timesteps = (timesteps * BELOW).long()
        noisy = scheduler.add_noise(batch.latents, noise, timesteps)  # type: ignore[arg-type]
        target = training_target(scheduler, batch.latents, noise, timesteps)

        noisy, hidden, pooled = (value.to(components.unet.dtype) for value in (noisy, hidden, pooled))
        if prompts is not None and hidden.is_cuda:
            # Encoded prompts need no gradient. But a prompt without one would compile all blocks again at the pivot;
            # computing the gradient for nothing costs about a millisecond.
            hidden = hidden.detach().requires_grad_()
        condition = {
            "encoder_hidden_states": hidden,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": batch.time_ids},
        }

        # The base is the teacher of other captions. It is outside masks too: the fine-tune must not learn the background.
        if taught_by_base or self.base_outside_masks:
            assert self.base_unet is not None
            with torch.no_grad():
                from_base = self.base_unet(noisy, timesteps, **condition).sample.to(target.dtype)
            target = from_base if taught_by_base else torch.lerp(from_base, target, batch.mask)

        prediction = components.unet(noisy, timesteps, **condition).sample
        weights = min_snr_weights(scheduler, timesteps, config.snr_gamma)
        return masked_mse(prediction, target, batch.mask, weights, config.mask_floor)


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
