"""The entry point for drawing: a prompt becomes pictures, with or without a fine-tune.

Knows the public inputs; does not know how pictures are made. Imports torch and diffusers only in `setup`, so that
`--help` and wrong inputs are answered at once.

    python predict.py -i prompt="a photo of TOK on the moon" -i replicate_weights=out/trained_model.tar -o pictures/
"""

import logging
import pathlib
from typing import Optional

from cog import BaseRunner, CancelationException, Input, Path
from coglet import server

from sdxl import settings
from sdxl.command_line import ManyRuns, run_command_line
from sdxl.declared_inputs import as_declared, leave_downloads_to_us
from sdxl.files.sources import allowed_fine_tune
from sdxl.process import (
    configure_logging,
    exit_with,
    keep_compiled_kernels,
    keep_memory_small,
    leave_at_once,
    repeat_on_cpu,
    return_free_memory,
    share_cores,
    start_logging,
)
from sdxl.serving.canvas import lay_out
from sdxl.serving.no_effect import without_effect
from sdxl.serving.picture_files import read_inputs
from sdxl.serving.prompt_lists import runs_of_file, write_sheets
from sdxl.serving.request import (
    DeliveryOptions,
    DrawingOptions,
    FineTuneOptions,
    LayoutOptions,
    made_of,
)
from sdxl.shutdown import stops_with_server
from sdxl.workspace import workspace_of_run

log = logging.getLogger(__name__)


class Predictor(BaseRunner):
    """Loads one base; each request draws with it, alone or with the fine-tunes that the request names."""

    @property
    def serves_strangers(self) -> bool:
        """Whether requests come through a server. Other servers than Cog's say so in a subclass."""
        return server.active

    def setup(self, weights: Optional[Path] = None) -> None:  # type: ignore[override]
        """Load the base. `weights` (`COG_WEIGHTS`) is the fine-tune for requests without `replicate_weights`."""
        repeat_on_cpu()
        share_cores()
        if self.serves_strangers:
            keep_memory_small()
        if server.active:
            leave_at_once()
        configure_logging()
        keep_compiled_kernels()
        # Here, after logging is configured: diffusers writes to the log while it is imported.
        from sdxl.serving.delivery import Delivery
        from sdxl.serving.painter import Painter
        from sdxl.serving.safety import load_judge

        self.painter = Painter(weights=str(weights) if weights else None)
        judge = load_judge(self.painter.placement.helper_device, real_base=not self.painter.is_miniature)
        self.delivery = Delivery(judge, model=pathlib.Path(self.painter.base.name).name)
        log.info("Pictures are judged by %s", judge.name)
        self.painter.warm_up()

    def run(
        self,
        prompt: str = Input(
            default="a photo of TOK",
            description="What to draw. Write the fine-tune's token, such as TOK, as a separate word. Up to 600 tokens are read, some 400 words.",
        ),
        prompts: str = Input(
            default="",
            description="Several prompts instead of prompt, one a line or separated by |, up to 16. Each is drawn num_outputs times, from the same seeds, at most 16 pictures in all. The pictures come prompt by prompt.",
        ),
        negative_prompt: str = Input(default="", description="What to keep out of the picture."),
        prompt_weights: bool = Input(
            default=True,
            description="Read weights in both prompts: (word:1.3), (word) for 1.1, [word] for 1/1.1, \\( for a bracket, BREAK for a new chunk of 75 tokens. false: brackets are text.",
        ),
        image: Optional[Path] = Input(
            default=None,
            description="A picture to start from, for image to image; with mask, for inpainting. jpg, png, webp, bmp or heic. Without mask, transparent areas are repainted.",
        ),
        mask: Optional[Path] = Input(
            default=None,
            description="The mask for inpainting; needs image. Areas painted in white, or in one colour on black or on nothing, are repainted. Black and transparent areas are kept. Grey is redrawn in part.",
        ),
        mask_blur: int = Input(
            default=0,
            description="Soften the edge of the mask: the standard deviation of a Gaussian, in pixels of the picture that you get. 0: as it is.",
            ge=0,
            le=256,
        ),
        mask_invert: bool = Input(
            default=False, description="Keep what the mask says to repaint, and repaint the rest."
        ),
        only_masked: bool = Input(
            default=False,
            description="Draw only the part of image around the mask, with all the pixels of a whole picture, and put it back into image, which keeps its size.",
        ),
        mask_padding: int = Input(
            default=32,
            description="For only_masked: how many pixels of image around the mask are drawn with it. They show the model the surroundings.",
            ge=0,
            le=2048,
        ),
        width: Optional[int] = Input(
            default=None,
            description="Width in pixels, a multiple of 8. Default: the width of image, or else the size the base was made for (1024 for SDXL 1.0).",
        ),
        height: Optional[int] = Input(
            default=None,
            description="Height in pixels, a multiple of 8. Default: the height of image, or else the size the base was made for (1024 for SDXL 1.0).",
        ),
        aspect_ratio: str = Input(
            default="custom",
            description="A preset size that SDXL was trained on, instead of width and height. custom: use width and height.",
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
        num_outputs: int = Input(
            default=1, description="How many pictures to draw of each prompt.", ge=1, le=4
        ),
        scheduler: str = Input(
            default="K_EULER",
            description="The sampler. LCM and TCD are for weights that draw in few steps.",
            choices=[
                "DDIM",
                "DPMSolverMultistep",
                "DPMSolverMultistepSDE",
                "HeunDiscrete",
                "KarrasDPM",
                "KarrasDPMSDE",
                "K_EULER_ANCESTRAL",
                "K_EULER",
                "LCM",
                "PNDM",
                "TCD",
                "UniPC",
            ],
        ),
        timestep_spacing: str = Input(
            default="base",
            description="How the steps are spread over the noise. base: as the base was saved. Bases and LoRAs for few steps, such as Lightning, need trailing.",
            choices=["base", "leading", "linspace", "trailing"],
        ),
        speed: str = Input(
            default="exact",
            description="exact: every step does everything. fast: almost the same picture in about half the time, from 23 steps on.",
            choices=["exact", "fast"],
        ),
        num_inference_steps: int = Input(
            default=50,
            description="Number of denoising steps. More steps give finer pictures and take longer.",
            ge=1,
            le=500,
        ),
        guidance_scale: float = Input(
            default=7.5,
            description="How strictly the picture follows the prompt. 1 and less turn guidance off, and the negative prompt with it.",
            ge=0,
            le=50,
        ),
        guidance_rescale: float = Input(
            default=0.0,
            description="Takes back overexposure by guidance: 0 leaves it, 1 removes it. About 0.7 suits bases with v-prediction and zero terminal SNR.",
            ge=0,
            le=1,
        ),
        prompt_strength: float = Input(
            default=0.8,
            description="With image: how much of it to redraw. 1 ignores the image.",
            ge=0,
            le=1,
        ),
        seed: Optional[int] = Input(
            default=None,
            description="Seed for repeatable pictures, up to 4294967295: picture i uses seed + i. Default: a random seed, which is logged.",
            ge=0,
        ),
        refine: str = Input(
            default="no_refiner",
            description="How to use the refiner. expert_ensemble_refiner: it removes the last of the noise. base_image_refiner: it redraws the finished picture a little.",
            choices=["no_refiner", "expert_ensemble_refiner", "base_image_refiner"],
        ),
        high_noise_frac: float = Input(
            default=0.8,
            description="For expert_ensemble_refiner: the share of the noise that the base removes before the refiner takes over.",
            ge=0,
            le=1,
        ),
        refine_steps: Optional[int] = Input(
            default=None,
            description="For base_image_refiner: the number of steps, of which 30 percent are run. Default: num_inference_steps.",
            ge=1,
            le=500,
        ),
        apply_watermark: bool = Input(
            default=True,
            description="Add an invisible watermark that says the picture was made by a machine.",
        ),
        lora_scale: float = Input(
            default=1.0,
            description="Strength of a LoRA fine-tune: 1 as it was trained, more exaggerates, below 0 does the opposite. It affects a full fine-tune only in the form of a difference.",
            ge=-2,
            le=2,
        ),
        text_encoder_lora_scale: Optional[float] = Input(
            default=None,
            description="Strength of a LoRA's layers in the text encoders, if it has any. Default: lora_scale.",
            ge=-2,
            le=2,
        ),
        replicate_weights: Optional[str] = Input(
            default=None,
            description="The fine-tune to draw with: a trained_model.tar or a LoRA, as a path, URL or data: URI, or the name of a Hugging Face repository (owner/name, or owner/name/file.safetensors). Default: the fine-tune given at setup, if any.",
        ),
        extra_lora: Optional[list[str]] = Input(
            default=None, description="LoRAs to add to the fine-tune, each given like replicate_weights."
        ),
        extra_lora_scale: Optional[list[float]] = Input(
            default=None,
            description="Strength of each LoRA in extra_lora, from -2 to 2, in the same order. Default: 1 for each.",
        ),
        extra_lora_text_encoder_scale: Optional[list[float]] = Input(
            default=None,
            description="Strength of each LoRA's layers in the text encoders, if it has any, from -2 to 2, in the same order. Default: extra_lora_scale.",
        ),
        disable_safety_checker: bool = Input(
            default=False,
            description="Deliver all pictures. Otherwise pictures that are not safe for work are withheld.",
        ),
        output_format: str = Input(
            default="png", description="File format of the pictures.", choices=["png", "webp", "jpg"]
        ),
        output_quality: int = Input(
            default=95, description="Quality of webp and jpg files; png is lossless.", ge=1, le=100
        ),
        embed_metadata: bool = Input(
            default=True,
            description="Write the prompt, seed and settings into the files, in the format of AUTOMATIC1111's web UI.",
        ),
    ) -> list[Path]:
        """Draw pictures; returns their files."""
        settings.set_behind_server(self.serves_strangers)
        given = as_declared(self.run, locals())
        start_logging()
        return_free_memory()  # of the request before, which is gone by now
        smaller = "choose a smaller width and height, or fewer num_outputs"
        with (
            workspace_of_run("predict", smaller=smaller) as workspace,
            stops_with_server(CancelationException),
        ):
            # Each record checks its inputs: all that is wrong without a look at the model is refused here.
            given["seed"] = settings.resolve_seed(given["seed"])
            drawing = made_of(DrawingOptions, given)
            given["replicate_weights"] = allowed_fine_tune(given["replicate_weights"], "replicate_weights")
            given["extra_lora"] = [
                allowed_fine_tune(lora, "extra_lora") for lora in given["extra_lora"] or ()
            ]
            fine_tunes = made_of(FineTuneOptions, given)
            delivery = made_of(DeliveryOptions, given)
            given["image"], given["mask"] = read_inputs(
                given["image"], given["mask"], workspace / "fetched", inverted=given["mask_invert"]
            )
            layout = made_of(LayoutOptions, given)
            for told in without_effect(drawing, layout, delivery):
                log.warning("%s", told)

            # Cog has called setup before. On the command line it waits until the inputs are checked.
            if not hasattr(self, "painter"):
                self.setup()
            requests = drawing.on(lay_out(layout, native=self.painter.native_resolution))
            log.info("Seed: %d", drawing.seed)
            pictures = self.painter.draw_all(requests, fine_tunes)
            files = self.delivery.deliver(pictures, requests, delivery, workspace)
        return [Path(file) for file in files]


leave_downloads_to_us(Predictor.run)
PROMPTS_FILE = ManyRuns(
    flag="--prompts-file",
    help="a text file with one prompt a line: draw each of them, and contact sheets",
    beside="prompts",
    read=runs_of_file,
    sum_up=write_sheets,
)

if __name__ == "__main__":
    about = (__doc__ or "").splitlines()[0]
    exit_with(lambda: run_command_line(Predictor().run, description=about, many=PROMPTS_FILE))
