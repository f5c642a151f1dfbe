"""`python -m benchmarks.best`: is the moment that a training hands over the best one?

Runs of one, two and four times the usual steps, with 3 and with 12 pictures. Every moment that the watch checks is judged as
in `benchmarks.quality`. So the chosen moment can be compared with the best in hindsight, and with the last. A moment's score
is fidelity × prompts followed, minus half the drift of other prompts, in points. The last moment is judged at lower
strengths too. The choice is made again from the kept checks, so a changed rule needs no new runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.few import DEFAULT, UNTUNED
from benchmarks.judging import judge
from benchmarks.quality import about, add_job_arguments
from benchmarks.results_file import add_to
from benchmarks.scores import fidelity
from benchmarks.subject_job import BASE, Method, learn_subject
from benchmarks.workers import in_processes
from dataset_and_utils import TokenMap
from sdxl.data.dataset_folder import read_dataset_folder
from sdxl.history import Check
from sdxl.model import fine_tune_files
from sdxl.model.components import Components
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.serving.pipeline import load_pipeline
from sdxl.serving.tuned_pipeline import TunedPipeline
from sdxl.training.best_moment import choice_of, has_fallen, with_scores
from sdxl.training.config import TrainingConfig
from sdxl.training.examples import held_out_examples, kept_out
from sdxl.training.watch import Watch

CHECKS = 6
"""The product's default."""
STRENGTHS = (0.85, 0.7)
"""Of the last moment, beside 1."""
NEAR = 2.0
"""Points. A choice that is no further behind the best moment counts as right."""


@dataclass(kw_only=True)
class Recorder(Watch):
    """Keeps every moment that is checked, and never stops the training."""

    moments: list[tuple[Check, TrainedFineTune]] = field(default_factory=list)

    def stops_after(self, step: int, snapshot: Callable[[], TrainedFineTune]) -> bool:
        """Look, and keep a copy of what was looked at."""
        seen = len(self.history.checks)
        super().stops_after(step, snapshot)
        if len(self.history.checks) > seen:
            self.moments.append((self.history.checks[-1], snapshot()))
        return False


def run(
    seed: int,
    pictures: int,
    factor: float,
    *,
    steps: int,
    batch_size: int,
    seeds: int,
    sampling_steps: int,
    side: int,
    device: str,
) -> dict[str, Any]:
    """Train once. Returns the checks and the figures of each moment; with 0 `pictures` those of the untuned base."""
    torch.manual_seed(0)
    method = _method(pictures, factor) if pictures else UNTUNED
    pipeline = TunedPipeline(load_pipeline(BASE, torch.device(device)))
    pipeline.pipeline.set_progress_bar_config(disable=True)

    def judged() -> dict[str, float]:
        return judge(
            seed,
            pipeline,
            is_base=not pictures,
            seeds=seeds,
            sampling_steps=sampling_steps,
            side=side,
            device=device,
        )[0]

    told: dict[str, Any] = {"seed": seed, "pictures": pictures, "factor": factor}
    if not pictures:
        return told | {"base": judged()}
    watches: list[Recorder] = []

    def watch_of(dataset: Path, components: Components, config: TrainingConfig) -> Watch:
        token_map = TokenMap.parse(config.token_map)
        out = kept_out(len(read_dataset_folder(dataset)))
        held_out = held_out_examples(dataset, components, token_map, seed=config.seed, pictures=out)
        watches.append(Recorder(checks=CHECKS, held_out=held_out))
        return watches[0]

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        learn_subject(
            seed,
            method,
            folder,
            steps=steps,
            batch_size=batch_size,
            side=side,
            device=device,
            watch_of=watch_of,
        )
        moments, tuned = [], None
        for check, model in watches[0].moments:
            fine_tune_files.write(model, folder / str(check.step), {})
            tuned = fine_tune_files.read(folder / str(check.step), folder / f"{check.step}-unpacked")
            pipeline.activate(tuned)
            moments.append({"check": asdict(check), "judged": judged()})
        weaker = {}
        for strength in STRENGTHS:
            pipeline.activate(tuned, lora_scale=strength)
            weaker[str(strength)] = judged()
    pivot = round(method.settings.get("pivot_fraction", 0.5) * round(steps * factor))
    return told | {"pivot": pivot, "moments": moments, "weaker": weaker}


def _method(pictures: int, factor: float) -> Method:
    return replace(DEFAULT, name=f"{pictures} pictures", pictures=pictures, steps_factor=factor, views=None)


def chosen_step(checks: Sequence[Check], pivot: int) -> int:
    """The step of the moment that a run with these checks hands over, which stops early if the rule says so."""
    ends = range(1, len(checks))
    end = next((n for n in ends if has_fallen(with_scores(checks[:n]), pivot)), len(checks))
    return choice_of(with_scores(checks[:end])).step


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The flat keys, and a row for each number of pictures and steps: scores of the chosen, the best and the last moment."""
    bases = {r["seed"]: r["base"] for r in results if not r["pictures"]}
    rows: dict[str, list[dict[str, float]]] = {}
    for result in results:
        if not result["pictures"]:
            continue
        base = bases[result["seed"]]
        checks = [Check(**moment["check"]) for moment in result["moments"]]
        scores = {m["check"]["step"]: score(m["judged"], base) for m in result["moments"]}
        step = chosen_step(checks, result["pivot"])
        row = {
            "chosen": scores[step],
            "best": max(scores.values()),
            "last": scores[checks[-1].step],
            "earlier": float(step != checks[-1].step),
        }
        row |= {f"strength {name}": score(judged, base) for name, judged in result["weaker"].items()}
        rows.setdefault(f"{result['pictures']} pictures, {result['factor']:g}x", []).append(row)
    every = [row for group in rows.values() for row in group]
    near = [row["chosen"] >= row["best"] - NEAR for row in every]
    by_factor = {
        factor: [
            row["chosen"] for name, group in rows.items() if name.endswith(f" {factor}x") for row in group
        ]
        for factor in ("1", "4")
    }
    flat: dict[str, Any] = {"runs": len(every), "within_2_points_share": round(mean(near), 3)}
    if all(by_factor.values()):
        flat["long_score_loss"] = round(mean(by_factor["1"]) - mean(by_factor["4"]), 2)
    table = {
        name: {key: round(mean(row[key] for row in group), 2) for key in group[0]}
        for name, group in rows.items()
    }
    return flat | {"table": table}


def score(judged: dict[str, float], base: dict[str, float]) -> float:
    """Fidelity × prompts followed, minus half the drift, in points."""
    reached = fidelity(judged["similarity"], untuned=base["similarity"], real=judged["real_similarity"])
    drift = base["prior_all"] - judged["prior_all"]
    return 100 * (reached * judged["prompt_all"] / base["known_all"] - drift / 2)


def main(arguments: list[str] | None = None) -> None:
    """Run what has not run yet, then write the table."""
    args = _arguments(arguments)
    first = 0 if args.development else 1
    subjects = [first + 2 * number for number in range(args.subjects)]
    jobs = [(seed, 0, 0.0) for seed in subjects]
    jobs += [(s, count, factor) for s in subjects for count in args.pictures for factor in args.factors]
    args.workdir.mkdir(parents=True, exist_ok=True)
    files = {job: args.workdir / f"{'-'.join(map(str, job))}-{args.steps}.json" for job in jobs}
    missing = sorted((job for job in jobs if not files[job].exists()), key=lambda job: -job[2])
    shared = ("steps", "batch_size", "seeds", "sampling_steps", "side", "device")
    options = {name: getattr(args, name) for name in shared}
    calls = [(options, *job) for job in missing]
    for number, result in in_processes(_run, calls, workers=args.workers, device=args.device, desc="Runs"):
        file = files[missing[number]]
        file.with_suffix(".partial").write_text(json.dumps(result))
        file.with_suffix(".partial").replace(file)
    found = summarise([json.loads(file.read_text()) for file in files.values()])
    add_to(args.output / "best.json", **found, subjects=subjects, steps=args.steps, **about(args.device))
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


def _run(options: dict[str, Any], seed: int, pictures: int, factor: float) -> dict[str, Any]:
    return run(seed, pictures, factor, **options)


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.best", description=__doc__)
    parser.add_argument("--subjects", type=int, default=6)
    parser.add_argument(
        "--development", action="store_true", help="use subjects with even seeds, to choose the rule"
    )
    parser.add_argument("--pictures", type=int, nargs="+", default=[3, 12])
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    add_job_arguments(parser)
    parser.set_defaults(workdir=Path("runs/best"), seeds=3)
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
