"""`python -m benchmarks.expert`: diffusers' pipeline as an expert sets it up, compared with ours.

Run it on the same machine as `benchmarks.sampling`, which must have written its results when this ends: the figures are added to
them.

Queries, keys and values are multiplied together, convolutions have channels last, and the UNet and the decoder are compiled as
whole graphs that run as CUDA graphs. Seconds are from prompt to PNG, medians of several requests.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import full_size
from benchmarks.results_file import add_to
from benchmarks.sampling import GUIDANCE, PROMPT, STEPS
from dataset_and_utils import eos_id, pool_at_eos


def expert_pipeline(base: Path) -> Any:
    """The pipeline of the base, in fp16 and ready to compile in its first call."""
    from diffusers import StableDiffusionXLPipeline

    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(
        base, variant="fp16", dtype=torch.float16, add_watermarker=False
    ).to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    for encoder, tokenizer in (
        (pipeline.text_encoder, pipeline.tokenizer),
        (pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pool_at_eos(encoder, eos_id(tokenizer))
    pipeline.fuse_qkv_projections()
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.channels_last)
    pipeline.unet = torch.compile(pipeline.unet, mode="reduce-overhead", fullgraph=True)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode="reduce-overhead", fullgraph=True)
    return pipeline


def seconds(pipeline: Any, count: int, turns: int) -> list[float]:
    """Seconds of the first request for `count` pictures, which compiles, and of the `turns` after it."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(turns + 1):
            torch.cuda.synchronize()
            started = time.perf_counter()
            drawn = pipeline(
                PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, num_images_per_prompt=count
            )
            for number, picture in enumerate(drawn.images):
                picture.save(f"{folder}/{number}.png")
            times.append(time.perf_counter() - started)
    return times


def compared(expert: dict[str, float], ours: dict[str, float]) -> dict[str, float]:
    """How many times as fast as the expert's requests ours are.

    ours: `requests` of `benchmarks.sampling`.
    """
    return {
        "exact_over_expert": round(expert["expert_picture_s"] / ours["ours_1_s"], 2),
        "fast_over_expert": round(expert["expert_picture_s"] / ours["fast_1_s"], 2),
        "four_over_expert": round(expert["expert_four_s"] / ours["ours_4_s"], 2),
    }


def main() -> None:
    """Measure one picture and four at once, print the figures and add them to the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.expert", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--base", type=Path, default=Path("runs/sampling/base"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--into", type=Path, default=Path("benchmarks/results/sampling.json"))
    args = parser.parse_args()
    pipeline = expert_pipeline(full_size.save_pipeline(args.base))
    found = {}
    for count, name in ((1, "picture"), (4, "four")):
        first, *more = seconds(pipeline, count, args.turns)
        found |= {f"expert_{name}_s": round(median(more), 3), f"expert_{name}_first_s": round(first, 1)}
    found |= compared(found, json.loads(args.into.read_text())["requests"])
    add_to(args.into, **found)
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
