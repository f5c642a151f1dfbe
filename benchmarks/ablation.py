"""`python -m benchmarks.ablation`: measure what each setting of the recipe is worth, changing one at a time.

Every variant learns the same subjects from the same pictures in the same number of steps, with several seeds. The
subjects are development subjects unless `--judging` is given. Differences are paired: each compares the same subject and
seed with and without the change. The error is the standard error over these pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields, replace
from statistics import mean, stdev
from typing import Any

from benchmarks.quality import METHODS, about, add_job_arguments, run_all, save_sheet
from benchmarks.scores import fidelity
from benchmarks.subject_job import Method

DEFAULT = "default"
FULL, LORA = (next(m for m in METHODS if m.name == name) for name in ("full_pivotal", "lora_pivotal"))
_PRIOR = "a photo of a toy|a photo of a house|a photo of a tree|a photo of a car"
CHANGES: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "pivot at 0": {"pivot_fraction": 0.0},
    "pivot at 0.25": {"pivot_fraction": 0.25},
    "pivot at 1": {"pivot_fraction": 1.0},
    "rows start at random": {"init": ""},
    "rows start at random, pivot at 0": {"init": "", "pivot_fraction": 0.0},
    "rows start at random, pivot at 1": {"init": "", "pivot_fraction": 1.0},
    "rare word, no rows": {"called": "sks", "pivot_fraction": 0.0},
    "rare word and class, no rows": {"called": "sks toy", "pivot_fraction": 0.0},
    "1 row": {"rows": 1},
    "4 rows": {"rows": 4},
    "rows at a third of their rate": {"ti_lr": 1.7e-3},
    "loss not weighted by SNR": {"snr_gamma": 1e6},
    "min-SNR γ 1": {"snr_gamma": 1.0},
    "offset noise 0.05": {"noise_offset": 0.05},
    "caption dropout 0.1": {"caption_dropout": 0.1},
    "constant learning rate": {"lr_scheduler": "constant"},
    "half the learning rate": {"rate": 0.5},
    "twice the learning rate": {"rate": 2.0},
    "twice the steps": {"steps": 2.0},
    "four times the steps": {"steps": 4.0},
    "no views": {"views": 0},
    "no pixels for views": {"raw_side": 256},
    "7 views": {"views": 7},
    "31 views": {"views": 31},
    "masks": {"masks": True},
    "masks, the base outside at full weight": {"masks": True, "mask_floor": 1.0},
    "masks, the pictures outside": {"masks": True, "mask_base_target": False},
    "masks, the pictures outside, floor 0": {"masks": True, "mask_base_target": False, "mask_floor": 0.0},
    "mirrored too": {"horizontal_flip": True},
    "prior preservation": {"prior": _PRIOR},
    "8-bit AdamW": {"optimizer": "adamw_8bit"},
    "Prodigy": {"optimizer": "prodigy", "rate": None},
}
"""Name → what changes. `steps` and `rate` are factors; a rate of None means a learning rate of 1. All other keys are fields
of `Method` or of `TrainingConfig`."""
LORA_CHANGES: dict[str, dict[str, Any]] = {
    "attention only": {"lora_targets": "attention"},
    "transformer blocks only": {"lora_targets": "transformer"},
    "rank 4": {"lora_rank": 4},
    "rank 64": {"lora_rank": 64},
    "alpha half the rank": {"lora_alpha": 8},
    "DoRA": {"use_dora": True},
}
_METHOD_FIELDS = {field.name for field in fields(Method)}


def variants(base: Method, steps: int, seeds: int) -> list[Method]:
    """Every change of `base` with each of `seeds` seeds, named "base/change/seed"."""
    changes = CHANGES | (LORA_CHANGES if base.settings.get("is_lora") else {})
    rate_name = "lora_lr" if base.settings.get("is_lora") else "unet_learning_rate"
    made = []
    for name, change in changes.items():
        of_method = {key: value for key, value in change.items() if key in _METHOD_FIELDS}
        settings = {key: value for key, value in change.items() if key not in {"rate", "steps", *of_method}}
        if "rate" in change:
            settings[rate_name] = base.settings[rate_name] * change["rate"] if change["rate"] else 1.0
        settings["max_train_steps"] = round(steps * change.get("steps", 1.0))
        for seed in range(seeds):
            whole = {**base.settings, **settings, "seed": seed}
            made.append(replace(base, name=f"{base.name}/{name}/{seed}", settings=whole, **of_method))
    return made


def summarise(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """One row of means for each "base/change".

    fidelity and prompt (prompts followed) go from 0 to 1. drift is in points. score is fidelity × prompt in points, gain
    its paired difference from the default and gain_error the standard error of that.
    """
    untuned = {r["seed"]: r for r in results if r["method"] == "untuned"}
    rows: dict[str, dict[tuple[int, str], dict[str, float]]] = {}
    for r in results:
        if r["method"] == "untuned":
            continue
        before = untuned[r["seed"]]
        base, change, seed = r["method"].split("/")
        reached = fidelity(r["similarity"], untuned=before["similarity"], real=r["real_similarity"])
        rows.setdefault(f"{base}/{change}", {})[r["seed"], seed] = {
            "fidelity": reached,
            "prompt": r["prompt_all"],
            "drift": 100 * (before["prior_all"] - r["prior_all"]),
            "diversity": r["diversity"],
            "score": 100 * reached * r["prompt_all"],
        }
    table = {}
    for name, group in rows.items():
        default = rows[f"{name.split('/')[0]}/{DEFAULT}"]
        gains = [group[key]["score"] - default[key]["score"] for key in group if key in default]
        keys = ("fidelity", "prompt", "drift", "diversity", "score")
        table[name] = {key: round(mean(row[key] for row in group.values()), 4) for key in keys}
        table[name]["gain"] = round(mean(gains), 2)
        table[name]["gain_error"] = round(stdev(gains) / len(gains) ** 0.5, 2) if len(gains) > 1 else 0.0
        table[name]["runs"] = len(gains)
    return table


def markdown(table: dict[str, dict[str, float]]) -> str:
    """The table in Markdown, one row for each change."""
    lines = [
        "| change | fidelity | prompts followed | drift, points | diversity | gain, points | runs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in table.items():
        lines.append(
            f"| {name.replace('/', ': ')} | {row['fidelity']:.3f} | {row['prompt']:.3f} | {row['drift']:.1f} "
            f"| {row['diversity']:.2f} | {row['gain']:+.1f} ± {row['gain_error']:.1f} | {row['runs']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all variants, print the table and write it as JSON and Markdown."""
    args = _arguments()
    subjects = [(1 if args.judging else 0) + 2 * i for i in range(args.subjects)]
    methods = [Method(name="untuned", trained=False)]
    for base in (FULL, LORA):
        methods += variants(base, args.steps, args.training_seeds)
    if args.only:
        kept = {DEFAULT, *args.only}
        methods = [m for m in methods if not m.trained or m.name.split("/")[1] in kept]
    results = run_all(subjects, methods, args)
    table = summarise(results)
    sys.stdout.write(markdown(table) + "\n")
    args.output.mkdir(parents=True, exist_ok=True)
    numbers = {"subjects": subjects, "steps": args.steps, "table": table} | about(args.device)
    (args.output / f"{args.name}.json").write_text(json.dumps(numbers, indent=2) + "\n")
    (args.output / f"{args.name}.md").write_text(markdown(table) + "\n")
    if args.sheet_subjects:
        save_sheet(results, subjects[: args.sheet_subjects], args.output / f"{args.name}.jpg")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument("--subjects", type=int, default=4)
    parser.add_argument(
        "--judging", action="store_true", help="use the judging subjects, with odd seeds: once, at the end"
    )
    parser.add_argument("--training-seeds", type=int, default=2, help="seeds for each variant and subject")
    parser.add_argument("--name", default="ablation", help="name of the output files")
    parser.add_argument(
        "--sheet-subjects", type=int, default=0, help="write a sheet of this many subjects' pictures"
    )
    parser.add_argument(
        "--only", nargs="+", choices=[*CHANGES, *LORA_CHANGES], help="measure only these changes"
    )
    add_job_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
