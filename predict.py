"""The prediction door: a prompt in, pictures out, with or without a fine-tune.

Knows the public inputs; does not know how pictures are made.

    python predict.py -i prompt="a photo of TOK on the moon" -i replicate_weights=out/trained_model.tar -o pictures/
"""

import atexit
import logging
import pathlib
import shutil
import sys
from typing import Optional

from cog import BaseRunner, Input, Path
from diffusers import UNet2DConditionModel
from PIL import Image

from sdxl import artifacts, hosted_models
from sdxl.canvas import lay_out
from sdxl.command_line import run_command_line
from sdxl.components import default_device, native_resolution
from sdxl.config import new_workspace, resolve_seed
from sdxl.errors import UserInputError
from sdxl.fetching import fetch
from sdxl.framing import read_image
from sdxl.generation import GenerationRequest, generate
from sdxl.logs import configure_logging
from sdxl.picture_files import check_format, describe, save
from sdxl.pipelines import load_pipeline, load_refiner
from sdxl.tuned_weights import TunedPipeline

log = logging.getLogger(__name__)

MAX_PICTURE_BYTES = 100 << 20
"""Largest file of image or mask."""


class Predictor(BaseRunner):
    """One warm base; each request draws with it as it is, or with the fine-tune that the request names."""

    def setup(self, weights: Optional[Path] = None) -> None:
        """Load the base, and fetch the fine-tune `weights` (path, URL or data: URI; `COG_WEIGHTS`) for all requests."""
        configure_logging()
        base = hosted_models.local_folder(hosted_models.base_name())
        self.native_resolution = native_resolution(base)
        self.model_name = pathlib.Path(hosted_models.base_name()).name
        self.refiner: Optional[UNet2DConditionModel] = None
        self.tuned = TunedPipeline(load_pipeline(base, default_device()))
        log.info("Serving %s on %s", hosted_models.base_name(), self.tuned.pipeline.device)
        self.setup_weights = self._open_for_good(str(weights)) if weights else None

    def run(
        self,
        prompt: str = Input(
            default="a photo of TOK",
            description="What to draw. Write a fine-tune's token, such as TOK, as a word of its own.",
        ),
        negative_prompt: str = Input(default="", description="What to keep out of the picture."),
        image: Optional[Path] = Input(
            default=None,
            description="A picture to start from: image to image, or inpainting with mask. jpg, png, webp or bmp.",
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
            description="The fine-tune to draw with: path, URL or data: URI of a trained_model.tar. Default: the one given at start, else none.",
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
        workspace = new_workspace("predict")
        try:
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
            fine_tune = self._open(replicate_weights, workspace) if replicate_weights else self.setup_weights
            self.tuned.activate(fine_tune, lora_scale=lora_scale)
            pictures = generate(self.tuned.pipeline, request, self.tuned.token_map, refiner)
            files = []
            for index, picture in enumerate(pictures):
                files.append(Path(workspace / f"out-{index}.{output_format}"))
                told = describe(request, index, model=self.model_name) if embed_metadata else None
                save(picture, files[-1], quality=output_quality, parameters=told)
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, UserInputError):
                log.exception("The prediction stopped.")
            shutil.rmtree(workspace, ignore_errors=True)
            raise
        for part in ("weights", "image", "mask"):
            shutil.rmtree(workspace / part, ignore_errors=True)
        return files

    @staticmethod
    def _picture(given: Optional[Path], folder: pathlib.Path) -> Optional[Image.Image]:
        """The picture of an input, from its file, URL or data: URI."""
        if given is None:
            return None
        folder.mkdir()
        return read_image(fetch(str(given), folder, max_bytes=MAX_PICTURE_BYTES))

    def _refiner(self) -> UNet2DConditionModel:
        """The refiner, loaded when it is first asked for."""
        if self.refiner is None:
            name = hosted_models.refiner_name()
            folder = hosted_models.local_folder(name, setting="SDXL_REFINER", parts=["unet"])
            self.refiner = load_refiner(folder, self.tuned.pipeline)
            log.info("Loaded the refiner %s", name)
        return self.refiner

    def _open_for_good(self, source: str) -> artifacts.FineTune:
        """Fetch and check the fine-tune `source` into a folder that lasts as long as the process."""
        folder = new_workspace("weights")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return self._open(source, folder)

    def _open(self, source: str, folder: pathlib.Path) -> artifacts.FineTune:
        """Fetch and check the fine-tune `source`, unpacking into `folder`/weights."""
        weights = folder / "weights"
        weights.mkdir()
        return artifacts.read(fetch(source, weights), weights / "unpacked")


def _predict_from_command_line() -> int:
    predictor = Predictor()
    return run_command_line(predictor.run, description=(__doc__ or "").splitlines()[0], setup=predictor.setup)


if __name__ == "__main__":
    sys.exit(_predict_from_command_line())
