"""The maths of diffusion training: pure functions of tensors.

Knows shapes and formulas; does not know where tensors come from, optimizers or devices.

Shape suffixes: b pictures, c latent channels, h w latent pixels.
"""

import torch
from diffusers import DDPMScheduler
from torch import Tensor


def sample_noise(shape_bchw: torch.Size, offset: float, generator: torch.Generator) -> Tensor:
    """Standard normal noise [b, c, h, w], plus `offset` times one more normal value per picture and channel.

    Plain noise hardly ever changes a picture's mean brightness, so the model never learns to. The offset does.

    Source: N. Guttenberg, "Diffusion with Offset Noise" (crosslabs.org, 2023).
    """
    noise = torch.randn(shape_bchw, generator=generator, device=generator.device)
    if offset:
        noise += offset * torch.randn((*shape_bchw[:2], 1, 1), generator=generator, device=generator.device)
    return noise


def sample_timesteps(scheduler: DDPMScheduler, count: int, generator: torch.Generator) -> Tensor:
    """Uniform random timesteps [count], from 0 to below the scheduler's number of timesteps."""
    total = scheduler.config["num_train_timesteps"]
    return torch.randint(total, (count,), generator=generator, device=generator.device)


def training_target(
    scheduler: DDPMScheduler, latents_bchw: Tensor, noise_bchw: Tensor, timesteps_b: Tensor
) -> Tensor:
    """What the UNet should predict [b, c, h, w]: the noise, or v (arXiv:2202.00512) if the base predicts v."""
    if scheduler.config["prediction_type"] == "v_prediction":
        return scheduler.get_velocity(latents_bchw, noise_bchw, timesteps_b)  # type: ignore[arg-type]
    return noise_bchw
