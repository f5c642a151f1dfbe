"""`python -m benchmarks.cancels`: seconds from a cancel until the real Cog server is ready again, in every phase, and seconds
from SIGTERM until it has ended, with a job that a client waits for. `docker stop` allows ten.

A seed decides the moments. Predictions are cancelled while they draw, decode, apply fine-tunes and wait for a network that
does not answer; trainings while they unpack, prepare, train and pack, and while they wait. The server's states are asked
for 100 times a second. `python train.py` gets SIGTERM too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from benchmarks.hostile_kills import training_set
from benchmarks.results_file import write_and_print
from benchmarks.serving import cog_server, settings, wait_for
from benchmarks.serving_jobs import data_uri, make_fine_tunes

SMALL = {"width": 64, "height": 64, "seed": 1, "disable_safety_checker": True}
TRAINING = {"is_lora": False, "resolution": 64, "train_batch_size": 1, "seed": 0, "checkpointing_steps": 2}
LONGEST_WAIT = 60


def main() -> None:
    """Cancel each kind of job several times; write the seconds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=10, help="cancels of each kind")
    parser.add_argument(
        "--stops", type=int, default=5, help="SIGTERMs of each kind; each needs a server of its own"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cancels.json"))
    args = parser.parse_args()
    dice = random.Random(args.seed)
    found: dict[str, list[float | None]] = {}
    with tempfile.TemporaryDirectory() as made, stalling_server() as stalled:
        folder = Path(made)
        environment = settings(folder)
        os.environ.update(environment)
        make_fine_tunes(folder)
        archive = training_set(folder)
        for what, jobs in (
            ("predictions", predictions(folder, stalled)),
            ("trainings", trainings(archive, stalled)),
        ):
            with cog_server(folder, environment, what=what) as (server, _):
                for job, (kind, (inputs, latest)) in enumerate(jobs.items()):
                    found[kind] = [
                        cancel(server, what, f"job-{job}-{number}", inputs, dice.uniform(0.05, latest))
                        for number in tqdm(range(args.times), desc=kind, unit="cancel")
                    ]
        stopped, states = stops(folder, environment, archive, args.stops, dice)
    hits = {kind: [one for one in seconds if one is not None] for kind, seconds in found.items()}
    worst = {kind: round(max(seconds), 3) for kind, seconds in hits.items() if seconds}
    result = {
        "machine": f"{platform.machine()} CPU, 1 thread",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "cog")},
        "cancels": sum(len(seconds) for seconds in hits.values()),
        "ended_before_the_cancel": sum(seconds.count(None) for seconds in found.values()),
        "worst_s": max(worst.values()),
        "worst_s_by_kind": worst,
        "stops": sum(map(len, stopped.values())),
        "worst_stop_s_by_kind": {kind: round(max(seconds), 3) for kind, seconds in stopped.items()},
        "trainings_stopped_amid_steps": 2 * args.stops,
        "states_of_their_last_step": states,
    }
    write_and_print(args.output, result)


def predictions(folder: Path, stalled: str) -> dict[str, tuple[dict[str, Any], float]]:
    """Kind of job → its inputs, and the latest moment of a cancel in seconds."""
    tars = folder / "fine_tunes"
    long = {**SMALL, "num_inference_steps": 500}
    return {
        "drawing": ({**long, "num_outputs": 4}, 3.0),
        "drawing with a whole UNet": ({**long, "replicate_weights": str(tars / "whole.tar")}, 2.0),
        "drawing and decoding a large picture": (
            {**SMALL, "width": 1024, "height": 1024, "num_inference_steps": 1, "num_outputs": 4},
            5.0,
        ),
        "a fine-tune that does not come": ({**long, "replicate_weights": f"{stalled}/one.tar"}, 2.0),
        "an extra LoRA that does not come": ({**long, "extra_lora": [f"{stalled}/one.tar"]}, 2.0),
    }


def trainings(archive: Path, stalled: str) -> dict[str, tuple[dict[str, Any], float]]:
    """The same for trainings; the moments of the short one spread over all of its stages."""
    uri = data_uri(archive.read_bytes(), "application/zip")
    return {
        "a whole training": ({**TRAINING, "input_images": uri, "max_train_steps": 4}, 8.0),
        "training": ({**TRAINING, "input_images": uri, "max_train_steps": 20000, "is_lora": True}, 8.0),
        "an archive that does not come": ({**TRAINING, "input_images": f"{stalled}/set.zip"}, 2.0),
    }


def stops(
    folder: Path, environment: dict[str, str], archive: Path, times: int, dice: random.Random
) -> tuple[dict[str, list[float]], int]:
    """Kind → the seconds from SIGTERM to the end of each process; and how many trainings left a state."""
    state, found, states = folder / "state", {}, 0
    environment = environment | {"SDXL_STATE": str(state)}
    train = {**TRAINING, "is_lora": True, "max_train_steps": 20000}
    inputs = {
        "predictions": {**SMALL, "width": 256, "height": 256, "num_inference_steps": 500, "num_outputs": 4},
        "trainings": {**train, "input_images": data_uri(archive.read_bytes(), "application/zip")},
    }
    for what, job in tqdm([*inputs.items()] * times, desc="Servers with a job", unit="stop"):
        shutil.rmtree(state, ignore_errors=True)
        with cog_server(folder, environment, what=what) as (server, process):
            told = folder / "server.log"
            asking = threading.Thread(target=_ask, args=(f"{server}/{what}", {"input": job}))
            asking.start()
            _wait_for_text(told, "loss=" if what == "trainings" else "Seed: 1")
            time.sleep(dice.uniform(0.5, 2.0))
            found.setdefault(f"a server with {what}", []).append(_seconds_to_end(process))
            asking.join()
        states += any(state.rglob("state.json"))
    given = [f"-i{name}={value}" for name, value in train.items()]
    command = [sys.executable, "train.py", f"-iinput_images=@{archive}", *given, "-o", str(folder / "out")]
    for _ in tqdm(range(times), desc="Command lines", unit="stop"):
        shutil.rmtree(state, ignore_errors=True)
        with (folder / "train.log").open("wb") as log:
            process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
        _wait_for_text(folder / "train.log", "loss=")
        time.sleep(dice.uniform(0.5, 2.0))
        found.setdefault("python train.py", []).append(_seconds_to_end(process))
        states += any(state.rglob("state.json"))
    return found, states


def _ask(url: str, body: dict[str, Any]) -> None:
    """Wait for a job as a client does."""
    status = requests.post(url, json=body, timeout=600).json()["status"]
    if status != "canceled":
        raise RuntimeError(f"the job was not stopped: {status}")


def _wait_for_text(log: Path, text: str) -> None:
    while text not in log.read_text():
        time.sleep(0.05)


def _seconds_to_end(process: subprocess.Popen) -> float:
    """Send SIGTERM and wait."""
    since = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait()
    return time.monotonic() - since


@contextmanager
def stalling_server() -> Iterator[str]:
    """The URL of a server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def cancel(server: str, what: str, name: str, inputs: dict[str, Any], after_s: float) -> float | None:
    """Start a job, cancel it, and return the seconds until the server is ready again; None if it had ended before."""
    wait_for(server, "READY", seconds=LONGEST_WAIT)
    url = f"{server}/{what}/{name}"
    asked = {"json": {"id": name, "input": inputs}, "headers": {"Prefer": "respond-async"}}
    started = requests.put(url, timeout=LONGEST_WAIT, **asked)
    if started.status_code != 202:
        raise RuntimeError(f"not started: {started.status_code} {started.text[:200]}")
    time.sleep(after_s)
    is_running = requests.get(f"{server}/health-check", timeout=LONGEST_WAIT).json()["status"] == "BUSY"
    since = time.monotonic()
    if requests.post(f"{url}/cancel", timeout=LONGEST_WAIT).status_code != 200 or not is_running:
        return None
    wait_for(server, "READY", seconds=LONGEST_WAIT)
    return time.monotonic() - since


if __name__ == "__main__":
    main()
