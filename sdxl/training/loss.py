"""The denoising loss of a batch.

Knows SDXL's parts and the maths of diffusion; does not know batches' origin, optimizers or the GPU's tricks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataset_and_utils import Example
from sdxl.model.components import Components
from sdxl.training.config import TrainingConfig
from sdxl.training.diffusion import (
    drop_prompts,
    encode_prompt,
    masked_mse,
    min_snr_weights,
    sample_noise,
    sample_timesteps,
    training_target,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class DenoisingLoss:
    """How well the UNet removes noise from a batch: L = E[ w(t) · ‖target − UNet(x_t, t, prompt)‖² ].

    Source: DDPM (arXiv:2006.11239), eq. 14, with the weights w(t) of min-SNR-γ (arXiv:2303.09556).
    """

    components: Components
    config: TrainingConfig
    generator: torch.Generator
    """Draws noise, timesteps and dropped captions."""
    base_unet: Callable[..., Any] | None
    """Called like the base's UNet. If given, it teaches outside masks what the base would predict there."""

    def __call__(self, batch: Example, prompts: tuple[Tensor, Tensor] | None) -> Tensor:
        """The loss of `batch`, a scalar.

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

        # Outside masks the base is the teacher: the fine-tune must not learn the background of the pictures.
        if self.base_unet is not None:
            with torch.no_grad():
                from_base = self.base_unet(noisy, timesteps, **condition).sample.to(target.dtype)
            target = torch.lerp(from_base, target, batch.mask)

        prediction = components.unet(noisy, timesteps, **condition).sample
        weights = min_snr_weights(scheduler, timesteps, config.snr_gamma)
        return masked_mse(prediction, target, batch.mask, weights, config.mask_floor)
