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

from sdxl import artifacts, hosted_models
from sdxl.command_line import run_command_line
from sdxl.components import default_device, native_resolution
from sdxl.config import new_workspace, resolve_seed
from sdxl.errors import UserInputError
from sdxl.fetching import fetch
from sdxl.generation import GenerationRequest, generate
from sdxl.logs import configure_logging
from sdxl.pipelines import load_pipeline
from sdxl.tuned_weights import TunedPipeline

log = logging.getLogger(__name__)


class Predictor(BaseRunner):
    """One warm base; each request draws with it as it is, or with the fine-tune that the request names."""

    def setup(self, weights: Optional[Path] = None) -> None:
        """Load the base, and fetch the fine-tune `weights` (path, URL or data: URI; `COG_WEIGHTS`) for all requests."""
        configure_logging()
        base = hosted_models.local_folder(hosted_models.base_name())
        self.native_resolution = native_resolution(base)
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
        width: Optional[int] = Input(
            default=None,
            description="Width in pixels, a multiple of 8. Default: the size the base was made for, 1024 for SDXL 1.0.",
        ),
        height: Optional[int] = Input(
            default=None,
            description="Height in pixels, a multiple of 8. Default: the size the base was made for, 1024 for SDXL 1.0.",
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
        seed: Optional[int] = Input(
            default=None,
            description="Makes the pictures repeatable: picture i is drawn from seed + i. Default: a random one, told in the log.",
            ge=0,
        ),
        lora_scale: float = Input(
            default=1.0, description="Strength of a LoRA fine-tune; a full one is not affected.", ge=0, le=1
        ),
        replicate_weights: Optional[str] = Input(
            default=None,
            description="The fine-tune to draw with: path, URL or data: URI of a trained_model.tar. Default: the one given at start, else none.",
        ),
    ) -> list[Path]:
        """Draw pictures; returns png files."""
        workspace = new_workspace("predict")
        try:
            request = GenerationRequest(
                prompt=prompt,
                negative_prompt=negative_prompt,
                width=self.native_resolution if width is None else width,
                height=self.native_resolution if height is None else height,
                num_outputs=num_outputs,
                scheduler=scheduler,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                seed=resolve_seed(seed),
                lora_scale=lora_scale,
            )
            log.info("Seed: %d", request.seed)
            fine_tune = self._open(replicate_weights, workspace) if replicate_weights else self.setup_weights
            self.tuned.activate(fine_tune, lora_scale=request.lora_scale)
            pictures = generate(self.tuned.pipeline, request, self.tuned.token_map)
            files = []
            for index, picture in enumerate(pictures):
                files.append(Path(workspace / f"out-{index}.png"))
                picture.save(files[-1])
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, UserInputError):
                log.exception("The prediction stopped.")
            shutil.rmtree(workspace, ignore_errors=True)
            raise
        shutil.rmtree(workspace / "weights", ignore_errors=True)
        return files

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
