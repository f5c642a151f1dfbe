"""`python -m benchmarks.fast`: what `speed=fast` saves, and what it changes in the miniature's pictures.

The same prompts and seeds are drawn exactly, fast, and exactly in half the steps. The scorer says how many prompts are
followed, and pictures are compared with the exact ones. The prompts are of combinations that the pretraining never saw.
`benchmarks.sampling` measures seconds at full size.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks import full_size
from benchmarks.quality import about
from benchmarks.results_file import add_to, write_and_print
from benchmarks.subject_job import BASE
from sdxl.data.contact_sheet import Row, contact_sheet
from sdxl.serving.denoising import course
from sdxl.serving.painter import Painter
from sdxl.serving.request import FineTuneOptions, GenerationRequest
from sdxl.serving.samplers import SCHEDULERS, make_scheduler
from sdxl.serving.shallow_unet import ReusingUNet
from sdxl.serving.shortcuts import Call, Features, fast_calls
from tiny_world.captions import held_out_prompts
from tiny_world.following import following, shares
from tiny_world.scenes import Scene
from tiny_world.scorer import Scorer

SIDE = 256
SHOWN = 6
"""Prompts on the sheet."""


def drawn(
    painter: Painter, prompts: Sequence[str], fine_tunes: FineTuneOptions | None = None, **settings: Any
) -> list[Image.Image]:
    """A picture of each prompt; picture i has the seed i.

    settings: further fields of the requests.
    """
    pictures = []
    for seed, prompt in enumerate(tqdm(prompts, desc="Pictures", mininterval=10)):
        request = GenerationRequest(prompt=prompt, seed=seed, width=SIDE, height=SIDE, **settings)
        pictures += painter.draw(request, fine_tunes or FineTuneOptions())
    return pictures


def followed(pictures: Sequence[Image.Image], scenes: Sequence[Scene], device: str) -> float:
    """The mean share, 0 to 1, of the aspects of its scene that a picture shows."""
    scorer = Scorer(device=device)
    met = []
    for start in range(0, len(pictures), 100):
        some = np.stack([np.asarray(one) for one in pictures[start : start + 100]])
        found = scorer.attributes(torch.from_numpy(some).permute(0, 3, 1, 2).float() / 255)
        met += following(found, scenes[start : start + 100])
    return shares(met)["all"]


def differences(pictures: Sequence[Image.Image], exact: Sequence[Image.Image]) -> dict[str, float]:
    """Mean difference from the exact pictures in levels of 255: on average, of the middle picture, of one in ten."""
    each = [
        np.abs(np.asarray(one, float) - np.asarray(other, float)).mean()
        for one, other in zip(pictures, exact, strict=True)
    ]
    values = {"levels": np.mean(each), "levels_median": np.median(each), "levels_p90": np.quantile(each, 0.9)}
    return {name: round(float(value), 2) for name, value in values.items()}


def shallow_share(config: Mapping[str, Any], side: int) -> float:
    """The multiplications of a shallow call as a share of those of a whole call, for pictures of `side` pixels."""
    cells, sizes = side // 8, dict(config)
    pooled = sizes["projection_class_embeddings_input_dim"] - 6 * sizes["addition_time_embed_dim"]
    counts: dict[Features, int] = {}
    with torch.device("meta"), torch.no_grad():
        unet = ReusingUNet(UNet2DConditionModel(**sizes))
        for features in ("keep", "reuse"):
            with FlopCounterMode(display=False) as counter:
                unet(
                    torch.zeros(1, 4, cells, cells),
                    torch.zeros(1),
                    encoder_hidden_states=torch.zeros(1, 77, sizes["cross_attention_dim"]),
                    added_cond_kwargs={"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)},
                    features=features,
                )
            counts[features] = counter.get_total_flops()
    return counts["reuse"] / counts["keep"]


def cost(calls: Sequence[Call], shallow: float) -> float:
    """The multiplications of guided `calls` as a share of those of exact calls."""
    spent = sum((2 if one.guided else 1) * (shallow if one.features == "reuse" else 1) for one in calls)
    return spent / (2 * len(calls))


def measure(prompts: int, *, steps: int, guidance: float, scheduler: str) -> tuple[dict[str, Any], list[Row]]:
    """The figures, flat keys first, and rows of pictures to look at."""
    os.environ["SDXL_BASE"] = str(BASE)
    painter = Painter()
    painter.tuned.pipeline.set_progress_bar_config(disable=True)
    painter.warm_up()
    texts, scenes = zip(*held_out_prompts(prompts, seed=1), strict=True)
    ways: dict[str, dict[str, Any]] = {
        "exact": {"num_inference_steps": steps},
        "fast": {"num_inference_steps": steps, "speed": "fast"},
        "half": {"num_inference_steps": steps // 2},
    }
    table: dict[str, dict[str, float]] = {}
    pictures: dict[str, list[Image.Image]] = {}
    for name, way in ways.items():
        pictures[name] = drawn(painter, texts, guidance_scale=guidance, scheduler=scheduler, **way)
        kept = followed(pictures[name], scenes, painter.placement.device.type)
        table[name] = {"followed": kept, **differences(pictures[name], pictures["exact"])}

    sampler: Any = make_scheduler(scheduler, painter.tuned.pipeline)
    sampler.set_timesteps(steps)
    calls = fast_calls(course(sampler, 0, steps).timesteps.tolist())
    shallow = {
        "full_size": shallow_share(full_size.UNET, 1024),
        "miniature": shallow_share(UNet2DConditionModel.load_config(BASE / "unet"), SIDE),
    }
    results = {
        "fast_score_loss": round(100 * (table["exact"]["followed"] - table["fast"]["followed"]), 2),
        "fast_levels": table["fast"]["levels"],
        **{f"flops_saved_{size}": round(1 - cost(calls, share), 3) for size, share in shallow.items()},
        "table": table,
        "shallow_share": {size: round(share, 4) for size, share in shallow.items()},
        "calls": {
            "whole": sum(one.features != "reuse" for one in calls),
            "shallow": sum(one.features == "reuse" for one in calls),
            "without_guidance": sum(not one.guided for one in calls),
        },
        "prompts": prompts,
        "steps": steps,
        "guidance": guidance,
        "scheduler": scheduler,
    }
    titles = {"exact": "Exact", "fast": "Fast", "half": "Exact, in half the steps"}
    rows = [Row(title=titles[name], pictures=drawn_so[:SHOWN]) for name, drawn_so in pictures.items()]
    return results, rows


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fast", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--scheduler", default="K_EULER", choices=list(SCHEDULERS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fast.json"))
    parser.add_argument("--into", type=Path, help="a results file that gets fast_score_loss too")
    parser.add_argument("--sheet", type=Path, help="file for a sheet of the first pictures")
    args = parser.parse_args()
    results, rows = measure(args.prompts, steps=args.steps, guidance=args.guidance, scheduler=args.scheduler)
    results |= about("cuda" if torch.cuda.is_available() else "cpu")
    write_and_print(args.output, results)
    if args.into:
        add_to(args.into, fast_score_loss=results["fast_score_loss"])
    if args.sheet:
        contact_sheet(rows, side=200, text=20).save(args.sheet, quality=80)


if __name__ == "__main__":
    main()
