"""Options of a request that have no effect or do not go together, in one sentence each.

Knows options and their defaults; does not know models. An input that is left out looks like one that was given with its
default, so only values that differ from their defaults are looked at.
"""

from collections.abc import Iterator
from typing import Any

from sdxl.serving.prompt_lists import EXAMPLE_PROMPT
from sdxl.serving.request import DeliveryOptions, DrawingOptions, LayoutOptions
from sdxl.serving.samplers import SCHEDULERS
from sdxl.serving.shortcuts import FEWEST_STEPS


def without_effect(
    drawing: DrawingOptions, layout: LayoutOptions, delivery: DeliveryOptions
) -> Iterator[str]:
    """A sentence for each option that the others leave without effect, or that spoils the pictures beside them."""
    if drawing.prompts.strip() and drawing.prompt not in ("", EXAMPLE_PROMPT):
        yield "prompt has no effect beside prompts: add it to them."
    if layout.image is None:
        if _changed(drawing, "prompt_strength"):
            yield "prompt_strength has no effect without image."
    elif drawing.prompt_strength == 1 and layout.mask is None:
        yield "image gives at most the size, because prompt_strength is 1."
    yield from _of_mask(layout)
    if drawing.refine != "expert_ensemble_refiner" and _changed(drawing, "high_noise_frac"):
        yield "high_noise_frac has no effect without refine=expert_ensemble_refiner."
    if drawing.refine == "expert_ensemble_refiner" and drawing.high_noise_frac == 1:
        yield "The refiner has nothing to do, because high_noise_frac is 1."
    if drawing.refine != "base_image_refiner" and _changed(drawing, "refine_steps"):
        yield "refine_steps has no effect without refine=base_image_refiner."
    yield from _of_guidance(drawing)
    yield from _of_speed(drawing)
    if SCHEDULERS[drawing.scheduler].most_steps and _changed(drawing, "timestep_spacing"):
        yield f"timestep_spacing has no effect on {drawing.scheduler}, which has its own."
    if delivery.output_format == "png" and _changed(delivery, "output_quality"):
        yield "output_quality has no effect on png, which is lossless."


def _of_mask(layout: LayoutOptions) -> Iterator[str]:
    if layout.mask is None:
        for name in ("mask_blur", "mask_invert", "only_masked"):
            if _changed(layout, name):
                yield f"{name} has no effect without mask or transparent areas of image."
    if not (layout.only_masked and layout.mask) and _changed(layout, "mask_padding"):
        yield "mask_padding has no effect without only_masked and a mask."


def _of_speed(drawing: DrawingOptions) -> Iterator[str]:
    steps = drawing.num_inference_steps
    # Heun calls the UNet twice at each timestep, so the second call can reuse features however few steps there are.
    if drawing.speed == "fast" and steps < FEWEST_STEPS and drawing.scheduler != "HeunDiscrete":
        yield f"speed=fast saves little with {steps} steps: it is for {FEWEST_STEPS} and more."


def _of_guidance(drawing: DrawingOptions) -> Iterator[str]:
    scale, most = drawing.guidance_scale, SCHEDULERS[drawing.scheduler].most_guidance
    if scale <= 1 and drawing.negative_prompt:
        yield f"negative_prompt has no effect, because guidance_scale is {scale:g}."
    if scale <= 1 and _changed(drawing, "guidance_rescale"):
        yield f"guidance_rescale has no effect, because guidance_scale is {scale:g}."
    if most is not None and scale > most:
        yield (
            f"guidance_scale is {scale:g}, but {drawing.scheduler} is for weights that need 0 to {most:g}: more overexposes."
        )


def _changed(options: Any, name: str) -> bool:
    """Whether the value of `name` differs from its default."""
    return getattr(options, name) != getattr(type(options), name)
