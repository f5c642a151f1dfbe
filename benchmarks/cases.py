"""`python -m benchmarks.cases`: measure harder cases.

The cases are two subjects in one run, cluttered pictures with and without masks, a style, and few pictures. They are judged as
in `benchmarks.quality`: fidelity is 1 for fresh real pictures and 0 for the untuned base.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import few
from benchmarks import prompts as P
from benchmarks.judging import draw, real_pictures
from benchmarks.quality import METHODS, about, add_job_arguments
from benchmarks.scores import fidelity
from benchmarks.subject_job import BASE, RAW_SIDE, Method, learn, write_renders
from benchmarks.workers import in_processes
from sdxl.data.picture_encoders import cosine_of_different
from sdxl.serving.pipeline import load_pipeline
from sdxl.serving.tuned_pipeline import TunedPipeline
from tiny_world.following import following, shares
from tiny_world.parts import pad
from tiny_world.raster import render
from tiny_world.scenes import Scene, scene_parts
from tiny_world.scorer import Scorer
from tiny_world.subjects import shot_parts, subject

OTHER = "OTHER"
FULL, LORA = (next(m for m in METHODS if m.name == name) for name in ("full_pivotal", "lora_pivotal"))
Numbers = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What to learn, what to draw and how to judge it."""

    token_map: str
    pictures: Tensor
    """[n, 3, s, s] in 0..1, where s is `RAW_SIDE`."""
    masks: Tensor
    """[n, 1, s, s] in 0..1."""
    captions: list[str]
    prompts: list[str]
    judge: Callable[[Tensor, Scorer], Numbers]
    """Takes the drawn pictures, [prompts, 3, side, side] in 0..1."""


def two_subjects(seed: int) -> Case:
    """Subjects `seed` and `seed` + 2, with six pictures each. Every prompt asks for one of them."""
    cast = {P.NAME: seed, OTHER: seed + 2}
    shown, captions, asked = [], [], []
    for name, number in cast.items():
        parts = [
            shot_parts(replace(s, kind=name), {name: subject(number)}, number * 1000 + i)
            for i, s in enumerate(P.TRAINING)
        ]
        shown += parts
        captions += [text.replace(P.NAME, name) for text in P.training_captions()]
        asked += [(text.replace(P.NAME, name), scene, name) for text, scene in P.subject_prompts()[:8]]
    rendered = render(pad(shown), size=RAW_SIDE)

    def judge(drawn: Tensor, scorer: Scorer) -> Numbers:
        real = {name: scorer.identity(real_pictures(number)) for name, number in cast.items()}
        embedded = scorer.identity(drawn)
        similar = {name: (embedded @ vectors.T).mean(1) for name, vectors in real.items()}
        numbers: Numbers = {}
        confused = []
        for name, stranger in ((P.NAME, OTHER), (OTHER, P.NAME)):
            mine = torch.tensor([asked_name == name for _, _, asked_name in asked])
            numbers[f"real_{name}"] = cosine_of_different(real[name], real[name])
            numbers[f"similarity_{name}"] = float(similar[name][mine].mean())
            confused += (similar[stranger][mine] > similar[name][mine]).tolist()
        met = following(scorer.attributes(drawn), [scene for _, scene, _ in asked])
        return numbers | {"confusion": mean(confused), "prompt": shares(met)["all"]}

    return Case(
        token_map=f"{P.NAME}:2,{OTHER}:2",
        pictures=rendered.images,
        masks=rendered.masks[:, :1],
        captions=captions,
        prompts=[prompt for prompt, _, _ in asked],
        judge=judge,
    )


CLUTTER = (
    ("tree", "yellow", "right of", "purple", "checkered"),
    ("house", "red", "left of", "cyan", "striped"),
    ("car", "green", "on top of", "orange", "dotted"),
    ("fish", "blue", "below", "pink", "checkered"),
    ("star", "orange", "above", "blue", "striped"),
    ("cup", "white", "right of", "green", "dotted"),
)
"""For each cluttered picture: the second thing, its colour, the relation, the background and its texture."""


def cluttered(seed: int, clutter: tuple = CLUTTER) -> Case:
    """One subject. Every picture also shows another thing and a busy background, which the caption does not name."""
    scenes = [
        Scene(
            kind=P.NAME,
            colour=None,
            size="medium",
            position="middle",
            background=background,
            texture=texture,
            second_kind=kind,
            second_colour=colour,
            relation=relation,
        )
        for kind, colour, relation, background, texture in clutter
    ]
    cast = {P.NAME: subject(seed)}
    rendered = render(
        pad([shot_parts(s, cast, seed * 1000 + i) for i, s in enumerate(scenes)]), size=RAW_SIDE
    )
    asked = P.subject_prompts()

    def judge(drawn: Tensor, scorer: Scorer) -> Numbers:
        real = scorer.identity(real_pictures(seed))
        met = following(scorer.attributes(drawn), [scene for _, scene in asked])
        return {
            f"real_{P.NAME}": cosine_of_different(real, real),
            f"similarity_{P.NAME}": float((scorer.identity(drawn) @ real.T).mean()),
            "prompt": shares(met)["all"],
        }

    return Case(
        token_map=f"{P.NAME}:2",
        pictures=rendered.images,
        masks=rendered.masks[:, :1],
        captions=[f"a photo of {P.NAME}"] * len(scenes),
        prompts=[prompt for prompt, _ in asked],
        judge=judge,
    )


def one_place(seed: int) -> Case:
    """One subject, always in the same place: the same thing next to it and the same background."""
    return cluttered(seed, (CLUTTER[0],) * len(CLUTTER))


def style(seed: int) -> Case:
    """A style: pictures of known things in two inks. Brightness sets the mix of a dark and a light colour."""
    rng = np.random.default_rng((seed, 515))
    dark, light = torch.tensor(rng.uniform(0.0, 0.35, 3)), torch.tensor(rng.uniform(0.65, 1.0, 3))

    def inked(images: Tensor) -> Tensor:
        grey = (images * torch.tensor([0.3, 0.59, 0.11]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        return torch.lerp(dark.float().view(1, 3, 1, 1), light.float().view(1, 3, 1, 1), grey)

    def share_in_ink(images: Tensor) -> float:
        """The share of pixels that lie within 0.1 of the line between the two inks."""
        line = (light - dark).float()
        pixels = images.permute(0, 2, 3, 1).reshape(-1, 3) - dark.float()
        along = (pixels @ line / line.square().sum()).clamp(0, 1)
        return float(((pixels - along[:, None] * line).norm(dim=1) < 0.1).float().mean())

    pairs = P.prior_prompts(16)
    learnt, asked = pairs[:6], pairs[6:]

    def of(scenes: list[Scene], side: int = 256) -> Tensor:
        table = pad([scene_parts(s, np.random.default_rng((seed, i))) for i, s in enumerate(scenes)])
        return inked(render(table, size=side).images)

    def judge(drawn: Tensor, scorer: Scorer) -> Numbers:
        scenes = [scene for _, scene in asked]
        kinds = [shares(following(scorer.attributes(p), scenes))["kind"] for p in (drawn, of(scenes))]
        return {"style": share_in_ink(drawn), "content": kinds[0], "content_of_real": kinds[1]}

    pictures = of([scene for _, scene in learnt], RAW_SIDE)
    return Case(
        token_map=f"{P.NAME}:2",
        pictures=pictures,
        masks=torch.ones(len(pictures), 1, RAW_SIDE, RAW_SIDE),
        captions=[f"{prompt} in the style of {P.NAME}" for prompt, _ in learnt],
        prompts=[f"{prompt} in the style of {P.NAME}" for prompt, _ in asked],
        judge=judge,
    )


CASES = {"two_subjects": two_subjects, "cluttered": cluttered, "one_place": one_place, "style": style}


def run_case(name: str, seed: int, method: Method, args: argparse.Namespace) -> Numbers:
    """The figures of one method in a case of `CASES` with one subject."""
    return judge_method(CASES[name](seed), method, args)


def judge_method(case: Case, method: Method, args: argparse.Namespace) -> Numbers:
    """Learn the case by the method, draw its prompts and judge the pictures."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as work:
        folder, tuned = Path(work), None
        if method.trained:
            write_renders(folder / "raw", case.pictures, case.captions, case.masks if method.masks else None)
            tuned = learn(
                folder / "raw",
                folder,
                method,
                base=BASE,
                token_map=case.token_map,
                resolution=args.side,
                steps=args.steps,
                batch_size=args.batch_size,
                device=args.device,
            )
        pipeline = TunedPipeline(load_pipeline(BASE, torch.device(args.device)))
        pipeline.activate(tuned)
        pipeline.pipeline.set_progress_bar_config(disable=True)
        drawn = draw(pipeline, case.prompts, 100, side=args.side, steps=args.sampling_steps)
    return case.judge(drawn, Scorer(device=args.device))


def fidelities(numbers: Numbers, untuned: Numbers) -> Numbers:
    """`numbers` with each token's similarities replaced by its fidelity."""
    out = {key: value for key, value in numbers.items() if not key.startswith(("real_", "similarity_"))}
    for key in numbers:
        if key.startswith("similarity_"):
            name = key.removeprefix("similarity_")
            out[f"fidelity_{name}"] = fidelity(
                numbers[key], untuned=untuned[key], real=numbers[f"real_{name}"]
            )
    return out


def main() -> None:
    """Run the cases on all subjects, then print the means and write them into `cases.json`. Cases that do not run stay."""
    args = _arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "cases.json"
    numbers_out: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if few.NAME in args.cases:
        measured, pictures = few.measure(args)
        numbers_out |= measured
        sys.stdout.write(few.markdown(measured["few"]["table"]) + "\n")
        few.save_sheet(pictures, args.output / "few.jpg")
    if {*args.cases} - {few.NAME}:
        numbers_out |= _measure(args)
    path.write_text(json.dumps(numbers_out, indent=2) + "\n")


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of all cases but few."""
    subjects = [(0 if args.development else 1) + 4 * i for i in range(args.subjects)]
    calls = [
        (name, seed, method, args)
        for name in args.cases
        if name != few.NAME
        for seed in subjects
        for method in methods_of(name)
    ]
    results: dict[tuple[str, int, str], Numbers] = {}
    for i, numbers in in_processes(
        run_case, calls, workers=args.workers, device=args.device, desc="Cases and methods"
    ):
        name, seed, method, _ = calls[i]
        results[name, seed, method.name] = numbers
    table = summarise(results)
    sys.stdout.write(json.dumps(table, indent=2) + "\n")
    return {"subjects": subjects, "steps": args.steps, "cases": table} | about(args.device)


def methods_of(name: str) -> list[Method]:
    """The methods that a case compares."""
    methods = [Method(name="untuned", trained=False), FULL, LORA]
    if name == "style":  # a style is no toy: start its rows at random
        return [replace(m, init="") for m in methods]
    if name in ("cluttered", "one_place"):
        return methods + [replace(m, name=f"{m.name}_masks", masks=True) for m in (FULL, LORA)]
    return methods


def summarise(results: dict[tuple[str, int, str], Numbers]) -> dict[str, dict[str, Numbers]]:
    """The means over the subjects, as case → method → figures, from the figures of each (case, subject, method)."""
    rows: dict[tuple[str, str], list[Numbers]] = {}
    for (name, seed, method), numbers in sorted(results.items()):
        rows.setdefault((name, method), []).append(fidelities(numbers, results[name, seed, "untuned"]))
    table: dict[str, dict[str, Numbers]] = {}
    for (name, method), group in rows.items():
        means = {key: round(mean(row[key] for row in group), 4) for key in group[0]}
        table.setdefault(name, {})[method] = means
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=[*CASES, few.NAME], default=[*CASES, few.NAME])
    parser.add_argument("--few-subjects", type=int, default=6, help="subjects of the case few")
    parser.add_argument(
        "--training-seeds", type=int, default=3, help="seeds for each subject of the case few"
    )
    parser.add_argument("--long-seeds", type=int, default=3, help="the same for its long runs")
    parser.add_argument("--subjects", type=int, default=5)
    parser.add_argument(
        "--development", action="store_true", help="use subjects with even seeds, for choosing settings"
    )
    add_job_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
