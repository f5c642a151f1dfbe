"""What all checks share: the base, the photograph, the device, and models that several checks use.

Knows how to load and release; does not know what is checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from torch import Tensor

from benchmarks.photographs import photograph
from benchmarks.real.findings import free_memory
from sdxl import settings
from sdxl.data.picture_reader import read_image
from sdxl.errors import WeightsError
from sdxl.model.bases import Base, find_base
from sdxl.model.components import default_device, load_part, native_resolution, weights_variant_of
from sdxl.serving.painter import SMALLEST_REAL_BASE, Painter


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A photograph of one thing."""

    image: Image.Image
    name: str
    subject: str
    """What it shows, as a prompt for the segmenter, such as "a cat"."""
    centre: tuple[float, float] = (0.5, 0.5)
    """Where the subject's middle is: the share of the width from the left, and of the height from the top."""
    word: str | None = None
    """A word that a caption should contain; None if nobody knows."""

    def square(self, side: int) -> Image.Image:
        """The middle of the picture, `side`×`side` pixels."""
        return ImageOps.fit(self.image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)


def packaged_photo() -> Photo:
    """The photograph of a cat in `benchmarks/photographs` (CC0)."""
    image = photograph("chelsea")
    return Photo(image=image, name="chelsea", subject="a cat", centre=(0.5, 0.42), word="cat")


def named_photo(path: Path, subject: str) -> Photo:
    """The user's photograph. Its subject is taken to be in the middle."""
    return Photo(image=read_image(path)[0], name=path.name, subject=subject)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A LoRA that was trained here."""

    tar: Path
    folder: Path
    """The same, unpacked."""
    losses: list[float]
    """Of each step."""
    ends: list[float]
    """When each step ended, in seconds."""
    pivot: int
    """The first step (from 0) after the pivot."""
    peak_gib: float | None
    """The most GPU memory that PyTorch held; None without a GPU."""


@dataclass(kw_only=True)
class Setup:
    """What the checks work on. The base is the one that `SDXL_BASE` names."""

    photo: Photo
    folder: Path
    """For files of the checks."""
    train: Callable[[Setup], Trained]
    """Trains a LoRA on the example pictures."""
    expects_sdxl: bool | None = None
    """Whether the base should be SDXL 1.0 in every respect. None: if it was made for pictures of a real SDXL's size."""
    size: int | None = None
    """Side of all pictures in pixels. None: the base's own."""
    steps: int | None = None
    """Training steps. None: 200, and fewer on a miniature."""
    drawing_steps: int | None = None
    """Steps of each picture. None: 25, and fewer on a miniature."""
    checkpoint: str | None = None
    """A single-file checkpoint to convert: a path, a URL or a file on the hub."""
    _painter: Painter | None = field(default=None, repr=False)
    _trained: Trained | None = None
    _training_failed: bool = False

    @cached_property
    def base(self) -> Base:
        """The base on disk, fetched if necessary."""
        return find_base(settings.base_name())

    @cached_property
    def device(self) -> torch.device:
        """The GPU, or else the CPU."""
        return default_device()

    @cached_property
    def native(self) -> int:
        """Side in pixels of the pictures that the base was made for."""
        return native_resolution(self.base.folder)

    @property
    def side(self) -> int:
        """Side in pixels of the pictures that checks work on."""
        return self.size or self.native

    @property
    def is_miniature(self) -> bool:
        """Whether the base is a small one for tests and demos."""
        return self.native < SMALLEST_REAL_BASE

    @property
    def sampling_steps(self) -> int:
        """Steps of each picture."""
        return self.drawing_steps or (10 if self.is_miniature else 25)

    @property
    def is_sdxl(self) -> bool:
        """Whether expectations of SDXL 1.0 apply."""
        return not self.is_miniature if self.expects_sdxl is None else self.expects_sdxl

    @property
    def painter(self) -> Painter:
        """What serves requests, with the base loaded."""
        if self._painter is None:
            self._painter = Painter()
        return self._painter

    @property
    def trained(self) -> Trained:
        """A LoRA, trained when a check first needs it.

        Raises:
            WeightsError: an earlier training failed. It is not repeated, since that takes long.
        """
        if self._training_failed:
            raise WeightsError("There is no LoRA, because its training failed: see the check training.")
        if self._trained is None:
            self.release()
            self._training_failed = True
            self._trained = self.train(self)
            self._training_failed = False
            free_memory()
        return self._trained

    def release(self) -> None:
        """Free the memory of the models."""
        self._painter = None
        free_memory()

    def autoencoder(self, dtype: torch.dtype) -> Any:
        """The base's autoencoder, loaded anew."""
        return load_part(AutoencoderKL, self.base.vae, dtype, self.device)

    def plain_pipeline(self, dtype: torch.dtype, **replaced: Any) -> Any:
        """The base in diffusers' own pipeline, as people load it without this project.

        replaced: parts to use instead of those on disk; None leaves a part out.
        """
        from diffusers import StableDiffusionXLPipeline

        variant = weights_variant_of(self.base.folder / "text_encoder")
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            self.base.folder,
            variant=variant,
            dtype=dtype,
            use_safetensors=True,
            add_watermarker=False,
            **replaced,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def photo_pixels(self) -> Tensor:
        """The photograph [1, 3, side, side], −1 to 1, in fp32 on the device."""
        levels = torch.from_numpy(np.array(self.photo.square(self.side)))
        return (levels.permute(2, 0, 1)[None].float() / 127.5 - 1).to(self.device)


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """The configuration of a part of a pipeline, such as "unet" or "scheduler"."""
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    return json.loads((folder / part / name).read_text())


def as_picture(decoded: Tensor) -> Image.Image:
    """A picture [3, h, w], −1 to 1, that an autoencoder decoded."""
    levels = ((decoded.float() * 0.5 + 0.5).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def level_difference(one: Image.Image, other: Image.Image) -> float:
    """Mean difference of two pictures of one size, in levels of 255."""
    first, second = (np.asarray(picture, dtype=float) for picture in (one, other))
    return float(np.abs(first - second).mean())


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found − exact| / |exact|, in percent; NaN or infinite if `found` is not finite."""
    found, exact = found.float(), exact.float()
    return 100 * float((found - exact).norm() / exact.norm().clamp_min(1e-12))
