"""The samplers by name. To add one, add a row to `SCHEDULERS` and its name to the choices in predict.py.

Knows diffusers' schedulers by name; does not know requests. `denoising.course` holds the one special rule that a sampler
may need: how many calls of the UNet an interval takes. Imports diffusers only when it makes a sampler.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdxl.errors import UserInputError
from sdxl.model.noise_schedule import has_zero_snr, prediction_type

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
    zero_snr: Sequence[str] = ("epsilon", "v_prediction")
    """What a base with zero terminal SNR may predict for this sampler. Some ignore that the noise is complete, and some
    divide epsilon by zero."""
    most_steps: int | None = None
    """For a sampler of few steps: the most that it can take. Its timesteps are a part of those of a distillation, whatever
    the spacing."""
    most_guidance: float | None = None
    """For a sampler of few steps: more guidance than this overexposes, because the weights have learned guidance."""


SPACINGS = ("base", "leading", "linspace", "trailing")
"""How timesteps are spread over the noise: as the base's scheduler configuration says, or one of diffusers' ways."""
FEW_STEPS: dict[str, Any] = {"zero_snr": ("v_prediction",), "most_steps": 50, "most_guidance": 2.0}
_DISTILLED = {"original_inference_steps": 50, "clip_sample": False, "set_alpha_to_one": False}


SCHEDULERS = {
    "DDIM": Sampler(
        kind="DDIMScheduler",
        label="DDIM",
        settings={"clip_sample": False, "set_alpha_to_one": False},
        zero_snr=("v_prediction",),
    ),
    "DPMSolverMultistep": Sampler(kind="DPMSolverMultistepScheduler", label="DPM++ 2M"),
    "DPMSolverMultistepSDE": Sampler(
        kind="DPMSolverMultistepScheduler",
        label="DPM++ 2M SDE",
        settings={"algorithm_type": "sde-dpmsolver++"},
    ),
    "HeunDiscrete": Sampler(kind="HeunDiscreteScheduler", label="Heun", zero_snr=()),
    "KarrasDPM": Sampler(
        kind="DPMSolverMultistepScheduler", label="DPM++ 2M Karras", settings={"use_karras_sigmas": True}
    ),
    "KarrasDPMSDE": Sampler(
        kind="DPMSolverMultistepScheduler",
        label="DPM++ 2M SDE Karras",
        settings={"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "K_EULER_ANCESTRAL": Sampler(kind="EulerAncestralDiscreteScheduler", label="Euler a"),
    "K_EULER": Sampler(kind="EulerDiscreteScheduler", label="Euler"),
    "LCM": Sampler(kind="LCMScheduler", label="LCM", settings=_DISTILLED, **FEW_STEPS),
    "PNDM": Sampler(
        kind="PNDMScheduler",
        label="PLMS",
        settings={"skip_prk_steps": True, "set_alpha_to_one": False},
        zero_snr=(),
    ),
    "TCD": Sampler(kind="TCDScheduler", label="TCD", settings=_DISTILLED, **FEW_STEPS),
    "UniPC": Sampler(kind="UniPCMultistepScheduler", label="UniPC"),
}
"""Public name → sampler.

DDIM, PNDM, LCM and TCD repeat settings of SDXL's published configuration. A base that was saved with another sampler lacks them,
and diffusers' defaults would clip latents as if they were pixels.
"""


def make_scheduler(
    name: str, pipeline: "StableDiffusionXLPipeline", spacing: str = "base"
) -> "SchedulerMixin":
    """A fresh sampler of the public `name`, with the noise schedule of the pipeline's base.

    spacing: one of `SPACINGS`. A base with zero terminal SNR is always drawn with "trailing".
    """
    import diffusers

    sampler, config = SCHEDULERS[name], pipeline.scheduler.config
    # With zero terminal SNR the first step must be the one of complete noise (arXiv:2305.08891, section 3.3).
    spacing = "trailing" if has_zero_snr(config) else spacing
    spread = {} if spacing == "base" else {"timestep_spacing": spacing}
    return getattr(diffusers, sampler.kind).from_config(config, **sampler.settings, **spread)


def require_known(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a sampler that cannot draw with the noise schedule `config` of a base.

    Raises:
        UserInputError: names the samplers that can.
    """

    def can(sampler: Sampler) -> bool:
        return not has_zero_snr(config) or prediction_type(config) in sampler.zero_snr

    if not can(SCHEDULERS[name]):
        others = ", ".join(other for other, sampler in SCHEDULERS.items() if can(sampler))
        raise UserInputError(
            f"scheduler is {name}, which cannot draw with this base's zero terminal SNR: use one of {others}."
        )


def require_refinable(config: Mapping[str, Any]) -> None:
    """Refuse the refiner for a base with another noise schedule `config`: the two work on the same noisy latents.

    Raises:
        UserInputError: the base predicts v or has zero terminal SNR, which no refiner of SDXL does.
    """
    if prediction_type(config) != "epsilon" or has_zero_snr(config):
        raise UserInputError(
            "refine is set, but SDXL's refiner does not fit a base with v-prediction or zero terminal SNR: set refine to "
            "no_refiner."
        )
