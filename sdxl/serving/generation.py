"""A request becomes pictures: text to image, image to image and inpainting, each with or without the refiner.

Knows the order of the work: prompts, latents, passes, decoding. Does not know where weights come from, or Cog.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from dataset_and_utils import TokenMap
from sdxl.errors import WeightsError
from sdxl.model.prompt_chunks import States, states_of
from sdxl.serving.canvas import padded
from sdxl.serving.conditioning import Prompts, for_base, for_refiner
from sdxl.serving.denoising import (
    Conditioning,
    Kept,
    begin,
    course,
    denoise,
    intervals_above,
    noise_like,
)
from sdxl.serving.masks import latent_mask, surroundings_of
from sdxl.serving.placement import lent
from sdxl.serving.plan import plan_passes
from sdxl.serving.prompt_texts import tell_of_prompts
from sdxl.serving.request import MULTIPLE, GenerationRequest
from sdxl.serving.samplers import make_scheduler
from sdxl.serving.shallow_unet import ReusingUNet
from sdxl.serving.shortcuts import fast_calls

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

Runner = Callable[[UNet2DConditionModel], Callable[..., Any]]
"""Gives what to call instead of a UNet: a `ReusingUNet` or, such as a `Runners`, something that is called like one."""


def generate(
    pipeline: "StableDiffusionXLPipeline",
    request: GenerationRequest,
    token_map: TokenMap,
    refiner: UNet2DConditionModel | None = None,
    *,
    at_once: int = 4,
    runner: Runner = ReusingUNet,
    states: States = states_of,
) -> list[Image.Image]:
    """All pictures of `draw`, which has the same arguments, in a list."""
    return list(draw(pipeline, request, token_map, refiner, at_once=at_once, runner=runner, states=states))


@torch.no_grad()
def draw(
    pipeline: "StableDiffusionXLPipeline",
    request: GenerationRequest,
    token_map: TokenMap,
    refiner: UNet2DConditionModel | None = None,
    *,
    first: int = 0,
    at_once: int = 4,
    runner: Runner = ReusingUNet,
    states: States = states_of,
) -> Generator[Image.Image]:
    """Draw the request with the weights that are in `pipeline`, and yield each picture as soon as it is decoded.

    token_map: gives the placeholder tokens of the words in the prompts.
    refiner: the refiner's UNet, needed if the request refines.
    first: the first picture to draw, counted from 0.
    at_once: most pictures in one call of the UNet.
    runner: gives what to call instead of a UNet.
    states: runs the text encoders.

    Raises:
        WeightsError: the weights give numbers that overflow, or the refiner does not fit the base.
    """
    tell_of_prompts(request, token_map, pipeline)

    try:
        for start in range(first, request.num_outputs, at_once):
            seeds = [request.seed_of(i) for i in range(start, min(start + at_once, request.num_outputs))]
            yield from _draw_batch(pipeline, refiner, request, token_map, seeds, runner, states)
    finally:
        pipeline.maybe_free_model_hooks()


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """What b pictures start from."""

    prompts: Prompts
    base_conditioning: Conditioning
    generators: list[torch.Generator]
    """One per picture, so that a picture does not depend on the number of pictures."""
    noise: Tensor
    """The noise of the first pass [b, 4, h, w]."""
    image_latents: Tensor | None
    """Latents of the input picture [b, 4, h, w]."""
    kept: Kept | None
    """The part of the input picture that inpainting keeps."""


def _draw_batch(
    pipeline: Any,
    refiner: UNet2DConditionModel | None,
    request: GenerationRequest,
    token_map: TokenMap,
    seeds: list[int],
    runner: Runner,
    states: States,
) -> Iterator[Image.Image]:
    """Draw one batch, picture i from `seeds[i]`."""
    device = pipeline._execution_device  # asked once: the pipeline searches all its modules for it
    batch = _prepare(pipeline, request, token_map, seeds, device, states)

    # The base runs the first pass, the refiner may run a second one: see `plan`.
    passes = plan_passes(request, _base_intervals(pipeline, request, device))
    models = {"base": (pipeline.unet, batch.base_conditioning)}
    if request.refine != "no_refiner":
        assert refiner is not None, "the caller loads the refiner"
        models["refiner"] = (refiner, for_refiner(pipeline, refiner, batch.prompts))

    latents = batch.image_latents if request.starts_from_image else None
    kept = batch.kept
    for one in passes:
        # The noise level of a pass depends on where it starts in the schedule, not on where it stops.
        scheduler = _schedule(pipeline, request, one.steps, device)
        if one.adds_noise:
            noise = batch.noise
            if one.model == "refiner" and latents is not None:
                noise = noise_like(latents, batch.generators)  # a new one, for the finished picture
            latents = begin(scheduler, course(scheduler, one.first, one.steps), latents, noise)
        assert latents is not None, "the first pass adds noise"
        planned = course(scheduler, one.first, one.stop)
        if kept is not None and kept.begin is None and len(planned.timesteps):
            kept = replace(kept, begin=planned.timesteps[0])
        calls = fast_calls(planned.timesteps.tolist()) if request.speed == "fast" else None

        # The refiner is not part of the pipeline: with offloading it goes to the GPU only for its pass.
        unet, conditioning = models[one.model]
        where = lent(unet, pipeline) if one.model == "refiner" else nullcontext()
        with where, pipeline.progress_bar(total=len(planned.timesteps)) as bar:
            latents = denoise(
                runner(unet),
                scheduler,
                planned,
                latents,
                conditioning,
                generators=batch.generators,
                calls=calls,
                kept=kept,
                on_call=bar.update,
            )

    assert latents is not None
    for picture in decode(pipeline, latents):
        yield _finish(picture, request)


def _prepare(
    pipeline: Any,
    request: GenerationRequest,
    token_map: TokenMap,
    seeds: list[int],
    device: torch.device,
    states: States,
) -> _Batch:
    """Encode the prompts and the input picture, and draw the first noise."""
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    # A latent pixel is 8 pixels wide: pad an input picture of another size, and crop the result at the end.
    image = None if request.image is None else padded(request.image)
    height, width = (request.height, request.width) if image is None else (image.height, image.width)
    prompts = Prompts(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        token_map=token_map,
        prompt_weights=request.prompt_weights,
        guidance_scale=request.guidance_scale,
        guidance_rescale=request.guidance_rescale,
        count=len(seeds),
        size=(height, width),
        device=device,
        states=states,
    )
    conditioning = for_base(pipeline, prompts)
    dtype = conditioning.embeds.dtype

    image_latents = None
    if image is not None:
        image_latents = _encode(pipeline, image, device, dtype, len(seeds))
    shape = (len(seeds), 4, height // MULTIPLE, width // MULTIPLE)
    noise = noise_like(torch.empty(shape, device=device, dtype=dtype), generators)

    # Inpainting needs the first noise in every step, for the part of the picture that it keeps.
    kept = None
    if request.mask is not None:
        assert image_latents is not None
        cells = torch.from_numpy(latent_mask(padded(request.mask)))[None, None]
        kept = Kept(latents=image_latents, noise=noise, mask=cells.to(noise))
    return _Batch(
        prompts=prompts,
        base_conditioning=conditioning,
        generators=generators,
        noise=noise,
        image_latents=image_latents,
        kept=kept,
    )


def _base_intervals(pipeline: Any, request: GenerationRequest, device: torch.device) -> int:
    """How many intervals of the whole schedule belong to the base."""
    steps = request.num_inference_steps
    if request.refine != "expert_ensemble_refiner":
        return steps
    return intervals_above(_schedule(pipeline, request, steps, device), request.high_noise_frac)


def _schedule(pipeline: Any, request: GenerationRequest, steps: int, device: torch.device) -> Any:
    """A fresh scheduler of the request's sampler, with `steps` intervals."""
    scheduler: Any = make_scheduler(request.scheduler, pipeline, request.timestep_spacing)
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def _encode(
    pipeline: Any, image: Image.Image, device: torch.device, dtype: torch.dtype, count: int
) -> Tensor:
    """The latents [count, 4, h, w] of a picture: the mean of the autoencoder's posterior, scaled."""
    vae = pipeline.vae
    pixels = pipeline.image_processor.preprocess(image).to(device, vae.dtype)
    with _own_precision(device):
        latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    return latents.to(dtype).repeat(count, 1, 1, 1)


def decode(pipeline: Any, latents: Tensor) -> Iterator[Image.Image]:
    """Decode latents [b, 4, h, w] one by one; yield each picture as soon as it is on the CPU."""
    vae = pipeline.vae
    if not torch.isfinite(latents).all():
        raise WeightsError(
            "These weights give no picture, only overflowing numbers: lower lora_scale, or train with lower rates."
        )

    def queued(one: Tensor) -> tuple[Tensor, Callable[[], object]]:
        with _own_precision(latents.device):
            return _to_host(vae.decode(one, return_dict=False)[0])

    under_way = (queued(one) for one in (latents.to(vae.dtype) / vae.config.scaling_factor).split(1))
    # On a GPU, queue all pictures at once: it decodes the next ones while the caller works on the first.
    if latents.is_cuda:
        under_way = list(under_way)
    for levels, wait in under_way:
        wait()
        yield Image.fromarray(levels.numpy())


def _own_precision(device: torch.device) -> torch.autocast:
    """The autoencoder computes in the precision of its weights, also where training draws under autocast."""
    return torch.autocast(device.type, enabled=False)


def _to_host(decoded: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """Start to copy a decoded picture to the CPU.

    decoded: [1, 3, h, w], −1 to 1.

    Returns:
        Its levels [h, w, 3], 0 to 255, and a function that waits until they are there.
    """
    levels = ((decoded[0].float() * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    if not levels.is_cuda:
        return levels.contiguous(), lambda: None
    on_host = levels.contiguous().to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return on_host, copied.synchronize


def _finish(picture: Image.Image, request: GenerationRequest) -> Image.Image:
    """Crop the padding, and put an inpainted picture back into the original."""
    picture = picture.crop((0, 0, request.width, request.height))
    around = surroundings_of(request)
    return picture if around is None else around.put_back(picture)
