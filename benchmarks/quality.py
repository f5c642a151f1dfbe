"""`python -m benchmarks.quality`: measure how well each method learns a subject and still follows prompts.

Every method gets the same pictures, steps, prompts and seeds. Fidelity compares the identity of drawn pictures with that of
fresh real pictures: it is 1 for real pictures among themselves and 0 for the untuned base. The work folder keeps finished
jobs, so a stopped run continues where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks import base, prompts
from benchmarks.base import autoencoder_identity
from benchmarks.scores import fidelity
from benchmarks.subject_job import BASE, SETTINGS, Method, run_job, training_pictures
from benchmarks.workers import in_processes
from sdxl.data.contact_sheet import Row, contact_sheet
from sdxl.training.config import PresetName
from sdxl.training.presets import relative_to_good
from tiny_world.sheets import to_pil

_LORA = {"is_lora": True, "lora_targets": "all", "lora_lr": 2.5e-3}
_FULL = {"unet_learning_rate": 4e-4}
_SHARED = {"init": "toy", "views": 15}
_NO_TI, _PIVOTAL = {"pivot_fraction": 0.0, "preservation": 0.0}, {"pivot_fraction": 0.5, "ti_lr": 2e-3}
_WORD, _CLASS = {"called": "sks"}, {"called": "sks toy"}
_LORA_PIVOTAL = Method(name="lora_pivotal", **_SHARED, settings=_LORA | _PIVOTAL)


def _as_preset(preset: PresetName) -> Method:
    """`lora_pivotal`, changed as a preset differs from good."""
    settings = {**SETTINGS, **_LORA_PIVOTAL.settings}
    changes, factor = relative_to_good(preset, settings, images=len(prompts.TRAINING))
    return replace(
        _LORA_PIVOTAL,
        name=f"lora_{preset}",
        settings={**_LORA_PIVOTAL.settings, **changes},
        steps_factor=factor,
    )


METHODS = (
    Method(name="untuned", trained=False),
    Method(
        name="ti",
        **_SHARED,
        settings=_LORA | {"lora_lr": 0.0, "pivot_fraction": 1.0, "ti_lr": 5e-3, "preservation": 0.0},
    ),
    Method(name="lora", **_SHARED | _WORD, settings=_LORA | _NO_TI),
    Method(name="lora_class", **_SHARED | _CLASS, settings=_LORA | _NO_TI),
    Method(name="full", **_SHARED | _WORD, settings=_FULL | _NO_TI),
    Method(name="full_class", **_SHARED | _CLASS, settings=_FULL | _NO_TI),
    _LORA_PIVOTAL,
    _as_preset("quick"),
    _as_preset("patient"),
    Method(name="full_pivotal", **_SHARED, settings=_FULL | _PIVOTAL),
)
"""All methods learn the same views of the same pictures. Their captions differ only in the subject's name. With textual
inversion (TI) it is a token whose rows start at the word of its class. Without, it is a rare word as in DreamBooth, alone or
before the class."""
DEFAULT_METHODS = ("untuned", "ti", "lora", "full", "lora_pivotal", "full_pivotal")
TITLES = {
    "untuned": "untuned base",
    "ti": "textual inversion only",
    "lora": "LoRA without TI",
    "lora_class": "LoRA without TI, class named",
    "full": "full UNet without TI",
    "full_class": "full UNet without TI, class named",
    "lora_pivotal": "LoRA + pivotal",
    "lora_quick": "LoRA + pivotal, as preset quick",
    "lora_patient": "LoRA + pivotal, as preset patient",
    "full_pivotal": "full UNet + pivotal",
}
SHEET_PROMPTS = (0, 2, 4, 7, 8)
"""Which prompts the sheets show. Ten beside each other would be too small to read."""
SHEET_SIDE, SHEET_TEXT = 200, 20
"""Pixels. A page that is 900 pixels wide shows a sheet of five or six columns with letters of at least 14."""


def main(arguments: list[str] | None = None) -> None:
    """Run all jobs, then write the table, the JSON file and the sheet."""
    args = _arguments(arguments)
    first = 0 if args.development else 1
    subjects = [first + 2 * i for i in range(args.subjects)]
    methods = [method for method in METHODS if method.name in args.methods]
    results = run_all(subjects, methods, args)
    table = summarise(results)
    sys.stdout.write(markdown(table) + "\n")
    numbers = (
        flat_keys(table)
        | {
            "subjects": subjects,
            "steps": args.steps,
            "batch_size": args.batch_size,
            "table": table,
        }
        | about(args.device)
    )
    if args.base_prompts:
        followed, _ = base.measure(BASE, args.base_prompts, args.device)
        psnr = json.loads(Path("tiny_world/results/autoencoder.json").read_text())
        numbers |= followed | {"autoencoder_psnr": psnr["subjects_db"]}
        numbers |= {
            "autoencoder_identity": autoencoder_identity(
                BASE, args.device, subjects=min(args.base_prompts, 30)
            )
        }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "quality.json").write_text(json.dumps(numbers, indent=2) + "\n")
    (args.output / "quality.md").write_text(markdown(table) + "\n")
    save_sheet(results, subjects[: args.sheet_subjects], args.output / "quality.jpg")


def run_all(subjects: list[int], methods: list[Method], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of every job. Jobs that are in the work folder already do not run again."""
    args.workdir.mkdir(parents=True, exist_ok=True)
    jobs = [(seed, method) for seed in subjects for method in methods]
    missing = [job for job in jobs if not _files(args, *job)[0].exists()]
    missing.sort(key=lambda job: job[1].steps_factor, reverse=True)  # so that no long one is left for the end
    work = partial(
        run_job,
        steps=args.steps,
        batch_size=args.batch_size,
        seeds=args.seeds,
        sampling_steps=args.sampling_steps,
        side=args.side,
        device=args.device,
    )
    for i, result in in_processes(work, missing, workers=args.workers, device=args.device, desc="Jobs"):
        numbers, pictures = _files(args, *missing[i])
        save_file({"pictures": result.pop("pictures")}, pictures)
        unfinished = numbers.with_suffix(".partial")
        unfinished.write_text(json.dumps(result))
        unfinished.replace(numbers)  # a job counts only when its file is complete
    return [
        json.loads(numbers.read_text()) | {"pictures": load_file(pictures)["pictures"]}
        for numbers, pictures in (_files(args, *job) for job in jobs)
    ]


def summarise(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Method → means over the subjects of fidelity, prompts followed and the rest. Needs results of the untuned base."""
    untuned = {r["seed"]: r for r in results if r["method"] == "untuned"}
    rows: dict[str, list[dict[str, float]]] = {}
    for r in results:
        before = untuned[r["seed"]]
        row = {
            "fidelity": fidelity(r["similarity"], untuned=before["similarity"], real=r["real_similarity"]),
            "prompt": r["prompt_all"],
            "prompt_share": r["prompt_all"] / before["known_all"],
            "prior_drift": 100 * (before["prior_all"] - r["prior_all"]),
            "prior_diversity": r["prior_diversity"] / before["prior_diversity"],
            "diversity": r["diversity"],
            "seconds": r["seconds"],
            "peak_gib": r.get("peak_gib", 0.0),
        }
        rows.setdefault(r["method"], []).append(row)
    return {
        method: {key: round(mean(row[key] for row in group), 4) for key in group[0]}
        for method, group in rows.items()
    }


def flat_keys(table: dict[str, dict[str, float]]) -> dict[str, float]:
    """The figures to compare between versions, for the methods that ran."""
    wanted = {
        "fidelity_full_pivotal": ("full_pivotal", "fidelity"),
        "prompt_full_pivotal": ("full_pivotal", "prompt_share"),
        "prior_drift_full_pivotal": ("full_pivotal", "prior_drift"),
        "fidelity_lora_pivotal": ("lora_pivotal", "fidelity"),
    }
    return {key: table[method][column] for key, (method, column) in wanted.items() if method in table}


def markdown(table: dict[str, dict[str, float]]) -> str:
    """The table in Markdown, one row for each method."""
    lines = [
        "| method | fidelity | prompt-following | share of the base's | prior drift, points | prior diversity, share"
        " | diversity | seconds | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, row in table.items():
        lines.append(
            f"| {TITLES[method]} | {row['fidelity']:.2f} | {row['prompt']:.2f} | {row['prompt_share']:.2f}"
            f" | {row['prior_drift']:.1f} | {row['prior_diversity']:.2f} | {row['diversity']:.2f}"
            f" | {row['seconds']:.0f} | {row['peak_gib'] or '-'} |"
        )
    return "\n".join(lines)


def save_sheet(results: list[dict[str, Any]], subjects: list[int], path: Path) -> None:
    """For each subject its training pictures, then some prompts as every method draws them."""
    rows = [row for seed in subjects for row in subject_rows(results, seed)]
    contact_sheet(rows, side=SHEET_SIDE, text=SHEET_TEXT).save(path, quality=80)


def subject_rows(results: list[dict[str, Any]], seed: int) -> list[Row]:
    """The training pictures of subject `seed`, then a row for each of its results; captions under the last."""
    captions = [prompts.subject_prompts()[i][0] for i in SHEET_PROMPTS]
    learned = [to_pil(picture) for picture in training_pictures(seed).images[: len(SHEET_PROMPTS)]]
    rows = [Row(title=f"Subject {seed}: training pictures", pictures=learned)]
    for result in results:
        if result["seed"] == seed:
            base, *change = result["method"].split("/")  # of an ablation: "base/change/seed"
            title = ": ".join([TITLES.get(base, base), *change[:1]])
            rows.append(Row(title=title, pictures=sheet_pictures(result)))
    rows[-1] = replace(rows[-1], captions=captions)
    return rows


def sheet_pictures(result: dict[str, Any]) -> list[Image.Image]:
    """The pictures of `SHEET_PROMPTS`."""
    return [to_pil(result["pictures"][i] / 255) for i in SHEET_PROMPTS]


def _files(args: argparse.Namespace, seed: int, method: Method) -> tuple[Path, Path]:
    settings = json.dumps(
        [
            asdict(method),
            args.steps,
            args.batch_size,
            args.seeds,
            args.sampling_steps,
            args.side,
            prompts.training_captions(count=prompts.MOST_PICTURES),
        ]
    )
    name = re.sub(r"[^A-Za-z0-9.]+", "_", method.name)
    stem = f"{seed}-{name}-{args.steps}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    return args.workdir / f"{stem}.json", args.workdir / f"{stem}.safetensors"


def about(device: str) -> dict[str, Any]:
    """The machine and package versions of the figures."""
    cpu = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft")},
    }


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all benchmarks of jobs share."""
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each method")
    parser.add_argument("--batch-size", type=int, default=32 if gpus else 4, help="pictures in each step")
    parser.add_argument("--sampling-steps", type=int, default=15)
    parser.add_argument(
        "--side", type=int, default=256, help="pixels of the pictures that are learned and drawn"
    )
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each prompt")
    # Each process keeps a core busy. More than 20 on one GPU gain little.
    parser.add_argument("--workers", type=int, default=min(cores, 20 * max(gpus, 1)) if gpus else cores)
    parser.add_argument("--device", default="cuda" if gpus else "cpu")
    parser.add_argument("--workdir", type=Path, default=Path("runs/quality"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument(
        "--subjects", type=int, default=3, help="how many judging subjects, with odd seeds from 1"
    )
    parser.add_argument(
        "--development", action="store_true", help="use subjects with even seeds, for choosing settings"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=DEFAULT_METHODS,
        choices=list(TITLES),
        help="the methods to compare; untuned must be one of them",
    )
    parser.add_argument(
        "--base-prompts",
        type=int,
        default=0,
        help="how many held-out prompts to judge the base by; 0 for none",
    )
    parser.add_argument("--sheet-subjects", type=int, default=3)
    add_job_arguments(parser)
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
