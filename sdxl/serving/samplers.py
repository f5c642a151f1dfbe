"""The samplers by name. To add one, add a row to `SCHEDULERS` and its name to the choices in predict.py.

Knows diffusers' schedulers by name; does not know requests. `sampling.course` holds the one special rule that a sampler
may need: how many calls of the UNet an interval takes. Imports diffusers only when it makes a sampler.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, StableDiffusionXLPipeline


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler that requests can name."""

    kind: str
    """The scheduler's class in diffusers."""
    label: str
    """Its name in AUTOMATIC1111's web UI, for the metadata of files."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that differ from the base's scheduler configuration."""


SCHEDULERS = {
    "DDIM": Sampler(
        kind="DDIMScheduler", label="DDIM", settings={"clip_sample": False, "set_alpha_to_one": False}
    ),
    "DPMSolverMultistep": Sampler(kind="DPMSolverMultistepScheduler", label="DPM++ 2M"),
    "HeunDiscrete": Sampler(kind="HeunDiscreteScheduler", label="Heun"),
    "KarrasDPM": Sampler(
        kind="DPMSolverMultistepScheduler", label="DPM++ 2M Karras", settings={"use_karras_sigmas": True}
    ),
    "K_EULER_ANCESTRAL": Sampler(kind="EulerAncestralDiscreteScheduler", label="Euler a"),
    "K_EULER": Sampler(kind="EulerDiscreteScheduler", label="Euler"),
    "PNDM": Sampler(
        kind="PNDMScheduler", label="PLMS", settings={"skip_prk_steps": True, "set_alpha_to_one": False}
    ),
}
"""Public name → sampler.

DDIM and PNDM repeat settings of SDXL's published configuration. A base that was saved with another sampler lacks them,
and diffusers' defaults would clip latents as if they were pixels.
"""


def make_scheduler(name: str, pipeline: "StableDiffusionXLPipeline") -> "SchedulerMixin":
    """A fresh sampler of the public `name`, with the noise schedule of the pipeline's base."""
    import diffusers

    sampler = SCHEDULERS[name]
    return getattr(diffusers, sampler.kind).from_config(pipeline.scheduler.config, **sampler.settings)
