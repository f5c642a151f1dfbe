"""`python -m benchmarks.pictures`: draw the documentation's pictures of results.

Writes `quality.jpg` (three subjects in five new scenes), `steps.jpg` (short and long runs) and `two_subjects.jpg` (two
subjects in one fine-tune). Takes about three minutes on an H100 with 16 cores.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import prompts as P
from benchmarks.judging import draw
from benchmarks.quality import (
    METHODS,
    SHEET_PROMPTS,
    SHEET_SIDE,
    SHEET_TEXT,
    add_job_arguments,
    run_all,
    sheet_pictures,
    subject_rows,
)
from benchmarks.subject_job import BASE, Method, learn, training_pictures
from sdxl.data.contact_sheet import Row, contact_sheet
from sdxl.files.archives import unpack
from sdxl.serving.pipeline import load_pipeline
from sdxl.serving.tuned_pipeline import TunedPipeline
from tiny_world.sheets import to_pil

SUBJECTS = [1, 3, 5]
FULL, LORA = (next(m for m in METHODS if m.name == name) for name in ("full_pivotal", "lora_pivotal"))
LONGER = 4
"""The long runs of `steps.jpg` have this many times the steps of the short ones."""

PAIR = Path("example_datasets/doggo_robo.zip")
PAIR_TOKENS = "DOGGO_TOK:2,ROBO_TOK:2"
PAIR_METHOD = replace(LORA, settings={**LORA.settings, "token_init": "DOGGO_TOK:animal,ROBO_TOK:robot"})
"""Each token starts at a word of its own: two that start at the same word are easily confused."""
ALONE = [
    "a photo of DOGGO_TOK in the middle on a plain red background",
    "a photo of DOGGO_TOK on the right on a blue striped background",
    "a photo of ROBO_TOK in the middle on a green checkered background",
    "a photo of ROBO_TOK on the left on a yellow dotted background",
]
TOGETHER = [
    "a photo of DOGGO_TOK to the left of ROBO_TOK on a plain white background",
    "a photo of ROBO_TOK to the left of DOGGO_TOK on a plain purple background",
    "a photo of DOGGO_TOK to the right of ROBO_TOK on a cyan striped background",
    "a photo of ROBO_TOK next to DOGGO_TOK on a plain gray background",
]


def main() -> None:
    """Train the fine-tunes and write the chosen sheets."""
    args = _arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    if "methods" in args.sheets:
        _draw_methods(args)
    if "two_subjects" in args.sheets:
        _save(two_subjects_sheet(args), args.output / "two_subjects.jpg")


def _draw_methods(args: argparse.Namespace) -> None:
    """Write `quality.jpg` and `steps.jpg`, which show the same fine-tunes."""
    methods = [_of_steps(m, steps) for m in (LORA, FULL) for steps in (args.steps, LONGER * args.steps)]
    results = run_all(SUBJECTS, methods, args)
    default = [r for r in results if r["method"] == methods[0].name]
    _save(quality_sheet(default), args.output / "quality.jpg")
    _save(steps_sheet(results, SUBJECTS[:2]), args.output / "steps.jpg")


def quality_sheet(results: list[dict[str, Any]]) -> Image.Image:
    """One row for each result: a training picture, then the new scenes."""
    captions = ["a training picture", *(P.subject_prompts()[i][0] for i in SHEET_PROMPTS)]
    rows = []
    for number, result in enumerate(results, 1):
        real = to_pil(training_pictures(result["seed"]).images[0])
        row = Row(title=f"Subject {number}", pictures=[real, *sheet_pictures(result)], captions=captions)
        rows.append(row)
    return contact_sheet(rows, side=SHEET_SIDE, text=SHEET_TEXT)


def steps_sheet(results: list[dict[str, Any]], subjects: list[int]) -> Image.Image:
    """For each subject its training pictures, then the new scenes of every run."""
    rows = [row for seed in subjects for row in subject_rows(results, seed)]
    return contact_sheet(rows, side=SHEET_SIDE, text=SHEET_TEXT)


def two_subjects_sheet(args: argparse.Namespace) -> Image.Image:
    """Learn both subjects of `PAIR` in one fine-tune, then draw each alone and both together."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        shown = [
            Image.open(path).convert("RGB")
            for path in sorted(unpack(PAIR, folder / "raw"))
            if path.suffix == ".png"
        ]
        tuned = learn(
            folder / "raw",
            folder,
            PAIR_METHOD,
            base=BASE,
            token_map=PAIR_TOKENS,
            resolution=256,
            steps=2 * args.steps,
            batch_size=args.batch_size,
            device=args.device,
        )
        pipeline = TunedPipeline(load_pipeline(BASE, torch.device(args.device)))
        pipeline.activate(tuned)
        pipeline.pipeline.set_progress_bar_config(disable=True)
        drawn = draw(pipeline, ALONE + TOGETHER, 100, side=256, steps=args.sampling_steps)
    pictures = [to_pil(picture) for picture in drawn]
    rows = [
        Row(title="Four of the eight training pictures", pictures=[shown[i] for i in (0, 1, 3, 6)]),
        Row(title="Each subject alone in new scenes", pictures=pictures[: len(ALONE)], captions=ALONE),
        Row(title="Both together", pictures=pictures[len(ALONE) :], captions=TOGETHER),
    ]
    return contact_sheet(rows, text=20)


def _of_steps(method: Method, steps: int) -> Method:
    """`method` with its own number of steps, named "full UNet, 200 steps"."""
    kind = "LoRA" if method.settings.get("is_lora") else "full UNet"
    return replace(
        method, name=f"{kind}, {steps} steps", settings={**method.settings, "max_train_steps": steps}
    )


def _save(sheet: Image.Image, path: Path) -> None:
    sheet.save(path, quality=88)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    sheets = ["methods", "two_subjects"]
    help_text = "methods: quality.jpg and steps.jpg; two_subjects: two_subjects.jpg"
    parser.add_argument("--sheets", nargs="+", choices=sheets, default=sheets, help=help_text)
    add_job_arguments(parser)
    parser.set_defaults(output=Path("docs"), workdir=Path("runs/pictures"), sampling_steps=25, seeds=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
