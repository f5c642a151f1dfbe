"""Checks of drawing: pictures equal diffusers', fp8 keeps the UNet's inputs, the refiner's passes."""

from __future__ import annotations

import time
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from benchmarks.real.findings import Notes, check
from benchmarks.real.setup import Setup, level_difference, relative_error
from dataset_and_utils import TokenMap
from sdxl.model.components import load_unet
from sdxl.serving.conditioning import Prompts, for_base
from sdxl.serving.denoising import Conditioning
from sdxl.serving.request import FineTuneOptions, GenerationRequest
from sdxl.speed import fp8

PROMPT = "a photo of a blue car on a green background"
"""Plain enough for a miniature."""
GUIDANCE = 5.0
TIMESTEPS = (900, 500, 100)
"""Noise levels at which a single call of the UNet is looked at."""
MOST_LEVELS = 4.0
"""Mean difference, in levels of 255, that nobody sees between two ways to draw the same picture."""


@check("Does the base draw, and the same picture as diffusers does?")
def drawing(setup: Setup, notes: Notes) -> None:
    """A picture by our serving next to one by diffusers' pipeline, in the same precision; and what it takes."""
    painter = setup.painter
    painter.warm_up()
    ask = request(setup, PROMPT)
    started = time.monotonic()
    ours = next(iter(painter.draw(ask, FineTuneOptions())))
    seconds = time.monotonic() - started
    notes.fact(
        f"seconds for a picture of {setup.side}×{setup.side} in {ask.num_inference_steps} steps", seconds
    )
    if torch.cuda.is_available():
        notes.fact("GPU memory while drawing, GiB", torch.cuda.max_memory_reserved() / 2**30)
    precision = painter.tuned.pipeline.unet.dtype
    del painter  # so that its memory is free for the other pipeline
    setup.release()
    theirs = plain_picture(setup, setup.plain_pipeline(precision), PROMPT)
    notes.between("spread of the picture, levels of 255", 5, 128, float(np.asarray(ours, dtype=float).std()))
    notes.at_most(
        "difference from diffusers' picture, levels of 255", MOST_LEVELS, level_difference(ours, theirs)
    )
    notes.picture(ours, f"ours: {PROMPT}")
    notes.picture(theirs, "diffusers, the same seed")


@check("Do the inputs of the UNet's linear layers fit into fp8, as SDXL_SPEED=fp8 assumes?")
def fp8_range(setup: Setup, notes: Notes) -> None:
    """The share of inputs that e4m3 with a fixed scale clips, and what rounding does to the UNet's prediction."""
    pipeline = setup.painter.tuned.pipeline
    told = conditioning(setup, pipeline, PROMPT)
    precision = pipeline.unet.dtype
    del pipeline
    setup.release()
    unet = load_unet(setup.base.folder, precision, setup.device)
    layers = fp8.Fp8Layers(unet)._layers
    noisy = _noisy(setup)
    count = clipped = coarse = 0
    largest = 0.0

    def plain(layer: nn.Linear, x: Tensor) -> Tensor:
        nonlocal count, clipped, coarse, largest
        size = x.detach().abs()
        count += size.numel()
        clipped += int((size > fp8._INPUT_SCALE * fp8.LARGEST).sum())
        coarse += int((size < fp8._INPUT_SCALE / 64).sum())
        largest = max(largest, float(size.max()))
        return F.linear(x, layer.weight, layer.bias)

    def rounded(layer: Any, x: Tensor) -> Tensor:
        near = fp8._to_fp8(x, fp8._INPUT_SCALE).to(x.dtype) * fp8._INPUT_SCALE
        weight = layer.fp8_weight.float() * layer.fp8_scale  # the scale is too small for fp16
        return F.linear(near, weight.to(x.dtype), layer.bias)

    predicted = {}
    for way in (plain, rounded):
        for layer in layers:
            layer.forward = MethodType(way, layer)
        predicted[way] = [_predict(unet, one, when, told) for one, when in zip(noisy, TIMESTEPS, strict=True)]
    notes.fact("layers that multiply in fp8", len(layers))
    notes.expect("largest input is finite", "yes", largest, bool(np.isfinite(largest)))
    notes.at_most("inputs that are clipped", 0.0001, 100 * clipped / count, unit=" %")
    notes.fact("inputs small enough to be rounded more coarsely, %", 100 * coarse / count)
    for when, exact, near in zip(TIMESTEPS, *predicted.values(), strict=True):
        notes.at_most(
            f"error of the prediction at timestep {when}", 15, relative_error(near, exact), unit=" %"
        )


@check("Do both ways to use the refiner give a picture that resembles the base's?")
def refiner(setup: Setup, notes: Notes) -> None:
    """The refiner at the end of the noise, and the refiner on a finished picture."""
    painter = setup.painter
    unrefined = next(iter(painter.draw(request(setup, PROMPT), FineTuneOptions())))
    notes.picture(unrefined, "base alone")
    for way in ("expert_ensemble_refiner", "base_image_refiner"):
        refined = next(iter(painter.draw(request(setup, PROMPT, refine=way), FineTuneOptions())))
        notes.picture(refined, way)
        notes.between(f"{way}: change, levels of 255", 0.1, 60, level_difference(refined, unrefined))
        notes.between(f"{way}: correlation with the base's picture", 0.5, 1, _correlation(refined, unrefined))


def request(setup: Setup, prompt: str, **more: Any) -> GenerationRequest:
    """One picture of the prompt, always from the same seed."""
    given = {"num_inference_steps": setup.sampling_steps, "guidance_scale": GUIDANCE, "seed": 0} | more
    return GenerationRequest(prompt=prompt, width=setup.side, height=setup.side, **given)


def plain_picture(setup: Setup, pipeline: Any, prompt: str) -> Image.Image:
    """The picture of `request` by diffusers' own pipeline."""
    if setup.is_miniature or setup.device.type == "cpu":
        pipeline.to(setup.device)
    else:
        pipeline.enable_model_cpu_offload(device=setup.device)
    return pipeline(
        prompt,
        width=setup.side,
        height=setup.side,
        num_inference_steps=setup.sampling_steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator(setup.device).manual_seed(0),
    ).images[0]


def conditioning(setup: Setup, pipeline: Any, prompt: str) -> Conditioning:
    """A prompt as the base's UNet takes it, without guidance."""
    prompts = Prompts(
        prompt=prompt,
        negative_prompt="",
        token_map=TokenMap({}),
        guidance_scale=1.0,
        guidance_rescale=0.0,
        count=1,
        size=(setup.side, setup.side),
        device=setup.device,
    )
    return for_base(pipeline, prompts)


def _noisy(setup: Setup) -> list[Tensor]:
    """The photograph's latents with the noise of each of `TIMESTEPS`."""
    vae = setup.autoencoder(torch.float32)
    clean = vae.encode(setup.photo_pixels()).latent_dist.mode() * vae.config.scaling_factor
    schedule: Any = DDPMScheduler.from_config(setup.base.schedule)
    generator = torch.Generator(clean.device).manual_seed(0)
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    return [schedule.add_noise(clean, noise, torch.tensor([when], device=clean.device)) for when in TIMESTEPS]


def _predict(unet: Any, latents: Tensor, when: int, told: Conditioning) -> Tensor:
    return unet(
        latents.to(unet.dtype),
        torch.tensor(when, device=latents.device),
        encoder_hidden_states=told.embeds,
        added_cond_kwargs={"text_embeds": told.pooled, "time_ids": told.time_ids},
        return_dict=False,
    )[0]


def _correlation(one: Image.Image, other: Image.Image) -> float:
    first, second = (np.asarray(picture, dtype=float).ravel() for picture in (one, other))
    if not first.std() or not second.std():
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])
