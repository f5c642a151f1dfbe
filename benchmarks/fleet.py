"""`python -m benchmarks.fleet`: many fine-tunes on several replicas under a skewed load, while replicas die and are replaced.

It needs Ray: `pip install -r deploy/requirements.txt`. Miniatures draw 64-pixel pictures with random LoRAs, whose
popularity follows Zipf's law. Each answer is compared with the picture that one process draws for that fine-tune and
seed. The first part of the load fills the replicas; shares and times are of the rest. Two fleets get the same load: one
sends requests to replicas that hold their fine-tune, the other to any.
"""

from __future__ import annotations

import argparse
import base64
import importlib.metadata
import json
import os
import platform
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from benchmarks.fleet_server import Fleet, running_fleet
from benchmarks.results_file import write_and_print
from benchmarks.serving import THREADS, declared_defaults, digest, settings
from benchmarks.serving_jobs import BASE, random_lora
from sdxl.files.archives import pack_tar

SMALL = {"prompt": "a red fish on a blue background", "width": 64, "height": 64, "num_inference_steps": 2}
SEEDS = 2
"""Different pictures for each fine-tune."""
Job = tuple[int, int]
"""A fine-tune's number and a seed."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What became of one request."""

    lost: str = ""
    """Why there is no picture; empty if there is one."""
    wrong: bool = False
    """Another picture than the reference."""
    found: bool = False
    """The replica held the fine-tune."""
    tries: int = 1
    replica: str = ""
    seconds: float = 0.0


def main() -> None:
    """Draw the references, run both fleets, write the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--fine-tunes", type=int, default=40)
    parser.add_argument("--kept", type=int, default=10, help="fine-tunes that a replica keeps")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fleet.json"))
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(prefix="fleet-") as made:
        folder = Path(made)
        environment = settings(folder)
        os.environ.update(environment)
        write_fine_tunes(folder / "fine_tunes", args.fine_tunes)
        references = draw_references(folder / "fine_tunes", args.fine_tunes)
        jobs = skewed(args.fine_tunes, args.requests)
        result = {
            "replicas": args.replicas,
            "fine_tunes": args.fine_tunes,
            "kept_per_replica": args.kept,
            "clients": args.clients,
            "requests": args.requests,
        }
        common: dict[str, Any] = {"replicas": args.replicas, "fine_tunes": args.kept}
        with running_fleet(folder / "any", environment, **common, by_fine_tune=False) as fleet:
            drawn = send_all(fleet, jobs, references, args.clients)
            result |= summed(drawn[args.requests // 4 :], "random_")
        with running_fleet(folder / "by", environment, **common) as fleet:
            drawn = send_all(fleet, jobs, references, args.clients)
            result |= summed(drawn[args.requests // 4 :], "")
            result |= with_kills(fleet, jobs, references, args.clients, args.replicas)
            result |= with_update(fleet, jobs, references, args.clients, args.kept + 1)
    result |= {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, shared with other work",
        "versions": {name: importlib.metadata.version(name) for name in ("ray", "torch", "diffusers")},
    }
    write_and_print(args.output, result)


# Fine-tunes and their pictures --------------------------------------------------------------------------------------------


def write_fine_tunes(folder: Path, count: int) -> None:
    """Write LoRAs with random weights as `0.tar`, `1.tar`, …"""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    unet = load_file(BASE / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    for number in range(count):
        save_file(random_lora(unet), folder / "weights")
        pack_tar({"lora.safetensors": folder / "weights"}, folder / f"{number}.tar")
    (folder / "weights").unlink()


def inputs_of(job: Job) -> dict[str, Any]:
    number, seed = job
    return {**SMALL, "replicate_weights": f"{number}.tar", "seed": seed, "disable_safety_checker": True}


def draw_references(folder: Path, count: int) -> dict[Job, str]:
    """Digests of the pictures of each fine-tune and seed, drawn by this process alone. They all differ."""
    from predict import Predictor

    predictor = Predictor()
    predictor.setup()
    predictor.painter.tuned.pipeline.set_progress_bar_config(disable=True)
    defaults = declared_defaults(predictor.run)
    references = {}
    for job in tqdm([(n, seed) for n in range(count) for seed in range(SEEDS)], desc="References"):
        tar = str(folder / f"{job[0]}.tar")
        [file] = predictor.run(**{**defaults, **inputs_of(job), "replicate_weights": tar})
        references[job] = digest(Path(file).read_bytes())
    assert len(set(references.values())) == len(references)
    return references


# The load -----------------------------------------------------------------------------------------------------------------


def skewed(fine_tunes: int, count: int) -> list[Job]:
    """Requests in which the n-th fine-tune comes up in proportion to 1/n (Zipf's law)."""
    dice = random.Random(0)
    popularity = [1 / (number + 1) for number in range(fine_tunes)]
    numbers = dice.choices(range(fine_tunes), popularity, k=count)
    return [(number, dice.randrange(SEEDS)) for number in numbers]


def send_all(
    fleet: Fleet,
    jobs: Sequence[Job],
    references: dict[Job, str],
    clients: int,
    *,
    each: Callable[[int], None] = lambda done: None,
) -> list[Drawn]:
    """Send all `jobs` from so many clients at once; what became of them, in the order of their ends.

    each: is called with the number of requests that have ended, after each of them.
    """
    waiting: Iterator[Job] = iter(jobs)
    drawn: list[Drawn] = []
    mutex = threading.Lock()

    def client() -> None:
        while True:
            with mutex:
                job = next(waiting, None)
            if job is None:
                return
            ended = send(fleet, job, references[job])
            with mutex:
                drawn.append(ended)
                done = len(drawn)
            each(done)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return drawn


def send(fleet: Fleet, job: Job, reference: str) -> Drawn:
    """Send one request and judge its answer."""
    started = time.monotonic()
    try:
        answer = fleet.draw(inputs_of(job)).json()
    except (requests.RequestException, ValueError) as error:
        return Drawn(lost=f"no answer: {error!r}")
    if answer.get("status") != "succeeded":
        return Drawn(lost=json.dumps(answer))
    [uri] = answer["output"]
    metrics = answer["metrics"]
    return Drawn(
        wrong=digest(base64.b64decode(uri.partition(",")[2])) != reference,
        found=metrics["fine_tune_was_loaded"],
        tries=metrics["tries"],
        replica=metrics["replica"],
        seconds=time.monotonic() - started,
    )


def summed(drawn: Sequence[Drawn], prefix: str) -> dict[str, Any]:
    """Counts, the share that found its fine-tune loaded, and percentiles of the seconds, with `prefix` in their names."""
    answered = [one for one in drawn if not one.lost]
    numbers = {
        "found_share": round(float(np.mean([one.found for one in answered])), 3),
        "wrong": sum(one.wrong for one in drawn),
        "lost": sum(bool(one.lost) for one in drawn),
    }
    for percent in (50, 95, 99):
        numbers[f"p{percent}_s"] = round(float(np.percentile([one.seconds for one in answered], percent)), 2)
    return {f"{prefix}{name}": number for name, number in numbers.items()}


# What goes wrong ----------------------------------------------------------------------------------------------------------


def with_kills(
    fleet: Fleet, jobs: Sequence[Job], references: dict[Job, str], clients: int, replicas: int
) -> dict[str, Any]:
    """Kill a replica after a third and after two thirds of the load; wait until there are as many as before."""
    dice = random.Random(1)
    killed: list[float] = []

    def each(done: int) -> None:
        if done in (len(jobs) // 3, 2 * len(jobs) // 3):
            os.kill(dice.choice(fleet.painters()), signal.SIGKILL)
            killed.append(time.monotonic())

    drawn = send_all(fleet, jobs, references, clients, each=each)
    fleet.wait_for(replicas)
    back = time.monotonic() - killed[-1]
    numbers = {
        "kills": len(killed),
        "tried_again": sum(one.tries > 1 for one in drawn),
        "back_s": round(back, 1),
    }
    return summed(drawn, "kill_") | {f"kill_{name}": number for name, number in numbers.items()}


def with_update(
    fleet: Fleet, jobs: Sequence[Job], references: dict[Job, str], clients: int, kept: int
) -> dict[str, Any]:
    """Replace all replicas under load, by deploying another setting."""
    drawn = send_all(fleet, jobs[:50], references, clients)
    before = {one.replica for one in drawn}
    started = time.monotonic()
    fleet.update(fine_tunes=kept)
    while True:
        part = send_all(fleet, jobs[:50], references, clients)
        drawn += part
        if not before & {one.replica for one in part if not one.lost}:
            break
    seconds = round(time.monotonic() - started, 1)
    return summed(drawn, "update_") | {"update_s": seconds, "update_requests": len(drawn)}


if __name__ == "__main__":
    main()
