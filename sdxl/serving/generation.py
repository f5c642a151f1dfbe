"""Request → pictures: text to image, image to image and inpainting, each with or without the refiner.

Knows what a request may ask for and the order of the steps; does not know where weights come from, or cog.
"""

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, get_args

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from dataset_and_utils import TokenMap
from sdxl.errors import UserInputError, WeightsError
from sdxl.serving.canvas import MULTIPLE, SIDES, latent_mask, padded, put_back
from sdxl.serving.conditioning import for_base, for_refiner
from sdxl.serving.pipeline import SCHEDULERS, make_scheduler
from sdxl.serving.placement import lent
from sdxl.serving.sampling import Kept, begin, course, denoise, intervals_above, noise_like

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

log = logging.getLogger(__name__)

P = ParamSpec("P")

Refine = Literal["no_refiner", "expert_ensemble_refiner", "base_image_refiner"]

REFINER_STRENGTH = 0.3
"""Share of `refine_steps` that base_image_refiner runs on the finished picture."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What to draw, validated."""

    prompt: str
    negative_prompt: str = ""
    """What to keep out; the empty string for nothing."""
    width: int
    """Pixels, 64 to 2048; without `image` a multiple of 8."""
    height: int
    """Pixels, 64 to 2048; without `image` a multiple of 8."""
    image: Image.Image | None = None
    """RGB picture of `width` × `height` to start from."""
    mask: Image.Image | None = None
    """Black and white, of the same size: white is repainted."""
    prompt_strength: float = 0.8
    """Share of the steps that is run on `image`, 0 to 1; 1 leaves nothing of it."""
    num_outputs: int = 1
    """Pictures, 1 to 4."""
    scheduler: str = "K_EULER"
    """A key of `pipelines.SCHEDULERS`."""
    num_inference_steps: int = 50
    """1 to 500."""
    guidance_scale: float = 7.5
    """Classifier-free guidance (arXiv:2207.12598), 1 (off) to 50."""
    seed: int
    """Picture i is drawn from the seed `seed + i`, whatever the number of pictures; 0 to 2³²−1."""
    refine: Refine = "no_refiner"
    """Whether the refiner takes over for the last of the noise, or goes over the finished picture."""
    high_noise_frac: float = 0.8
    """Share of the noise that the base takes away before the refiner does (expert_ensemble_refiner), 0 to 1."""
    refine_steps: int | None = None
    """Steps of base_image_refiner, of which it runs 30 %; None for `num_inference_steps`."""

    def __post_init__(self) -> None:
        step = 1 if self.image is not None else MULTIPLE
        for name in ("width", "height"):
            value = getattr(self, name)
            if not SIDES[0] <= value <= SIDES[1] or value % step:
                raise UserInputError(
                    f"{name} is {value}, but must be a multiple of 8 from 64 to 2048, such as 1024."
                )
        ranges = {
            "prompt_strength": (0, 1),
            "num_outputs": (1, 4),
            "num_inference_steps": (1, 500),
            "guidance_scale": (1, 50),
            "seed": (0, 2**32 - 1),
            "high_noise_frac": (0, 1),
            "refine_steps": (1, 500),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserInputError(f"{name} is {value}, but must be from {low} to {high}.")
        for name, known in (("scheduler", tuple(SCHEDULERS)), ("refine", get_args(Refine))):
            if getattr(self, name) not in known:
                raise UserInputError(
                    f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(known)}."
                )
        if self.mask is not None and self.image is None:
            raise UserInputError("mask is given without image: give the picture that the mask belongs to.")


@torch.no_grad()
def draw(
    pipeline: "StableDiffusionXLPipeline",
    request: GenerationRequest,
    token_map: TokenMap,
    refiner: UNet2DConditionModel | None = None,
    *,
    at_once: int = 4,
    runner: Callable[[UNet2DConditionModel], Callable[..., Any]] = lambda unet: unet,
) -> Generator[Image.Image]:
    """Draw the request's pictures with the weights that are in `pipeline`; the map's words become its tokens. Each picture is
    given as soon as it is decoded: while the next one is, something can be done with it.

    `refiner` is needed where the request refines. At most `at_once` pictures share a call of the UNet, or of what
    `runner` gives for it.

    Raises:
        WeightsError: the weights give no picture, only overflowing numbers; or the refiner does not fit the base.
    """
    prompt = token_map.substitute(request.prompt)
    if prompt != request.prompt:
        log.info("Prompt with the trained tokens put in: %s", prompt)
    elif "<s" not in prompt and (words := ", ".join(token_map.placeholders)):
        log.info(
            "The prompt names nothing that the fine-tune knows by name: write %s, in the same case", words
        )
    texts = (prompt, token_map.substitute(request.negative_prompt))
    if pipeline.vae.config["force_upcast"] and pipeline.vae.dtype == torch.float16:
        pipeline.vae.to(dtype=torch.bfloat16)  # SDXL's overflows in fp16, to black pictures
    try:
        for first in range(0, request.num_outputs, at_once):
            seeds = [request.seed + i for i in range(first, min(first + at_once, request.num_outputs))]
            yield from _draw(pipeline, refiner, request, texts, seeds, runner)
    finally:
        pipeline.maybe_free_model_hooks()


def _all_of(drawing: Callable[P, Iterable[Image.Image]]) -> Callable[P, list[Image.Image]]:
    def pictures(*args: P.args, **kwargs: P.kwargs) -> list[Image.Image]:
        return list(drawing(*args, **kwargs))

    return pictures


generate = _all_of(draw)
"""All pictures of `draw`, which has the same arguments, in a list."""


def _draw(
    pipeline: Any,
    refiner: UNet2DConditionModel | None,
    request: GenerationRequest,
    texts: tuple[str, str],
    seeds: list[int],
    runner: Callable[[UNet2DConditionModel], Callable[..., Any]],
) -> Iterator[Image.Image]:
    """One batch, picture i from `seeds[i]`."""
    device = pipeline._execution_device  # found by looking at all modules: asked once
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    image = None if request.image is None else padded(request.image)
    width, height = image.size if image is not None else (request.width, request.height)
    told = {
        "texts": texts,
        "guidance_scale": request.guidance_scale,
        "count": len(seeds),
        "size": (height, width),
        "device": device,
    }
    conditioning = for_base(pipeline, **told)
    image_latents = None
    if image is not None:
        image_latents = _encode(pipeline, image, device, conditioning.embeds.dtype, len(seeds))
    shape = (len(seeds), 4, height // MULTIPLE, width // MULTIPLE)
    noise = noise_like(torch.empty(shape, device=device, dtype=conditioning.embeds.dtype), generators)
    kept = None
    if request.mask is not None:
        assert image_latents is not None
        cells = torch.from_numpy(latent_mask(padded(request.mask)))[None, None]
        kept = Kept(latents=image_latents, noise=noise, mask=cells.to(noise))

    steps = request.num_inference_steps
    start = 0 if image is None else steps - _share(steps, request.prompt_strength)
    fresh = _schedule(pipeline, request, steps, device)
    split = steps
    if request.refine == "expert_ensemble_refiner":
        split = max(start, min(steps, intervals_above(fresh, request.high_noise_frac)))
    whole = image is not None and request.prompt_strength == 1  # nothing of the picture stays
    latents = begin(fresh, course(fresh, start, steps), None if whole else image_latents, noise)

    passes = [(pipeline.unet, conditioning, steps, start, split)]
    if request.refine != "no_refiner":
        assert refiner is not None, "the caller loads the refiner"
        refining = for_refiner(pipeline, refiner, **told)
        n = steps if request.refine == "expert_ensemble_refiner" else request.refine_steps or steps
        begins = split if request.refine == "expert_ensemble_refiner" else n - _share(n, REFINER_STRENGTH)
        passes.append((refiner, refining, n, begins, n))
    for unet, conditions, n, first, last in passes:
        scheduler = _schedule(pipeline, request, n, device)
        planned = course(scheduler, first, last)
        if request.refine == "base_image_refiner" and unet is refiner:
            latents = begin(scheduler, planned, latents, noise_like(latents, generators))
        where = lent(unet, pipeline) if unet is refiner else nullcontext()
        with where, pipeline.progress_bar(total=len(planned.timesteps)) as bar:
            latents = denoise(
                runner(unet),
                scheduler,
                planned,
                latents,
                conditions,
                generators=generators,
                kept=kept,
                on_call=bar.update,
            )
    for picture in _decode(pipeline, latents):
        yield _finish(picture, request)


def _share(steps: int, strength: float) -> int:
    """How many of `steps` run at `strength`: at least one, unless it is 0."""
    return max(1, min(int(steps * strength), steps)) if strength > 0 else 0


def _schedule(pipeline: Any, request: GenerationRequest, steps: int, device: torch.device) -> Any:
    scheduler: Any = make_scheduler(request.scheduler, pipeline)
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def _encode(
    pipeline: Any, image: Image.Image, device: torch.device, dtype: torch.dtype, count: int
) -> Tensor:
    """Latents [count, 4, h, w] of a picture: the mean of the autoencoder's posterior, scaled."""
    vae = pipeline.vae
    pixels = pipeline.image_processor.preprocess(image).to(device, vae.dtype)
    return (
        (vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor).to(dtype).repeat(count, 1, 1, 1)
    )


def _decode(pipeline: Any, latents: Tensor) -> Iterator[Image.Image]:
    vae = pipeline.vae
    if not torch.isfinite(latents).all():
        raise WeightsError(
            "These weights give no picture, only overflowing numbers: lower lora_scale, or train with lower rates."
        )
    under_way = (
        _to_host(vae.decode(one, return_dict=False)[0])
        for one in (latents.to(vae.dtype) / vae.config.scaling_factor).split(1)
    )
    if (
        latents.is_cuda
    ):  # all are begun before the first is waited for: it decodes on while those are worked on
        under_way = list(under_way)
    for levels, arrived in under_way:
        arrived()
        yield Image.fromarray(levels.numpy())


def _to_host(decoded: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """A picture [1, 3, h, w] of −1 to 1 as levels [h, w, 3] of 0 to 255 on the CPU, and what waits until they are there."""
    levels = ((decoded[0].float() * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    if not levels.is_cuda:
        return levels.contiguous(), lambda: None
    on_host = levels.contiguous().to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return on_host, copied.synchronize


def _finish(picture: Image.Image, request: GenerationRequest) -> Image.Image:
    """Cut the padding off, and lay the picture over the one it repaints."""
    picture = picture.crop((0, 0, request.width, request.height))
    if request.mask is not None and request.image is not None:
        return put_back(picture, request.image, request.mask)
    return picture
