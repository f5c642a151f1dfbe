"""`python -m benchmarks.watching`: what checks and previews cost a LoRA training at SDXL's full size.

Weights are random, in the published configuration. One run with the product's defaults, but fewer steps: it has as many
checks and previews as a run of 1000 steps, so their seconds are divided by the time of 1000 steps. Needs a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import full_size
from benchmarks.quality import about
from benchmarks.training import middle, settings
from dataset_and_utils import ExampleDataset, TokenMap
from sdxl.process import keep_compiled_kernels
from sdxl.serving.previews import PreviewDrawer, preview_prompts, preview_side
from sdxl.training.config import TrainingOptions
from sdxl.training.presets import PRESETS
from sdxl.training.recipe import StepReport, fine_tune
from sdxl.training.watch import AT_ONCE, Watch

SIDE, PICTURES = 1024, 8
STEPS, SETTLED = 72, 24
LONG = 1000
"""Steps of the run whose share is told."""


def measure(*, previews: bool) -> dict[str, Any]:
    """The seconds of watching with or without previews, and the milliseconds of a step."""
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
    token_map = TokenMap.parse(config.token_map)
    watch = Watch(checks=TrainingOptions.checks, held_out=ExampleDataset(data.examples[:2]))
    reports: list[StepReport] = []
    with tempfile.TemporaryDirectory() as folder:
        if previews:
            prompts = preview_prompts(["a photo of TOK"], token_map)
            side = preview_side(SIDE)
            watch.draw = PreviewDrawer(
                parts,
                token_map,
                prompts,
                Path(folder) / "previews",
                side=side,
                seed=0,
                at_once=AT_ONCE * config.train_batch_size // 2,
            )
        fine_tune(parts, data, config, watch=watch, on_step=reports.append)
    watched = watch.history.watched_seconds
    steps = [b.seconds - a.seconds for a, b in itertools.pairwise(reports)][SETTLED:]
    step_ms = middle([1000 * seconds for seconds in steps])
    return {
        "watched_s": round(watched, 2),
        "step_ms": step_ms,
        "share_of_1000_steps": round(watched / (LONG * step_ms / 1000), 4),
    }


def main() -> None:
    """Measure with previews and without, and add the figures to `best.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watching", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/best.json"))
    args = parser.parse_args()
    keep_compiled_kernels()
    rows = {"checks and previews": measure(previews=True), "checks alone": measure(previews=False)}
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.is_file() else {}
    results["overhead_share"] = rows["checks and previews"]["share_of_1000_steps"]
    results["watching"] = rows | about(full_size.DEVICE)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    sys.stdout.write(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
