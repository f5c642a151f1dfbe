"""The painter: one loaded base that draws requests, with or without fine-tunes.

Owns the pipeline, the fine-tunes applied to it, the runners of its UNets, the refiner and the placement, and keeps them in
step. Does not know Cog, or what happens to a picture after it is drawn.
"""

import logging
import time
import traceback
from collections.abc import Generator, Sequence

from diffusers import UNet2DConditionModel
from PIL import Image

from sdxl import settings
from sdxl.errors import NotEnoughMemoryError
from sdxl.files import pipelines
from sdxl.model.bases import find_base
from sdxl.model.components import native_resolution
from sdxl.model.noise_schedule import has_zero_snr
from sdxl.serving.fine_tune_cache import FineTuneCache
from sdxl.serving.generation import draw, generate
from sdxl.serving.pipeline import load_pipeline, load_refiner
from sdxl.serving.placement import in_tiles, placement_here, ways_to_draw
from sdxl.serving.request import FineTuneOptions, GenerationRequest
from sdxl.serving.samplers import require_known, require_refinable
from sdxl.serving.tuned_pipeline import ScaledFineTune, TunedPipeline, in_text_encoder, require_loras
from sdxl.serving.unet_runner import Runners, speed_here
from sdxl.speed.compiled_blocks import fuse_blocks

log = logging.getLogger(__name__)

SMALLEST_REAL_BASE = 512
"""Pixels; a base made for smaller pictures is a miniature."""
WARMING_STEPS = {"exact": 1, "fast": 26}
"""Steps of a warm-up picture: a call of the UNet of each kind, so that all are captured."""


class Painter:
    """Draws requests with the base, plus the fine-tunes that each request names."""

    def __init__(self, *, weights: str | None = None) -> None:
        """Load the base that `SDXL_BASE` names.

        weights: source of the fine-tune for requests that name none.

        Raises:
            UserInputError: a setting is wrong, or the base or the fine-tune cannot be fetched or read.
        """
        self.base = find_base(settings.base_name())
        self.native_resolution = native_resolution(self.base.folder)
        """Side in pixels of the pictures that the base was made for."""
        self.placement = placement_here()
        self.tuned = TunedPipeline(load_pipeline(self.base.folder, self.placement, **self.base.replaced()))
        self.refiner: UNet2DConditionModel | None = None
        self.fine_tunes = FineTuneCache(settings.cache_folder(), settings.cache_limits(), self.tuned.load)
        self.default_fine_tune = self.fine_tunes.get(weights) if weights else None
        self.runners = Runners(speed_here(self.placement), self.placement.device)
        if self.runners.speed != "eager":
            fuse_blocks(self.tuned.pipeline.vae)
        log.info("Serving %s: %s", self.base.name, self.placement.describe())

    @property
    def is_miniature(self) -> bool:
        """Whether the base is a small one for tests and demos, rather than a real SDXL."""
        return self.native_resolution < SMALLEST_REAL_BASE

    def warm_up(self) -> None:
        """Compile, and capture one picture of the base's own size, exact and fast, so that the first request does not wait.

        The kernels serve all other sizes and numbers of pictures too. These are captured when they first come up.
        """
        if self.runners.speed == "eager":
            return
        started = time.monotonic()
        side = self.native_resolution
        for speed, steps in WARMING_STEPS.items():
            request = GenerationRequest(
                prompt="",
                width=side,
                height=side,
                speed=speed,
                num_inference_steps=steps,
                seed=0,
            )
            with self.runners.warming(self.tuned.pipeline.unet):
                generate(
                    self.tuned.pipeline,
                    request,
                    self.tuned.token_map,
                    runner=self.runners,
                    states=self.runners.encoders,
                )
        log.info("Warmed up (%s) in %.1f s", self.runners.speed, time.monotonic() - started)

    def draw(self, request: GenerationRequest, options: FineTuneOptions) -> Generator[Image.Image]:
        """`draw_all` for one request."""
        return self.draw_all([request], options)

    def draw_all(
        self, requests: Sequence[GenerationRequest], options: FineTuneOptions
    ) -> Generator[Image.Image]:
        """Apply the fine-tunes that `options` name, and return the pictures, drawn one after another.

        requests: at least one; they differ in their prompts only.

        Raises:
            UserInputError: a fine-tune or the refiner cannot be fetched, or it or the sampler does not fit the base.
        """
        request = requests[0]
        config = self.tuned.pipeline.scheduler.config
        require_known(request.scheduler, config)
        if request.timestep_spacing not in ("base", "trailing") and has_zero_snr(config):
            log.warning("timestep_spacing has no effect on this base: zero terminal SNR needs trailing.")
        refiner = None if request.refine == "no_refiner" else self._refiner()
        self.apply(options)
        return (picture for one in requests for picture in self._drawn(one, refiner))

    def _drawn(
        self, request: GenerationRequest, refiner: UNet2DConditionModel | None
    ) -> Generator[Image.Image]:
        """The pictures of `request`. When memory runs out, go on in a way that needs less."""
        done = 0
        ways = ways_to_draw(min(self.placement.at_once, request.num_outputs))
        for number, (at_once, tiled) in enumerate(ways, start=1):
            try:
                with in_tiles(self.tuned.pipeline.vae, tiled):
                    for picture in draw(
                        self.tuned.pipeline,
                        request,
                        self.tuned.token_map,
                        refiner,
                        first=done,
                        at_once=at_once,
                        runner=self.runners,
                        states=self.runners.encoders,
                    ):
                        yield picture
                        done += 1
                return
            except (RuntimeError, MemoryError) as error:
                if NotEnoughMemoryError.behind(error) is None:
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold the tensors that fill the memory
                self.runners.forget()
                if number == len(ways):
                    raise
                fewer, tiles = ways[number]
                how = " with the autoencoder in tiles, which can shift colours" if tiles else ""
                log.warning(
                    "Memory ran out with %d picture(s) at once: drawing %d at once%s", at_once, fewer, how
                )

    def apply(self, options: FineTuneOptions) -> None:
        """Make the pipeline the base plus the fine-tunes that `options` name.

        The runners cache values that depend on the weights, so they always follow the change.

        Raises:
            UserInputError: a fine-tune cannot be fetched, or does not fit the base.
        """
        self.tuned.apply(self._load(options))
        self.runners.follow(self.tuned.changes)

    def _load(self, options: FineTuneOptions) -> tuple[ScaledFineTune, ...]:
        """Fetch and read the fine-tunes of `options`, in order, or take them from the cache."""
        source = options.replicate_weights
        main = self.fine_tunes.get(source) if source else self.default_fine_tune
        extra = tuple(
            ScaledFineTune(
                fine_tune=self.fine_tunes.get(lora), scale=float(scale), text_encoder_scale=of_encoders
            )
            for lora, scale, of_encoders in options.extra
        )
        require_loras(extra)
        if options.extra_lora_text_encoder_scale and not any(
            in_text_encoder(name) for one in extra for name in one.fine_tune.lora
        ):
            log.warning(
                "extra_lora_text_encoder_scale has no effect: no LoRA in extra_lora is one of the text encoders."
            )
        if options.lora_scale != FineTuneOptions.lora_scale and not (main and main.lora):
            log.warning("lora_scale has no effect without a LoRA as replicate_weights.")
        text_scale = options.text_encoder_lora_scale
        if text_scale is not None and not (main and any(map(in_text_encoder, main.lora))):
            log.warning(
                "text_encoder_lora_scale has no effect: replicate_weights is no LoRA of the text encoders."
            )
        if main is None:
            return extra
        scaled = ScaledFineTune(
            fine_tune=main,
            scale=float(options.lora_scale),
            text_encoder_scale=None if text_scale is None else float(text_scale),
        )
        return (scaled, *extra)

    def _refiner(self) -> UNet2DConditionModel:
        """The refiner, loaded when a request first needs it."""
        require_refinable(self.tuned.pipeline.scheduler.config)
        if self.refiner is None:
            name = settings.refiner_name()
            folder = pipelines.local_folder(name, setting="SDXL_REFINER", parts=["unet"], weights=["unet"])
            self.refiner = load_refiner(folder, self.tuned.pipeline)
            log.info("Loaded the refiner %s", name)
        return self.refiner
