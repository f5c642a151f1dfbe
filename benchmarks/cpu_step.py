"""`python -m benchmarks.cpu_step`: how long a training step and a check of the miniature take on a CPU.

With `--before FOLDER` another checkout of this project takes turns with this one, and their losses are compared. So a busy
machine slows both. Each run has a process of its own. CPU seconds are those of all threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
STEPS, SETTLED, PICTURES, SIDE = 20, 3, 8, 256
"""The steps of a run, with the pivot in the middle, and how many after the start and after the pivot do not count."""
KINDS: dict[str, dict[str, Any]] = {"lora": {"is_lora": True}, "full": {"is_lora": False}}
"""What trains → settings that differ from those of the demo."""


def run(kind: str) -> dict[str, Any]:
    """The losses of a run, and the seconds and CPU seconds of a step before and after the pivot, and of a check."""
    from sdxl import process

    process.repeat_on_cpu()
    if hasattr(process, "share_cores"):  # an older checkout may lack it
        process.share_cores()
    process.configure_logging()
    import torch

    from benchmarks import full_size
    from sdxl import miniature
    from sdxl.model.components import load_components
    from sdxl.training.config import TrainingConfig
    from sdxl.training.recipe import StepReport, fine_tune
    from sdxl.training.watch import Watch

    torch.manual_seed(0)
    base, cpu = ROOT / "base_models" / "tiny-sdxl", torch.device("cpu")
    common: dict[str, Any] = {"base": "miniature", "token_map": "TOK:2", "token_init": "TOK:toy", "seed": 0}
    common |= {"resolution": SIDE, "max_train_steps": STEPS, "unet_learning_rate": 1e-5, **miniature.TRAINING}
    config = TrainingConfig(**common | KINDS[kind])
    parts = load_components(base, is_lora=config.is_lora, device=cpu)
    data = full_size.examples(parts, PICTURES, SIDE)
    watch = Watch(checks=1, held_out=type(data)(data.examples[:2]))
    losses, ends = [], []

    def note(report: StepReport) -> None:
        losses.append(report.loss)
        ends.append(_now())

    fine_tune(parts, data, config, watch=watch, on_step=note)
    found: dict[str, Any] = {"losses": losses}
    spans = {"before_pivot": ends[SETTLED : STEPS // 2], "after_pivot": ends[STEPS // 2 + SETTLED :]}
    for name, some in spans.items():
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(some)]
        found[f"{name}_s"], found[f"{name}_cpu_s"] = (median(column) for column in zip(*steps, strict=True))
    assert watch._meter is not None
    before = _now()
    watch._meter.read()
    found["check_s"], found["check_cpu_s"] = (b - a for a, b in zip(before, _now(), strict=True))
    return found


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def compare(before: Path | None, turns: int, kinds: list[str]) -> dict[str, Any]:
    """The medians of so many runs, of this checkout and of the one `before`, and how far apart their losses are."""
    folders = {"now": ROOT} | ({"before": before} if before else {})
    found: dict[str, Any] = {}
    for kind in kinds:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
        for _ in range(turns):
            for name, folder in folders.items():
                runs[name].append(_run_in(folder, kind))
        rows = {
            name: {
                figure: round(median(run[figure] for run in some), 4)
                for figure in some[0]
                if figure != "losses"
            }
            for name, some in runs.items()
        }
        found[kind] = rows
        if before:
            found[f"{kind}_times_as_fast"] = {
                figure: round(rows["before"][figure] / value, 2) for figure, value in rows["now"].items()
            }
            pairs = zip(runs["before"][0]["losses"], runs["now"][0]["losses"], strict=True)
            found[f"{kind}_largest_loss_difference"] = max(abs(new - old) / old for old, new in pairs)
    return found


def _run_in(folder: Path, kind: str) -> dict[str, Any]:
    """What `run` finds in a process of its own, with the code of the checkout in `folder`."""
    told = subprocess.run(
        [sys.executable, "-c", f"import json; from cpu_step import run; print(json.dumps(run({kind!r})))"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parent)])},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return json.loads(told.splitlines()[-1])


def main() -> None:
    """Measure, and write the figures to the results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_step", description=__doc__)
    parser.add_argument("--before", type=Path, help="folder of another checkout of this project")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu_step.json"))
    args = parser.parse_args()
    from benchmarks import results_file
    from benchmarks.quality import about

    found = compare(args.before and args.before.resolve(), args.turns, args.kinds)
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    results_file.write_and_print(args.output, found | {"threads": threads} | about("cpu"))


if __name__ == "__main__":
    main()
