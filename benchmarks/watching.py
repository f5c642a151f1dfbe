"""`python -m benchmarks.watching`: how much longer a LoRA run at full size takes because it is watched.

The settings are the product's defaults, weights are random, and a run is short: it has as many looks and previews as a run of
1000 steps, so what they cost is divided by the time of 1000 steps. The cost is the difference between whole runs with and
without. Each run has a process of its own, as a user's has: the first call of a kernel is slow, watched or not. Needs a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import full_size
from benchmarks.quality import about
from benchmarks.results_file import add_to
from benchmarks.training import middle, settings
from dataset_and_utils import ExampleDataset, TokenMap
from sdxl.process import keep_compiled_kernels
from sdxl.serving.previews import PreviewDrawer, preview_prompts, preview_side
from sdxl.training.config import TrainingConfig, TrainingOptions
from sdxl.training.presets import PRESETS
from sdxl.training.recipe import StepReport, fine_tune
from sdxl.training.watch import Watch

SIDE, PICTURES = 1024, 8
STEPS, SETTLED = 48, 24
LONG = 1000
"""Steps of the run whose share is told."""
WAYS = ("nothing", "checks", "checks and previews")
"""What may be watched."""


def run(way: str) -> dict[str, float]:
    """The seconds of a run, of its looks by its own clock, and the milliseconds of a step."""
    good = PRESETS["good"]
    config = settings(
        SIDE,
        max_train_steps=STEPS,
        lora_rank=good.lora_rank,
        lora_targets=good.lora_targets,
        pivot_fraction=0.25,
    )
    parts = full_size.components(is_lora=True)
    data = full_size.examples(parts, PICTURES, SIDE)
    reports: list[StepReport] = []
    with tempfile.TemporaryDirectory() as folder:
        watch = _watch(way, parts, data, config, Path(folder))
        torch.cuda.synchronize()
        started = time.perf_counter()
        fine_tune(parts, data, config, watch=watch, on_step=reports.append)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    steps = [b.seconds - a.seconds for a, b in itertools.pairwise(reports)][SETTLED:]
    return {
        "run_s": round(seconds, 2),
        "watched_s": round(watch.history.watched_seconds, 2),
        "step_ms": middle([1000 * seconds for seconds in steps]),
    }


def _watch(way: str, parts: Any, data: ExampleDataset, config: TrainingConfig, folder: Path) -> Watch:
    if way == "nothing":
        return Watch()
    watch = Watch(checks=TrainingOptions.checks, held_out=ExampleDataset(data.examples[:2]))
    if way == "checks and previews":
        token_map = TokenMap.parse(config.token_map)
        watch.folder = folder
        watch.draw = PreviewDrawer(
            parts,
            token_map,
            preview_prompts(["a photo of TOK"], token_map),
            folder / "previews",
            side=preview_side(SIDE),
            seed=0,
            at_once=config.at_once_without_gradients // 2,
        )
    return watch


def shares(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """What each way costs: the medians of its runs, and the share of 1000 steps that its runs take longer than unwatched."""
    rows = {
        way: {name: median(row[name] for row in found) for name in found[0]} for way, found in runs.items()
    }
    alone = rows["nothing"]
    for row in rows.values():
        row["longer_s"] = round(row["run_s"] - alone["run_s"], 2)
        row["share_of_1000_steps"] = round(row["longer_s"] / (LONG * alone["step_ms"] / 1000), 4)
    return rows


def main() -> None:
    """Measure all ways in turns, and add the figures to `best.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watching", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/best.json"))
    parser.add_argument(
        "--turns", type=int, default=3, help="runs of each way, after one that fills the caches"
    )
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_compiled_kernels()
    if args.run:
        sys.stdout.write(json.dumps(run(args.run)) + "\n")
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn, way in itertools.product(range(args.turns + 1), WAYS):
        if turn == 0 and way != WAYS[-1]:
            continue
        command = [sys.executable, "-m", "benchmarks.watching", "--run", way]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        if turn:
            runs[way].append(json.loads(told.splitlines()[-1]))
    rows = shares(runs)
    share = rows[WAYS[-1]]["share_of_1000_steps"]
    add_to(args.output, overhead_share=share, watching=rows | about(full_size.DEVICE))
    sys.stdout.write(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
