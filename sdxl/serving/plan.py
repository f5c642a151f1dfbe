"""Which UNet denoises which part of a schedule: a request becomes a list of passes.

Pure arithmetic on the request; knows no models, tensors or samplers.

A schedule of n steps has the intervals 0 … n−1, from pure noise to the picture. Text to image runs all of them. Image to
image adds noise to the picture and runs only the last ones. A refiner either continues where the base stops
(expert_ensemble_refiner), or starts from the finished picture, like image to image (base_image_refiner).
"""

from dataclasses import dataclass
from typing import Literal

from sdxl.serving.request import GenerationRequest

REFINER_STRENGTH = 0.3
"""Share of its schedule that base_image_refiner runs on the finished picture."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One UNet denoises the intervals `first` to `stop` of a schedule."""

    model: Literal["base", "refiner"]
    """The UNet, and the conditioning made for it."""
    steps: int
    """Intervals of the whole schedule."""
    first: int
    stop: int
    """Exclusive; equal to `first` when there is nothing to denoise."""
    adds_noise: bool
    """Whether the pass first adds the noise of interval `first`. If not, it continues from the pass before."""


def plan_passes(request: GenerationRequest, base_intervals: int) -> list[Pass]:
    """The passes that draw `request`: one of the base, then one of the refiner if the request refines.

    base_intervals: for expert_ensemble_refiner, how many intervals of the whole schedule belong to the base
        (`sampling.intervals_above`); ignored otherwise.
    """
    steps = request.num_inference_steps
    first = 0 if request.image is None else steps - _share(steps, request.prompt_strength)
    match request.refine:
        case "no_refiner":
            return [Pass(model="base", steps=steps, first=first, stop=steps, adds_noise=True)]
        case "expert_ensemble_refiner":
            # Image to image may start below the noise level at which the refiner takes over: the base then has nothing to do.
            switch = max(first, min(steps, base_intervals))
            return [
                Pass(model="base", steps=steps, first=first, stop=switch, adds_noise=True),
                Pass(model="refiner", steps=steps, first=switch, stop=steps, adds_noise=False),
            ]
        case "base_image_refiner":
            refining = request.refine_steps or steps
            begin = refining - _share(refining, REFINER_STRENGTH)
            return [
                Pass(model="base", steps=steps, first=first, stop=steps, adds_noise=True),
                Pass(model="refiner", steps=refining, first=begin, stop=refining, adds_noise=True),
            ]


def _share(steps: int, strength: float) -> int:
    """How many of `steps` run at `strength`, 0 to 1: at least one, unless it is 0."""
    return max(1, min(int(steps * strength), steps)) if strength > 0 else 0
