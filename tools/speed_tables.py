"""The tables of speed in docs/speed.md, from the benchmarks' result files.

python -m tools.speed_tables           print them
python -m tools.speed_tables --write   write them into docs/speed.md
"""

import json
import sys
from pathlib import Path
from typing import Any

from tools.page_blocks import main

PAGE = Path("docs/speed.md")
RESULTS = Path("benchmarks/results")
_TRAINED = {
    "lora_default": "default LoRA, 1024×1024, batch 4",
    "lora_1024": "LoRA, 1024×1024, batch 4",
    "lora_768": "LoRA, 768×768, batch 4",
    "lora_768_h200": "LoRA, 768×768, batch 4",
    "full": "full UNet, 1024×1024, batch 4",
    "lora_fp8": "default LoRA, 1024×1024, batch 4",
    "lora_8gb": "default LoRA, 1024×1024, batch 1",
    "lora_12gb": "LoRA, 1024×1024, batch 1",
    "full_16gb": "full UNet, 1024×1024, batch 1",
    "full_24gb": "full UNet, 1024×1024, batch 1",
}
_RUNS = {
    "full UNet": "ours",
    "full UNet, graphs without compiling": "ours, graphs without compiling",
    "lora, batch 1, 12 GiB": "ours, limited to 12 GiB",
    "full, batch 1, 24 GiB": "ours, limited to 24 GiB",
}
"""Name of a run in the results → its name in the table, where they differ."""
_MEASURED = ("before_pivot_ms", "after_pivot_ms", "peak_gib")
_SUMMARY = {
    "speedup_default": "default LoRA at 1024×1024: how many times as fast as the plain loop",
    "speedup_1024": "LoRA at 1024×1024: how many times as fast as the plain loop",
    "speedup_768": "LoRA at 768×768: how many times as fast as the plain loop",
    "warm_first_step_s": "default LoRA: from process start to the first step, with cached kernels, s",
    "warm_imported_s": "of which Python's imports, s",
    "archive_to_tar_min": "default LoRA: 1000 steps at 1024×1024, from archive to tar, min",
    "quick_archive_to_tar_s": "`preset=quick`: 300 steps, from archive to tar, s",
    **{
        f"{kind}_gpus_{count}_speedup": f"{what} on {count} GPUs: pictures per second, compared with one GPU"
        for kind, what in (
            ("lora", "default LoRA"),
            ("full", "full UNet"),
            ("full_sharded", "full UNet, sharded,"),
        )
        for count in (2, 4, 8)
    },
    **{
        f"{kind}_gpus_{count}_loss_difference": f"{what} on {count} GPUs: largest relative difference of a step's loss from one GPU"
        for kind, what in (("lora", "default LoRA"), ("full", "full UNet"))
        for count in (2, 4, 8)
    },
    "loss_difference_1024": "largest relative difference of a step's loss from eager mode",
    "lora_fp8_loss_difference": "`SDXL_SPEED=fp8`: largest relative difference of a step's loss from bf16",
}
_DRAWN = {
    "request_speedup": "one picture from prompt to PNG: how many times as fast as diffusers",
    "request4_speedup": "four pictures in one request: how many times as fast as diffusers",
    "exact_picture_s": "one picture from prompt to PNG, s",
    "fast_picture_s": "one picture with `speed=fast`, from prompt to PNG, s",
    "around_ms": "of one exact picture: all but the UNet's calls, ms",
    "exact_over_expert": "one picture: how many times as fast as diffusers set up by an expert",
    "fast_over_expert": "one picture with `speed=fast`: how many times as fast as diffusers set up by an expert",
    "four_over_expert": "four pictures: how many times as fast as diffusers set up by an expert",
    "switch_lora_s": "switch to another LoRA in a tar on the local disk, s",
    "switch_unet_s": "switch to another full UNet in a tar on the local disk, s",
    "switch_base_s": "switch back to the base, s",
    "setup_s": "from process start to the first picture on disk, s",
}


def training_table(results: dict[str, Any]) -> str:
    """A row for each kind of run in `training.json`, then a table of totals, in Markdown."""
    lines = [
        "| | GPU | before the pivot, ms per step | after the pivot, ms per step | peak memory, GiB | share of the GPU's peak |",
        "|---|---|---|---|---|---|",
    ]
    for part, what in _TRAINED.items():
        runs: dict[str, list[dict[str, float]]] = {}
        for name, row in results["table"].get(part, {}).items():
            shown_as = _RUNS.get(name) or name.removesuffix(", again")
            runs.setdefault(shown_as, []).append(row)
        for name, rows in runs.items():
            shown = [_range([row[key] for row in rows if key in row]) for key in _MEASURED]
            share = _range(
                [round(100 * row["share_of_ceiling"]) for row in rows if "share_of_ceiling" in row]
            )
            measured = (
                f"{gpu_of(results, part)} | {' | '.join(shown)} | {share}{' %' if share != '–' else ''}"
            )
            lines.append(f"| {what}: {name} | {measured} |")
    return "\n".join(lines) + "\n\n" + _summary(results | results.get("whole_run", {}), _SUMMARY)


def gpu_of(results: dict[str, Any], part: str) -> str:
    """The short name of the GPU that a part of `training.json` was measured on, such as "H100"."""
    return results["machines"][part].removeprefix("NVIDIA ").split()[0]


def sampling_table(results: dict[str, Any], fp8: dict[str, Any], tiers: list[dict[str, Any]]) -> str:
    """The UNet's calls, then whole requests, then requests with less GPU memory, in Markdown."""
    lines = [
        "| | one picture, ms per step | four pictures, ms per step | mean difference from the eager picture, levels of 255 |",
        "|---|---|---|---|",
    ]
    for name, measured, key in (
        ("diffusers, eager", results, "eager"),
        ("`SDXL_SPEED=compiled`", results, "ours"),
        ("`SDXL_SPEED=fp8`", fp8, "ours"),
    ):
        calls = measured["calls"]
        levels = measured["picture_difference_levels"] if key == "ours" else 0
        lines.append(f"| {name} | {calls[f'{key}_2_rows_ms']} | {calls[f'{key}_8_rows_ms']} | {levels} |")
    slower = [
        f"| one picture with `SDXL_MEMORY={tier['memory']}` ({tier['speed']}), s (peak GPU memory, GiB) "
        f"| {tier['request_s']:.3g} ({tier['peak_gib']:.3g}) |"
        for tier in tiers
    ]
    return "\n".join([*lines, "", _summary(results, _DRAWN), *slower])


def fast_table(results: dict[str, Any]) -> str:
    """A row for each way to draw, in Markdown."""
    titles = {
        "exact": "exact, {steps} steps",
        "fast": "`speed=fast`, {steps} steps",
        "half": "exact, {half} steps",
    }
    lines = [
        "| | prompts followed, points | difference from the exact picture, levels of 255: mean | median | one in ten above |",
        "|---|---|---|---|---|",
    ]
    for name, title in titles.items():
        row = results["table"][name]
        shown = title.format(steps=results["steps"], half=results["steps"] // 2)
        levels = [f"{row[key]:.2f}" for key in ("levels", "levels_median", "levels_p90")]
        lines.append(f"| {shown} | {100 * row['followed']:.1f} | {' | '.join(levels)} |")
    saved = {
        f"flops_saved_{size}": f"share of the UNet's multiplications that `speed=fast` saves, {told}, %"
        for size, told in (("full_size", "SDXL's size"), ("miniature", "miniature"))
    }
    return "\n".join([*lines, "", _summary({key: 100 * results[key] for key in saved}, saved)])


def blocks(root: Path) -> dict[str, str]:
    """Name of a block in `PAGE` → its tables, from the results under `root`."""
    training, fast, sampling, fp8, *tiers = (
        json.loads((root / RESULTS / f"{name}.json").read_text())
        for name in ("training", "fast", "sampling", "sampling-fp8", "sampling-12gb", "sampling-8gb")
    )
    return {
        "training": training_table(training),
        "drawing": sampling_table(sampling, fp8, tiers),
        "fast": fast_table(fast),
    }


def _range(values: list[float]) -> str:
    """The smallest and the largest of the values, or one of them if they look the same."""
    texts = [f"{value:.0f}" if value >= 50 else f"{value:g}" for value in sorted(values)]
    if not texts:
        return "–"
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def _summary(results: dict[str, Any], names: dict[str, str]) -> str:
    rows = [f"| {what} | {results[key]:.3g} |" for key, what in names.items() if results.get(key) is not None]
    return "\n".join(["| | |", "|---|---|", *rows])


if __name__ == "__main__":
    sys.exit(main(PAGE, blocks(Path()), (__doc__ or "").splitlines()[0]))
