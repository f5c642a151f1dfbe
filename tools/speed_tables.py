"""Print the tables of speed for README.md, from the benchmarks' result files.

python -m tools.speed_tables
"""

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")
_TRAINED = {
    "lora_1024": "LoRA, 1024×1024, batch 4",
    "lora_768": "LoRA, 768×768, batch 4",
    "full": "full UNet, 1024×1024, batch 4",
    "lora_12gb": "LoRA, 1024×1024, batch 1",
    "full_24gb": "full UNet, 1024×1024, batch 1",
}
_MEASURED = ("before_pivot_ms", "after_pivot_ms", "peak_gib")
_SUMMARY = {
    "speedup_1024": "LoRA at 1024×1024, times as fast as the plain loop",
    "speedup_768": "LoRA at 768×768, times as fast as the plain loop",
    "warm_first_step_s": "LoRA, from the start of the process to its first step, kernels in the cache, s",
    "warm_imported_s": "of which Python's imports, s",
    "archive_to_tar_min": "LoRA, 1000 steps at 1024×1024 from archive to tar, minutes",
    "two_gpus_speedup": "LoRA on two GPUs, pictures a second over those on one",
    "loss_difference_1024": "largest difference of a step's loss from the eager way's, share",
}
_DRAWN = {
    "request_speedup": "one picture from prompt to PNG, times as fast as diffusers",
    "request4_speedup": "four pictures in one request, times as fast as diffusers",
    "switch_lora_s": "to another LoRA from a tar on local disk, s",
    "switch_unet_s": "to another full UNet from a tar on local disk, s",
    "switch_base_s": "back to the base, s",
    "setup_s": "from the start of the process to the first picture on disk, s",
}


def training_table(results: dict[str, Any]) -> str:
    """Markdown: every kind of run of `training.json`, then what sums it up."""
    lines = [
        "| | ms a step before the pivot | after | peak, GiB | share of the ceiling |",
        "|---|---|---|---|---|",
    ]
    for part, what in _TRAINED.items():
        runs: dict[str, list[dict[str, float]]] = {}
        for name, row in results["table"].get(part, {}).items():
            runs.setdefault(name.removesuffix(", again"), []).append(row)
        for name, rows in runs.items():
            shown = [_range([row[key] for row in rows if key in row]) for key in _MEASURED]
            share = _range(
                [round(100 * row["share_of_ceiling"]) for row in rows if "share_of_ceiling" in row]
            )
            lines.append(f"| {what}: {name} | {' | '.join(shown)} | {share}{' %' if share != '–' else ''} |")
    return "\n".join(lines) + "\n\n" + _summary(results | results.get("whole_run", {}), _SUMMARY)


def sampling_table(results: dict[str, Any], fp8: dict[str, Any], tiers: list[dict[str, Any]]) -> str:
    """Markdown: calls of the UNet, then whole requests, those where parts take turns on the GPU last."""
    lines = [
        "| | a guided picture, ms a step | four, ms a step | levels of 255 from eager's picture |",
        "|---|---|---|---|",
    ]
    for name, found, whose in (
        ("diffusers, eager", results, "eager"),
        ("`SDXL_SPEED=compiled`", results, "ours"),
        ("`SDXL_SPEED=fp8`", fp8, "ours"),
    ):
        calls = found["calls"]
        levels = found["picture_difference_levels"] if whose == "ours" else 0
        lines.append(f"| {name} | {calls[f'{whose}_2_rows_ms']} | {calls[f'{whose}_8_rows_ms']} | {levels} |")
    slower = [
        f"| one picture with `SDXL_MEMORY={tier['memory']}` ({tier['speed']}), s (GPU memory held, GiB) "
        f"| {tier['request_s']:.3g} ({tier['peak_gib']:.3g}) |"
        for tier in tiers
    ]
    return "\n".join([*lines, "", _summary(results, _DRAWN), *slower])


def tables(root: Path) -> list[str]:
    """Both tables, from the results under `root`."""
    training, sampling, fp8, *tiers = (
        json.loads((root / RESULTS / f"{name}.json").read_text())
        for name in ("training", "sampling", "sampling-fp8", "sampling-12gb", "sampling-8gb")
    )
    return [training_table(training), sampling_table(sampling, fp8, tiers)]


def _range(values: list[float]) -> str:
    """What runs of one kind measured, from the least to the most."""
    texts = [f"{value:.0f}" if value >= 50 else f"{value:g}" for value in sorted(values)]
    if not texts:
        return "–"
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def _summary(results: dict[str, Any], names: dict[str, str]) -> str:
    found = [
        f"| {what} | {results[key]:.3g} |" for key, what in names.items() if results.get(key) is not None
    ]
    return "\n".join(["| | |", "|---|---|", *found])


if __name__ == "__main__":
    sys.stdout.write("\n\n".join(tables(Path())) + "\n")
