"""`python -m benchmarks.saving`: what a saved state costs a training at full size, in seconds.

Weights are random. Two states are saved in each run: the first one also takes the pinned memory that all later ones use. The
cost of a state is what the steps up to the next one take longer than before any state. Needs a GPU, and disk space for three
states.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import full_size
from benchmarks.quality import about
from benchmarks.results_file import write_and_print
from benchmarks.training import DEFAULT_LORA, PICTURES, settings
from sdxl.process import keep_compiled_kernels
from sdxl.training.recipe import StepReport, fine_tune
from sdxl.training.state_folders import RunFolder
from sdxl.training.states import RunStates

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"is_lora": True, **DEFAULT_LORA},
    "full": {"is_lora": False, "precision": "fp32", "gradient_checkpointing": False},
}
SETTLED = 30
"""Steps at the start that do not count: they compile and capture. The pivot is among them."""


def run(kind: str, folder: Path, every: int) -> dict[str, float]:
    """Train `kind` for three times `every` steps, with a state after one and two thirds."""
    steps = 3 * every - 1
    config = settings(1024, max_train_steps=steps, pivot_fraction=10 / steps, **KINDS[kind])
    parts = full_size.components(is_lora=config.is_lora)
    data = full_size.examples(parts, PICTURES, 1024)
    states = RunStates(RunFolder(folder, kind), {}, every=every)
    ends: list[float] = []

    def note(report: StepReport) -> None:
        ends.append(time.perf_counter())

    with states:
        fine_tune(parts, data, config, states=states, on_step=note)
        written = sorted(folder.glob("*/step-*"))
        size = sum(file.stat().st_size for file in written[-1].iterdir()) if written else 0
        states.discard()
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    usual = median(seconds[SETTLED : every - 1])
    parts_of_run = {"first": seconds[every - 1 : 2 * every - 1], "next": seconds[2 * every - 1 :]}
    found = {
        f"{name}_costs_s": round(sum(some) - len(some) * usual, 2) for name, some in parts_of_run.items()
    }
    return {"state_gb": round(size / 1e9, 2), "step_ms": round(1000 * usual, 1), **found}


def main() -> None:
    """Measure the kinds, print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saving", description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--every", type=int, default=120, help="steps between two states, above 40")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/saving.json"))
    args = parser.parse_args()
    keep_compiled_kernels()
    results: dict[str, Any] = {}
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            results[kind] = run(kind, Path(folder), args.every)
        torch.cuda.empty_cache()
    write_and_print(args.output, results | about(full_size.DEVICE))


if __name__ == "__main__":
    main()
