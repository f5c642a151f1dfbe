"""On which device each part of a pipeline is: all on the GPU, one at a time on the GPU, or all on the CPU.

Knows memory and accelerate's hooks; does not know requests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sdxl import settings
from sdxl.errors import UserInputError
from sdxl.model.components import default_device


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the parts of a pipeline are, and how many pictures fit at once."""

    name: str
    device: torch.device
    offloaded: bool = False
    """Parts stay in host memory and move to the GPU one at a time (diffusers' `enable_model_cpu_offload`)."""
    tiled: bool = False
    """The autoencoder works tile by tile; colours may differ slightly between tiles."""
    at_once: int = 4
    """Most pictures in one call of the UNet."""

    @property
    def helper_device(self) -> torch.device:
        """The device for models outside the pipeline. With offloading it is the CPU, so that the GPU's memory stays free."""
        return torch.device("cpu") if self.offloaded else self.device

    def describe(self) -> str:
        """One sentence for the log."""
        if self.device.type == "cpu":
            return "everything on the CPU, in fp32"
        if not self.offloaded:
            return f"everything on the GPU ({torch.cuda.get_device_name(self.device)}), in fp16"
        tiles = ", the autoencoder in tiles" if self.tiled else ""
        return f"one part at a time on the GPU, in fp16, {self.at_once} picture(s) at once{tiles}"


def choose_placement(gpu_gib: float | None, setting: str = "auto") -> Placement:
    """The placement for a GPU of `gpu_gib` GiB (None for no GPU), or the one that `setting` (`SDXL_MEMORY`) names.

    The limits allow for SDXL with its refiner, 12 GiB in fp16, and for what a picture of 1024² pixels needs.

    Raises:
        UserInputError: the setting does not exist, or needs a GPU and there is no GPU.
    """
    cuda = torch.device("cuda")
    known = {
        "whole": Placement(name="whole", device=cuda),
        "12gb": Placement(name="12gb", device=cuda, offloaded=True, at_once=1),
        "8gb": Placement(name="8gb", device=cuda, offloaded=True, tiled=True, at_once=1),
        "cpu": Placement(name="cpu", device=torch.device("cpu")),
    }
    if setting == "auto":
        if gpu_gib is None:
            return known["cpu"]
        return known["whole" if gpu_gib >= 20 else "12gb" if gpu_gib >= 11 else "8gb"]
    if setting not in known:
        raise UserInputError(f"SDXL_MEMORY is {setting!r}, but must be auto or one of {', '.join(known)}.")
    if setting != "cpu" and gpu_gib is None:
        raise UserInputError(f"SDXL_MEMORY is {setting!r}, but there is no CUDA GPU: set it to cpu or auto.")
    return known[setting]


def placement_here() -> Placement:
    """`choose_placement` for this machine and its `SDXL_MEMORY`.

    Raises:
        UserInputError: as `choose_placement`, or the installed PyTorch does not run on this GPU.
    """
    gib = None
    if torch.cuda.is_available():
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    placement = choose_placement(gib, settings.variable("SDXL_MEMORY") or "auto")
    if placement.device.type == "cuda":
        default_device()  # refuses a GPU on which torch does not run
    return placement


def place(pipeline: Any, placement: Placement) -> None:
    """Move a loaded pipeline to where `placement` says."""
    if placement.offloaded:
        pipeline.enable_model_cpu_offload(device=placement.device)
    else:
        pipeline.to(placement.device)
    if placement.tiled:
        pipeline.vae.enable_tiling()


def ways_to_draw(most: int) -> list[tuple[int, bool]]:
    """Ways to draw up to `most` pictures at once, each with less memory than the one before.

    A way is how many pictures share a call of the UNet, and whether the autoencoder works in tiles.
    """
    counts = [most]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    return [*((count, False) for count in counts), (1, True)]


@contextmanager
def in_tiles(vae: Any, tiled: bool) -> Iterator[None]:
    """While the context lasts the autoencoder works tile by tile, if `tiled` or if it did before."""
    before = vae.use_tiling
    vae.use_tiling = before or tiled
    try:
        yield
    finally:
        vae.use_tiling = before


@contextmanager
def lent(module: torch.nn.Module, pipeline: Any) -> Iterator[None]:
    """Put `module`, which is no part of the pipeline, on the pipeline's device while the context lasts.

    With offloading, first free the GPU, then move the module there and back. Without, it is there already.
    """
    if not getattr(pipeline, "_all_hooks", []):
        yield
        return
    pipeline.maybe_free_model_hooks()
    module.to(pipeline._execution_device)
    try:
        yield
    finally:
        module.to("cpu")
        torch.cuda.empty_cache()
