"""`python -m benchmarks.serving`: many mixed requests to the real Cog server; each picture is compared with a reference.

This process first draws the references, each from a restored base. A seed decides the order of the requests. They mix
modes, sizes, samplers, fine-tunes by path, `data:` URI and URL, wrong inputs and cancelled requests. The results count
faults, which should be 0, and give the growth of the server's resident memory after the first 50 requests.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import importlib.metadata
import inspect
import io
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import requests
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.results_file import write_and_print
from benchmarks.serving_jobs import BASE, Job, all_jobs, make_fine_tunes
from tools import cog_schema

WARM = 50
"""After this many requests, memory should hardly grow."""
THREADS = 1
"""CPU threads of the server and of the references: another number would round differently."""


def main() -> None:
    """Draw the references, run the requests, write the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/serving.json"))
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        environment = settings(folder)
        os.environ.update(environment)
        with file_server(make_fine_tunes(folder)) as url:
            jobs = all_jobs(folder, url)
            references = list(draw_references(jobs))
            with cog_server(folder, environment) as (server, process):
                result = soak(server, process, jobs, references, args.requests, args.seed)
    result |= {
        "machine": f"{platform.machine()} CPU, {THREADS} thread",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "cog")},
    }
    write_and_print(args.output, result)


def settings(folder: Path) -> dict[str, str]:
    """Environment of the server and of the references."""
    return {
        "SDXL_BASE": str(BASE),
        "SDXL_REFINER": f"{BASE}-refiner",
        "SDXL_CACHE": str(folder / "cache"),
        "SDXL_WORKSPACE": str(folder / "workspace"),
        "SDXL_FINE_TUNES": str(folder / "fine_tunes"),
        "SDXL_PRIVATE_URLS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(THREADS),
    }


def draw_references(jobs: list[Job]) -> Iterator[list[str] | None]:
    """Digests of the pictures that each job must give; None for wrong and cancelled jobs."""
    from predict import Predictor

    predictor = Predictor()
    predictor.setup()
    predictor.painter.tuned.pipeline.set_progress_bar_config(disable=True)
    defaults = declared_defaults(predictor.run)
    for job in tqdm(jobs, desc="References", unit="request"):
        if job.error is not None or job.kind == "cancelled":
            yield None
            continue
        predictor.painter.tuned.restore()
        files = predictor.run(**{**defaults, **job.inputs})
        yield [digest(Path(file).read_bytes()) for file in files]


def declared_defaults(entry_point: Any) -> dict[str, Any]:
    """The default of each input, as Cog fills them in."""
    return {name: one.default.default for name, one in inspect.signature(entry_point).parameters.items()}


def digest(content: bytes) -> str:
    """SHA-256 of a picture's pixels."""
    with Image.open(io.BytesIO(content)) as picture:
        return hashlib.sha256(np.asarray(picture).tobytes()).hexdigest()


# Servers ----------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def file_server(folder: Path) -> Iterator[str]:
    """The files of `folder` over HTTP."""
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "-d", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def cog_server(
    folder: Path, environment: dict[str, str], *, what: str = "predictions"
) -> Iterator[tuple[str, subprocess.Popen]]:
    """The server of "predictions" or "trainings", as `make serve` or `make serve-train` starts it; its URL and process."""
    port, project = free_port(), Path(__file__).parents[1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    cog_schema.main(["--config", str(project / "cog.yaml"), "--folder", str(folder)])
    stub, mode = {"COG_PREDICT_TYPE_STUB": f"{project}/predict.py:Predictor"}, []
    if what == "trainings":
        stub, mode = {"COG_TRAIN_TYPE_STUB": f"{project}/train.py:train"}, ["--x-mode", "train"]
    own = {"PORT": str(port), "PATH": path, "PYTHONPATH": str(project)}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cog.server.http", *mode],
            cwd=folder,
            env={**os.environ, **environment, **stub, **own},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, "READY", seconds=300)
        yield url, process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(url: str, status: str, *, seconds: float) -> None:
    """Wait until the server's health is `status`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health-check", timeout=5).json()["status"] == status:
                return
        time.sleep(0.01)
    raise TimeoutError(f"the server is not {status} after {seconds} s")


def family(process: subprocess.Popen) -> set[int]:
    """The ids of a process and of all its children, and of theirs."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    found = {process.pid}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def resident_mb(process: subprocess.Popen) -> float:
    """Resident memory of the server and all its children, in MB."""
    pages = 0
    for pid in family(process):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# The run ----------------------------------------------------------------------------------------------------------------


def order(jobs: list[Job], count: int, seed: int) -> list[int]:
    """Indices of the requests: first every job once, then at random."""
    dice = random.Random(seed)
    every = list(range(len(jobs)))
    dice.shuffle(every)
    return (every + [dice.randrange(len(jobs)) for _ in range(count)])[:count]


def soak(
    server: str,
    process: subprocess.Popen,
    jobs: list[Job],
    references: list[list[str] | None],
    count: int,
    seed: int,
) -> dict[str, Any]:
    """Send the requests one by one and check each answer."""
    dice = random.Random(seed + 1)
    kinds: Counter[str] = Counter()
    faults: list[str] = []
    memory = []
    started = time.monotonic()
    for number, index in enumerate(tqdm(order(jobs, count, seed), desc="Requests", unit="request")):
        job = jobs[index]
        kinds[job.kind] += 1
        if job.kind == "cancelled":
            fault = cancel(server, f"job{number}", job.inputs, dice.uniform(0.1, 1.5))
        else:
            fault = judge(send(server, job.inputs), job, references[index])
        if fault:
            faults.append(f"request {number} ({job.kind}): {fault}")
        memory.append(resident_mb(process))
    early = median(memory[WARM - 5 : WARM + 6]) if count > WARM + 10 else memory[0]
    late = median(memory[-11:])
    return {
        "requests": count,
        "faults": len(faults),
        "what_went_wrong": faults[:20],
        "kinds": dict(sorted(kinds.items())),
        "memory_after_50_mb": round(early, 1),
        "memory_at_end_mb": round(late, 1),
        "memory_growth": round(late / early - 1, 4),
        "memory_mb_every_100": [round(median(memory[i : i + 11]), 1) for i in range(89, len(memory), 100)],
        "seconds": round(time.monotonic() - started, 1),
    }


def send(server: str, inputs: dict[str, Any]) -> requests.Response:
    """Send a request and wait for its answer. Retry on 409: the server may still finish the request before."""
    deadline = time.monotonic() + 60
    while True:
        answer = requests.post(f"{server}/predictions", json={"input": inputs}, timeout=600)
        if answer.status_code != 409 or time.monotonic() > deadline:
            return answer
        time.sleep(0.05)


def judge(answer: requests.Response, job: Job, reference: list[str] | None) -> str | None:
    """What is wrong with an answer; None if it is right."""
    body = answer.json()
    if job.error is not None:
        told = json.dumps(body.get("detail", "")) + str(body.get("error") or "")
        clear = job.error in told and "Traceback" not in told
        return None if clear else f"the error should say {job.error!r}: {told[:200]}"
    if body.get("status") != "succeeded":
        return f"failed: {str(body)[:300]}"
    drawn = [digest(base64.b64decode(uri.partition(",")[2])) for uri in body["output"]]
    return None if drawn == reference else "the pictures are not those of the reference"


def cancel(server: str, name: str, inputs: dict[str, Any], after_s: float) -> str | None:
    """Start a long request and stop it; None when the server is ready again within 10 s."""
    wait_for(server, "READY", seconds=60)
    url = f"{server}/predictions/{name}"
    started = requests.put(
        url, json={"id": name, "input": inputs}, headers={"Prefer": "respond-async"}, timeout=60
    )
    if started.status_code != 202:
        return f"not started: {started.status_code} {started.text[:200]}"
    time.sleep(after_s)
    stopped = requests.post(f"{url}/cancel", timeout=60)
    if stopped.status_code != 200:
        return f"not cancelled: {stopped.status_code}"
    with contextlib.suppress(TimeoutError):
        wait_for(server, "READY", seconds=10)
        return None
    return "still busy 10 s after the cancel"


if __name__ == "__main__":
    main()
