"""Where a pipeline's parts lie: all on the GPU, fetched to it part by part, or on the CPU.

Knows memory and accelerate's hooks; does not know requests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sdxl import settings
from sdxl.errors import UserInputError


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How memory is used."""

    name: str
    device: torch.device
    offloaded: bool = False
    """Parts wait in host memory and are on the GPU one at a time (`enable_model_cpu_offload`)."""
    tiled: bool = False
    """The autoencoder works tile by tile, which may shift colours by a little from tile to tile."""
    at_once: int = 4
    """Most pictures in one call of the UNet."""

    def describe(self) -> str:
        """One sentence for the log."""
        if self.device.type == "cpu":
            return "everything on the CPU, in fp32"
        if not self.offloaded:
            return f"everything on the GPU ({torch.cuda.get_device_name(self.device)}), in fp16"
        tiles = ", the autoencoder in tiles" if self.tiled else ""
        return f"one part at a time on the GPU, in fp16, {self.at_once} picture(s) at once{tiles}"


def choose_placement(gpu_gib: float | None, setting: str = "auto") -> Placement:
    """The placement for a GPU of `gpu_gib` GiB (None: no GPU), or the one that `setting` (`SDXL_MEMORY`) names.

    SDXL with its refiner takes 12 GiB in fp16, beside what a picture of 1024² needs.

    Raises:
        UserInputError: no such setting, or one that needs a GPU where there is none.
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
    """`choose_placement` for this machine and its `SDXL_MEMORY`."""
    gib = None
    if torch.cuda.is_available():
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return choose_placement(gib, settings.variable("SDXL_MEMORY") or "auto")


def place(pipeline: Any, placement: Placement) -> None:
    """Put a pipeline that was loaded on the CPU where `placement` says."""
    if placement.offloaded:
        pipeline.enable_model_cpu_offload(device=placement.device)
    else:
        pipeline.to(placement.device)
    if placement.tiled:
        pipeline.vae.enable_tiling()


@contextmanager
def lent(module: torch.nn.Module, pipeline: Any) -> Iterator[None]:
    """Have `module` where the pipeline computes; of an offloaded one the other parts leave the GPU, and it after them."""
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
