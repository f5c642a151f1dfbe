"""The prediction door: a prompt in, pictures out, with or without a fine-tune.

Knows the public inputs; does not know how pictures are made.

    python predict.py -i prompt="a photo of TOK on the moon" -i replicate_weights=out/trained_model.tar -o pictures/
"""

import logging
import pathlib
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Optional

import torch
from cog import BaseRunner, Input, Path
from PIL import Image

from sdxl import settings
from sdxl.command_line import run_command_line
from sdxl.data.decoding import read_image
from sdxl.errors import UserInputError, WithheldError
from sdxl.files import hub
from sdxl.files.fetching import fetch
from sdxl.model.components import native_resolution
from sdxl.process import (
    configure_logging,
    keep_compiled_kernels,
    repeat_on_cpu,
    share_heaps,
    workspace_of_run,
)
from sdxl.serving import watermark
from sdxl.serving.canvas import keep_outside, lay_out
from sdxl.serving.fine_tune_cache import FineTuneCache
from sdxl.serving.generation import GenerationRequest, draw, generate
from sdxl.serving.picture_files import check_format, describe, save
from sdxl.serving.pipeline import load_pipeline, load_refiner
from sdxl.serving.placement import placement_here
from sdxl.serving.safety import load_judge
from sdxl.serving.tuned_pipeline import Layers, TunedPipeline, require_loras
from sdxl.serving.unet_runner import Runners, speed_here
from sdxl.settings import cache_folder, cache_limits, resolve_seed
from sdxl.speed.compiled_blocks import fuse_blocks

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel  # before sdxl, which quietens it, it would speak up

log = logging.getLogger(__name__)

MAX_PICTURE_BYTES = 100 << 20
"""Largest file of image or mask."""
WARMING_STEPS = 5
"""Calls of the UNet for each warmed shape: more than it takes to capture it."""
SMALLEST_REAL_BASE = 512
"""Pixels from which a base is no miniature: its pictures are judged by Stable Diffusion's checker."""


class Predictor(BaseRunner):
    """One warm base; each request draws with it as it is, or with the fine-tune that the request names."""

    def setup(self, weights: Optional[Path] = None) -> None:
        """Load the base, and the fine-tune `weights` (as `replicate_weights`; `COG_WEIGHTS`) for requests that name none."""
        repeat_on_cpu()
        configure_logging()
        share_heaps()
        base = hub.local_folder(settings.base_name())
        self.native_resolution = native_resolution(base)
        self.model_name = pathlib.Path(settings.base_name()).name
        self.placement = placement_here()
        self.tuned = TunedPipeline(load_pipeline(base, self.placement))
        self.refiner: Optional[UNet2DConditionModel] = None
        self.fine_tunes = FineTuneCache(cache_folder(), cache_limits(), self.tuned.load)
        real = self.native_resolution >= SMALLEST_REAL_BASE
        checker_device = self.placement.device if not self.placement.offloaded else torch.device("cpu")
        self.judge = load_judge(checker_device, real_base=real)
        self.setup_weights = self.fine_tunes.get(str(weights)) if weights else None
        self.runners = Runners(speed_here(self.placement))
        if self.runners.speed != "eager":
            fuse_blocks(self.tuned.pipeline.vae)
        log.info("Serving %s: %s", settings.base_name(), self.placement.describe())
        log.info("Pictures are judged by %s", self.judge.name)
        self._warm()

    def _warm(self) -> None:
        """Have the commonest shapes ready before the first request: one picture, and four at once, of the base's size."""
        if self.runners.speed == "eager":
            return
        keep_compiled_kernels()
        started = time.monotonic()
        side = self.native_resolution
        for count in (1, self.placement.at_once):
            request = GenerationRequest(
                prompt="",
                width=side,
                height=side,
                num_outputs=count,
                num_inference_steps=WARMING_STEPS,
                seed=0,
            )
            with self.runners.warming(self.tuned.pipeline.unet):
                generate(self.tuned.pipeline, request, self.tuned.token_map, runner=self.runners)
        log.info("Warmed up (%s) in %.1f s", self.runners.speed, time.monotonic() - started)

    def run(
        self,
        prompt: str = Input(
            default="a photo of TOK",
            description="What to draw. Write a fine-tune's token, such as TOK, as a word of its own.",
        ),
        negative_prompt: str = Input(default="", description="What to keep out of the picture."),
        image: Optional[Path] = Input(
            default=None,
            description="A picture to start from: image to image, or inpainting with mask. jpg, png, webp, bmp or heic.",
        ),
        mask: Optional[Path] = Input(
            default=None,
            description="For inpainting, beside image: white is repainted, black is kept.",
        ),
        width: Optional[int] = Input(
            default=None,
            description="Width in pixels, a multiple of 8. Default: that of image, else the size the base was made for, 1024 for SDXL 1.0.",
        ),
        height: Optional[int] = Input(
            default=None,
            description="Height in pixels, a multiple of 8. Default: that of image, else the size the base was made for, 1024 for SDXL 1.0.",
        ),
        aspect_ratio: str = Input(
            default="custom",
            description="A size that the base knows well, in place of width and height. custom: as width and height say.",
            choices=[
                "custom",
                "1:1",
                "5:4",
                "4:3",
                "3:2",
                "16:9",
                "21:9",
                "4:5",
                "3:4",
                "2:3",
                "9:16",
                "9:21",
            ],
        ),
        num_outputs: int = Input(default=1, description="How many pictures to draw.", ge=1, le=4),
        scheduler: str = Input(
            default="K_EULER",
            description="The sampler.",
            choices=[
                "DDIM",
                "DPMSolverMultistep",
                "HeunDiscrete",
                "KarrasDPM",
                "K_EULER_ANCESTRAL",
                "K_EULER",
                "PNDM",
            ],
        ),
        num_inference_steps: int = Input(
            default=50, description="Denoising steps: more is finer and slower.", ge=1, le=500
        ),
        guidance_scale: float = Input(
            default=7.5,
            description="How strictly the picture follows the prompt; 1 is not at all.",
            ge=1,
            le=50,
        ),
        prompt_strength: float = Input(
            default=0.8,
            description="With image: how much of it is drawn anew; 1 leaves nothing of it.",
            ge=0,
            le=1,
        ),
        seed: Optional[int] = Input(
            default=None,
            description="Makes the pictures repeatable: picture i is drawn from seed + i. Default: a random one, told in the log.",
            ge=0,
        ),
        refine: str = Input(
            default="no_refiner",
            description="Whether the refiner takes over for the last of the noise, or goes over the finished picture.",
            choices=["no_refiner", "expert_ensemble_refiner", "base_image_refiner"],
        ),
        high_noise_frac: float = Input(
            default=0.8,
            description="For expert_ensemble_refiner: the share of the noise that the base takes away before the refiner does.",
            ge=0,
            le=1,
        ),
        refine_steps: Optional[int] = Input(
            default=None,
            description="For base_image_refiner: its steps, of which it runs 30 percent. Default: num_inference_steps.",
            ge=1,
            le=500,
        ),
        apply_watermark: bool = Input(
            default=True,
            description="Put an invisible mark into the pictures that says they were made by a machine.",
        ),
        lora_scale: float = Input(
            default=1.0, description="Strength of a LoRA fine-tune; a full one is not affected.", ge=0, le=1
        ),
        replicate_weights: Optional[str] = Input(
            default=None,
            description="The fine-tune to draw with: path, URL or data: URI of a trained_model.tar or of a LoRA, or a repository on the Hugging Face hub. Default: the one given at start, else none.",
        ),
        extra_lora: Optional[list[str]] = Input(
            default=None, description="LoRAs to add to it, each given as replicate_weights is."
        ),
        extra_lora_scale: Optional[list[float]] = Input(
            default=None,
            description="Strength of each extra_lora, 0 to 1, in their order. Default: 1 for each.",
        ),
        disable_safety_checker: bool = Input(
            default=False, description="Deliver all pictures; otherwise those not safe for work are withheld."
        ),
        output_format: str = Input(
            default="png", description="The files' format.", choices=["png", "webp", "jpg"]
        ),
        output_quality: int = Input(
            default=95, description="Quality of webp and jpg files; png loses nothing.", ge=1, le=100
        ),
        embed_metadata: bool = Input(
            default=True,
            description="Write prompt, seed and settings into the files, as AUTOMATIC1111's web UI does.",
        ),
    ) -> list[Path]:
        """Draw pictures; returns their files."""
        with workspace_of_run("predict") as workspace:
            check_format(output_format, output_quality)
            request = GenerationRequest(
                prompt=prompt,
                negative_prompt=negative_prompt,
                **lay_out(
                    self._picture(image, workspace / "image"),
                    self._picture(mask, workspace / "mask"),
                    width=width,
                    height=height,
                    aspect_ratio=aspect_ratio,
                    native=self.native_resolution,
                ),
                prompt_strength=prompt_strength,
                num_outputs=num_outputs,
                scheduler=scheduler,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                seed=resolve_seed(seed),
                refine=refine,  # type: ignore[arg-type]
                high_noise_frac=high_noise_frac,
                refine_steps=refine_steps,
            )
            log.info("Seed: %d", request.seed)
            refiner = None if request.refine == "no_refiner" else self._refiner()
            layers = self._layers(replicate_weights, lora_scale, extra_lora or [], extra_lora_scale)
            self.tuned.apply(layers)
            self.runners.follow(self.tuned.changes)
            judge = None if disable_safety_checker else self.judge

            def deliver(index: int, picture: Image.Image) -> Optional[Path]:
                """Judge, mark and write a picture, while the next one is decoded."""
                unsafe = judge is not None and threads.submit(judge.is_unsafe, picture)
                if apply_watermark:
                    picture = watermark.embed(picture)
                    if request.image is not None and request.mask is not None:
                        picture = keep_outside(picture, request.image, request.mask)
                if unsafe and unsafe.result():
                    return None
                told = describe(request, index, model=self.model_name) if embed_metadata else None
                file = workspace / f"out-{index}.{output_format}"
                save(picture, file, quality=output_quality, parameters=told)
                return Path(file)

            pictures = draw(
                self.tuned.pipeline,
                request,
                self.tuned.token_map,
                refiner,
                at_once=self.placement.at_once,
                runner=self.runners,
            )
            with closing(pictures), ThreadPoolExecutor(max_workers=2 * request.num_outputs) as threads:
                under_way = [threads.submit(deliver, *drawn) for drawn in enumerate(pictures)]
                found = [one.result() for one in under_way]
            files = [file for file in found if file is not None]
            if judge is not None:
                log.info("%s judged: %d of %d withheld", judge.name, len(found) - len(files), len(found))
            if not files:
                raise WithheldError(
                    "All pictures were withheld as not safe for work: try another prompt or seed."
                )
        for part in ("image", "mask"):
            shutil.rmtree(workspace / part, ignore_errors=True)
        return files

    @staticmethod
    def _picture(given: Optional[Path], folder: pathlib.Path) -> Optional[Image.Image]:
        """The picture of an input, from its file, URL or data: URI."""
        if given is None:
            return None
        folder.mkdir()
        return read_image(fetch(str(given), folder, max_bytes=MAX_PICTURE_BYTES))[0]

    def _refiner(self) -> "UNet2DConditionModel":
        """The refiner, loaded when it is first asked for."""
        if self.refiner is None:
            name = settings.refiner_name()
            folder = hub.local_folder(name, setting="SDXL_REFINER", parts=["unet"])
            self.refiner = load_refiner(folder, self.tuned.pipeline)
            log.info("Loaded the refiner %s", name)
        return self.refiner

    def _layers(
        self, source: Optional[str], scale: float, extra: list[str], extra_scales: Optional[list[float]]
    ) -> Layers:
        """The fine-tunes of a request, in order, with their scales."""
        scales = [1.0] * len(extra) if extra_scales is None else extra_scales
        if len(scales) != len(extra):
            raise UserInputError(
                f"extra_lora_scale has {len(scales)} numbers for {len(extra)} of extra_lora: give one for each."
            )
        for name, value in (("lora_scale", scale), *(("extra_lora_scale", value) for value in scales)):
            if not 0 <= value <= 1:
                raise UserInputError(f"{name} is {value}, but must be from 0 to 1.")
        main = self.fine_tunes.get(source) if source else self.setup_weights
        others = tuple(
            (self.fine_tunes.get(one), float(value)) for one, value in zip(extra, scales, strict=True)
        )
        require_loras(others)
        return (*(((main, float(scale)),) if main else ()), *others)


def _predict_from_command_line() -> int:
    predictor = Predictor()
    return run_command_line(predictor.run, description=(__doc__ or "").splitlines()[0], setup=predictor.setup)


if __name__ == "__main__":
    sys.exit(_predict_from_command_line())
