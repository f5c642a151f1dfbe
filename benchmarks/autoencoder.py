"""`python -m benchmarks.autoencoder`: what each precision of the autoencoder costs, and how much it rounds.

On CUDA, milliseconds and peak memory to encode and decode one picture by SDXL's autoencoder at full size, with random
weights and our fused kernels. On any device, the errors of the miniature's autoencoder on pictures of its world: of the
latents (relative), and of the decoded picture (levels of 255, mean and largest), against fp32 without TF32.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks import full_size
from benchmarks.quality import about
from benchmarks.results_file import write_and_print
from benchmarks.sampling import milliseconds
from benchmarks.subject_job import BASE, training_pictures
from sdxl.speed.compiled_blocks import fuse_blocks

SIDE = 1024
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""In fp32, cuDNN's convolutions may use TF32, as torch allows by default."""


@torch.no_grad()
def errors(device: str) -> dict[str, float]:
    """The rounding errors of each precision on the miniature's autoencoder."""
    pixels = training_pictures(0).images.to(device) * 2 - 1
    vae: Any = AutoencoderKL.from_pretrained(BASE / "vae", variant="fp16", dtype=torch.float32).to(device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        latents = vae.encode(pixels).latent_dist.mode()
        picture = _levels(vae.decode(latents).sample)
    found = {}
    for name, dtype in DTYPES.items():
        rounded = copy.deepcopy(vae).to(dtype)  # of the fp32 weights each time
        own = rounded.encode(pixels.to(dtype)).latent_dist.mode().float()
        off = (_levels(rounded.decode(latents.to(dtype)).sample) - picture).abs()
        found[f"{name}_latents"] = round(float((own - latents).norm() / latents.norm()), 6)
        found[f"{name}_levels"] = round(float(off.mean()), 3)
        found[f"{name}_levels_most"] = round(float(off.max()), 1)
    return found


def _levels(decoded: Tensor) -> Tensor:
    return (decoded.float() * 0.5 + 0.5).clamp(0, 1) * 255


@torch.no_grad()
def costs() -> dict[str, float]:
    """Milliseconds and peak GiB, weights included, of one 1024×1024 picture at full size."""
    vae: Any = AutoencoderKL(**full_size.AUTOENCODER).cuda().eval().requires_grad_(False)
    fuse_blocks(vae)
    found = {}
    for name, dtype in DTYPES.items():
        vae.to(dtype)
        pixels = torch.rand(1, 3, SIDE, SIDE, device="cuda", dtype=dtype) * 2 - 1
        latents = torch.randn(1, 4, SIDE // 8, SIDE // 8, device="cuda", dtype=dtype)
        works: dict[str, Callable[[], Any]] = {
            "encode": lambda pixels=pixels: vae.encode(pixels).latent_dist.mode(),
            "decode": lambda latents=latents: vae.decode(latents).sample,
        }
        for what, work in works.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            found[f"{name}_{what}_ms"] = milliseconds(work, 12)
            found[f"{name}_{what}_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.autoencoder", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/autoencoder.json"))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {"errors": errors(device)}
    if device == "cuda":
        results["costs"] = costs()
    results |= about(device)
    write_and_print(arguments.output, results)


if __name__ == "__main__":
    main()
