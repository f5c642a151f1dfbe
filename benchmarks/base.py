"""`python -m benchmarks.base`: measure how well the miniature follows prompts that its pretraining never saw."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import Tensor

from benchmarks.results_file import write_and_print
from sdxl.data.picture_encoders import cosine_of_different
from tiny_world.captions import held_out_prompts
from tiny_world.following import following, shares
from tiny_world.parts import pad
from tiny_world.raster import render
from tiny_world.scorer import Scorer
from tiny_world.sheets import save_grid
from tiny_world.subjects import random_shot, shot_parts, subject

STEPS, GUIDANCE = 25, 5.0


def main() -> None:
    """Draw and judge the pictures, then print and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.base", description=__doc__)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--base", type=Path, default=Path("base_models/tiny-sdxl"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/base.json"))
    parser.add_argument("--sheet", type=Path, help="file for a sheet of the pictures that miss an aspect")
    args = parser.parse_args()
    results, failures = measure(args.base, args.prompts, args.device)
    write_and_print(args.output, results)
    if args.sheet and failures:
        images, captions = zip(*failures, strict=True)
        save_grid(torch.stack(images[:48]), args.sheet, columns=8, captions=list(captions[:48]))


def measure(base: Path, prompts: int, device: str) -> tuple[dict[str, float], list[tuple[Tensor, str]]]:
    """The share of pictures that show each aspect of their prompt, and the pictures that miss one.

    Each of those comes with a caption: the missing aspects and the prompt.
    """
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        base, variant="fp16", dtype=torch.float32, add_watermarker=False
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pairs = held_out_prompts(prompts, seed=1)
    generator = torch.Generator("cpu").manual_seed(0)
    images, size = [], 100 if device != "cpu" else 8
    for start in range(0, prompts, size):
        output: Any = pipeline(
            prompt=[prompt for prompt, _ in pairs[start : start + size]],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            height=256,
            width=256,
            generator=generator,
            output_type="pt",
        )
        images.append(output.images.cpu())
    pictures = torch.cat(images)
    met = following(Scorer(device=device).attributes(pictures), [scene for _, scene in pairs])
    failures = []
    for picture, (prompt, _), result in zip(pictures, pairs, met, strict=True):
        missed = [aspect for aspect, right in result.items() if not right]
        if missed:
            failures.append((picture, f"{'/'.join(missed)}: {prompt}"))
    return {f"base_{name}": value for name, value in shares(met).items()} | {"prompts": prompts}, failures


@torch.inference_mode()
def autoencoder_identity(base: Path, device: str, subjects: int = 30, shots: int = 8) -> float:
    """How well the autoencoder keeps identities: the mean cosine between reconstructed and real pictures of a subject.

    The subjects have even seeds and were not in the pretraining. The vectors are the scorer's. Real pictures of one
    subject reach about 0.98 among themselves.
    """
    vae = AutoencoderKL.from_pretrained(base / "vae", variant="fp16", dtype=torch.float32).to(device)
    scorer, similarities = Scorer(device=device), []
    for seed in range(0, 2 * subjects, 2):
        rng = np.random.default_rng((seed, 617))
        scenes = [random_shot("TOK", rng) for _ in range(shots)]
        parts = [shot_parts(scene, {"TOK": subject(seed)}, 800_000 + i) for i, scene in enumerate(scenes)]
        pictures = render(pad(parts)).images.to(device)
        latents = vae.encode(pictures * 2 - 1).latent_dist.mode()
        again = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        similarities.append(cosine_of_different(scorer.identity(again), scorer.identity(pictures)))
    return round(sum(similarities) / subjects, 4)


if __name__ == "__main__":
    main()
