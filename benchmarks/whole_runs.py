"""Trainings at full size from archive to tar, as a user starts them: parts of `python -m benchmarks.training`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import full_size


def whole_run(folder: Path, *inputs: str) -> dict[str, Any]:
    """Run `train.py` from archive to tar on the saved base: a run of 6 steps to fill the caches, then one with `inputs`.

    Their logs, with seconds, stay in `folder`.
    """
    base = full_size.save_pipeline(folder / "base")
    environment = os.environ | {"SDXL_BASE": str(base), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    found: dict[str, Any] = {}
    few = [*(entry for entry in inputs if not entry.startswith("max_train_steps=")), "max_train_steps=6"]
    for name, more in (("cold", few), ("warm", inputs)):
        command = [sys.executable, "train.py", "-o", str(folder / name)]
        for entry in ("input_images=@example_datasets/crowny_1024.zip", *more):
            command += ["-i", entry]
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, bufsize=0)
        assert process.stderr is not None
        text, imported, first = "", None, None
        while part := process.stderr.read(4096):  # read the log as it arrives
            text += f"\n[{time.perf_counter() - started:.1f} s] {part.decode(errors='replace').strip()}"
            if imported is None and "Preparing pictures" in text:  # what comes first and needs all modules
                imported = time.perf_counter() - started
            if first is None and re.search(r"Training.*\| [1-9]\d*/\d+ ", text):
                first = time.perf_counter() - started
        (folder / f"{name}.log").write_text(text)
        if process.wait():
            raise RuntimeError(text[-3000:])
        found[f"{name}_imported_s"] = round(imported or float("nan"), 1)
        found[f"{name}_first_step_s"] = round(first or float("nan"), 1)
        found[f"{name}_total_s"] = round(time.perf_counter() - started, 1)
    return found


def default_run(folder: Path, steps: int) -> dict[str, Any]:
    """The default LoRA from archive to tar."""
    found = whole_run(folder, f"max_train_steps={steps}")
    return {
        "whole_run": found,
        "archive_to_tar_min": round(found["warm_total_s"] / 60, 2),
        "warm_first_step_s": found["warm_first_step_s"],
    }


def quick_run(folder: Path) -> dict[str, Any]:
    """`preset=quick` from archive to tar."""
    found = whole_run(folder, "preset=quick")
    return {"quick_run": found, "quick_archive_to_tar_s": found["warm_total_s"]}
