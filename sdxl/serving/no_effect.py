"""Options of a request that have no effect, in one sentence each.

Knows options and their defaults; does not know models. An input that is left out looks like one that was given with its
default, so only values that differ from their defaults are looked at.
"""

from collections.abc import Iterator
from typing import Any

from sdxl.serving.request import DeliveryOptions, DrawingOptions, LayoutOptions


def without_effect(
    drawing: DrawingOptions, layout: LayoutOptions, delivery: DeliveryOptions
) -> Iterator[str]:
    """A sentence for each option that the others leave without effect."""
    if layout.image is None:
        if _changed(drawing, "prompt_strength"):
            yield "prompt_strength has no effect without image."
    elif drawing.prompt_strength == 1 and layout.mask is None:
        yield "image gives at most the size, because prompt_strength is 1."
    if drawing.refine != "expert_ensemble_refiner" and _changed(drawing, "high_noise_frac"):
        yield "high_noise_frac has no effect without refine=expert_ensemble_refiner."
    if drawing.refine == "expert_ensemble_refiner" and drawing.high_noise_frac == 1:
        yield "The refiner has nothing to do, because high_noise_frac is 1."
    if drawing.refine != "base_image_refiner" and _changed(drawing, "refine_steps"):
        yield "refine_steps has no effect without refine=base_image_refiner."
    if drawing.guidance_scale == 1 and drawing.negative_prompt:
        yield "negative_prompt has no effect, because guidance_scale is 1."
    if drawing.guidance_scale == 1 and _changed(drawing, "guidance_rescale"):
        yield "guidance_rescale has no effect, because guidance_scale is 1."
    if delivery.output_format == "png" and _changed(delivery, "output_quality"):
        yield "output_quality has no effect on png, which is lossless."


def _changed(options: Any, name: str) -> bool:
    """Whether the value of `name` differs from its default."""
    return getattr(options, name) != getattr(type(options), name)
