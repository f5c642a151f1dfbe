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
    sample_noise,
    sample_timesteps,
    training_target,
)
from sdxl.training.text_conditioning import TextConditioning, read_captions

BELOW = 0.6
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

    @property
    def base_reads_apart(self) -> bool:
        """Whether there is a base as teacher that reads captions otherwise than the fine-tune: without the LoRA of the text
        encoders."""
        return self.base_unet is not None and self.config.text_encoder_lora

    def __call__(
        self, batch: Example, captions: TextConditioning | None, taught_by_base: bool = False
    ) -> Tensor:
        """The loss of `batch`, a scalar.

        taught_by_base: the target is what the base predicts, instead of what the pictures show.
        captions: as they are read by now; None reads them here, so that what trains of the text gets gradients.
        """
        components, config, generator = self.components, self.config, self.generator
        scheduler = components.noise_scheduler
        teaches = taught_by_base or self.base_outside_masks

        # The captions. Dropping some trains the unconditional branch of classifier-free guidance (arXiv:2207.12598).
        text = captions or read_captions(
            components.text_encoders, batch.token_ids, also_as_base=teaches and self.base_reads_apart
        )
        if not taught_by_base:
            text = text.dropped(config.caption_dropout, generator)

        # Noise at a random time: x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε (DDPM, eq. 4).
        noise = sample_noise(batch.latents.shape, config.noise_offset, generator)
        timesteps = sample_timesteps(scheduler, len(batch.latents), generator)
        if config.preservation and not taught_by_base:
            timesteps = (timesteps * BELOW).long()
        noisy = scheduler.add_noise(batch.latents, noise, timesteps)  # type: ignore[arg-type]
        target = training_target(scheduler, batch.latents, noise, timesteps)

        def condition(text: TextConditioning) -> dict[str, Any]:
            hidden, pooled = (value.to(components.unet.dtype) for value in (text.hidden, text.pooled))
            if captions is not None and hidden.is_cuda:
                # Encoded captions need no gradient. But one without would compile all blocks again at the pivot;
                # computing the gradient for nothing costs about a millisecond.
                hidden = hidden.detach().requires_grad_()
            added = {"text_embeds": pooled, "time_ids": batch.time_ids}
            return {"encoder_hidden_states": hidden, "added_cond_kwargs": added}

        # The base is the teacher of other captions. It is outside masks too: the fine-tune must not learn the background.
        noisy, given = noisy.to(components.unet.dtype), condition(text)
        if teaches:
            assert self.base_unet is not None
            known = given if text.of_base is None else condition(text.of_base)
            with torch.no_grad():
                from_base = self.base_unet(noisy, timesteps, **known).sample.to(target.dtype)
            target = from_base if taught_by_base else torch.lerp(from_base, target, batch.mask)

        prediction = components.unet(noisy, timesteps, **given).sample
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
