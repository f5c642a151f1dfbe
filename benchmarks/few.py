"""The case `few` of `benchmarks.cases`: few pictures, equal captions, and long runs, with the default mode.

Judged as in `benchmarks.quality`. A run's score is fidelity × prompts followed, where prompts followed is the share of what the
base follows with a thing that it knows. Drift is how many points other prompts lose.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.quality import METHODS, about, run_all, sheet_pictures
from benchmarks.scores import fidelity
from benchmarks.subject_job import Method, training_pictures
from sdxl.data.contact_sheet import Row, contact_sheet
from tiny_world.sheets import to_pil

NAME = "few"
DEFAULT = next(m for m in METHODS if m.name == "lora_pivotal")
UNTUNED = Method(name="untuned", trained=False)
CASES: dict[str, dict[str, Any]] = {
    "few_1": {"pictures": 1},
    "few_3": {"pictures": 3},
    "few_3_same": {"pictures": 3, "one_caption": True},
    "few_6": {"pictures": 6},
    "few_6_same": {"pictures": 6, "one_caption": True},
    "few_12": {"pictures": 12},
}
"""Number of pictures; and whether all have the caption "a photo of TOK"."""
LONG = "few_6_long"
"""`few_6` with four times the steps."""
LONG_FACTOR = 4
TITLES = {
    "few_1": "1 picture",
    "few_3": "3 pictures",
    "few_3_same": "3 pictures, one caption for all",
    "few_6": "6 pictures",
    "few_6_same": "6 pictures, one caption for all",
    "few_12": "12 pictures",
    LONG: "6 pictures, four times the steps",
}


def methods(training_seeds: int, long_seeds: int) -> list[Method]:
    """The default mode in every case with each training seed, named "case/seed", and the base without training."""
    made = [UNTUNED]
    for name, fields in {**CASES, LONG: CASES["few_6"] | {"steps_factor": LONG_FACTOR}}.items():
        for seed in range(long_seeds if name == LONG else training_seeds):
            settings = {**DEFAULT.settings, "seed": seed}
            made.append(replace(DEFAULT, name=f"{name}/{seed}", settings=settings, views=None, **fields))
    return made


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run all jobs. Returns the figures for `cases.json`, flat keys first, and the results."""
    subjects = [(0 if args.development else 1) + 2 * i for i in range(args.few_subjects)]
    results = run_all(subjects, methods(args.training_seeds, args.long_seeds), args)
    table = summarise(results)
    told = {"subjects": subjects, "steps": args.steps, "table": table} | about(args.device)
    return flat_keys(table) | {"few": told}, results


def summarise(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """A row for each case: means over subjects and training seeds, in points, and the standard error of the score."""
    untuned = {r["seed"]: r for r in results if r["method"] == UNTUNED.name}
    rows: dict[str, list[dict[str, float]]] = {}
    for r in results:
        if r["method"] == UNTUNED.name:
            continue
        before = untuned[r["seed"]]
        reached = fidelity(r["similarity"], untuned=before["similarity"], real=r["real_similarity"])
        followed = r["prompt_all"] / before["known_all"]
        row = {
            "score": 100 * reached * followed,
            "fidelity": 100 * reached,
            "prompt": 100 * followed,
            "drift": 100 * (before["prior_all"] - r["prior_all"]),
        }
        rows.setdefault(r["method"].split("/")[0], []).append(row)
    table = {}
    for name, group in rows.items():
        scores = [row["score"] for row in group]
        table[name] = {key: round(mean(row[key] for row in group), 2) for key in group[0]}
        table[name]["score_error"] = round(stdev(scores) / len(scores) ** 0.5, 2) if len(scores) > 1 else 0.0
        table[name]["runs"] = len(group)
    return table


def flat_keys(table: dict[str, dict[str, float]]) -> dict[str, float]:
    """The figures to compare between versions."""
    keys = {name: table[name]["score"] for name in CASES if name in table}
    keys["few_worst_drift"] = max(table[name]["drift"] for name in CASES if name in table)
    if LONG in table:
        keys["long_score_loss"] = round(table["few_6"]["score"] - table[LONG]["score"], 2)
        keys["long_drift"] = table[LONG]["drift"]
    return keys


def markdown(table: dict[str, dict[str, float]]) -> str:
    """The table in Markdown, one row for each case."""
    lines = ["| pictures | score | fidelity | prompts followed | drift | runs |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {TITLES[name]} | {row['score']:.1f} ± {row['score_error']:.1f} | {row['fidelity']:.0f}"
        f" | {row['prompt']:.0f} | {row['drift']:.1f} | {row['runs']:.0f} |"
        for name, row in table.items()
    ]
    return "\n".join(lines)


def save_sheet(results: list[dict[str, Any]], path: Path) -> None:
    """What the first subject's fine-tunes of 1, 3 and 12 pictures draw, below the pictures that they learned."""
    seed = results[0]["seed"]
    shown = training_pictures(seed, count=5)
    rows = [
        Row(title="The first five training pictures", pictures=[to_pil(picture) for picture in shown.images])
    ]
    for name in ("few_1", "few_3", "few_12"):
        for result in results:
            if (result["seed"], result["method"]) == (seed, f"{name}/0"):
                rows.append(Row(title=f"Learned from {TITLES[name]}", pictures=sheet_pictures(result)))
    contact_sheet(rows, side=200, text=20).save(path, quality=80)
