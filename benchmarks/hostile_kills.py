"""Killed trainings for `benchmarks.hostile`: what is left is complete or gone, and the next run tidies up.

Each training runs as on the command line, in a fork of this warm process, and is killed at a random moment. Every second
one is killed while it writes its result.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.hostile_damage import COLOURS, pack, picture
from sdxl.command_line import run_command_line
from sdxl.model import fine_tune_files
from sdxl.serving.tuned_pipeline import TunedPipeline
from sdxl.workspace import CHECKPOINTS, OUTPUT, REPORT

RUN_AGAIN_EVERY = 5
"""After every so many kills, a run in the same folder must succeed."""
STEPS = 4
TAR = "trained_model.tar"


def start_training(archive: Path, output: Path, *, is_lora: bool) -> int:
    """Start a training of a few steps with a checkpoint after each, in a fork; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.environ.pop("SDXL_WORKSPACE", None)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        from train import train

        inputs = {
            "input_images": f"@{archive}",
            "is_lora": is_lora,
            "resolution": 64,
            "max_train_steps": STEPS,
        }
        inputs |= {"checkpointing_steps": 1, "train_batch_size": 1, "random_views": 0, "seed": 0, "checks": 0}
        given = [part for name, value in inputs.items() for part in ("-i", f"{name}={value}")]
        code = run_command_line(train, description="", argv=[*given, "-o", str(output)])
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    """Wait for a process; its exit code, or the negative signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def training_set(folder: Path) -> Path:
    """A small data set."""
    files = {f"{i}.png": picture("png", colour) for i, colour in enumerate(COLOURS)}
    files |= {f"{i}.txt": b"a photo of TOK" for i in range(len(COLOURS))}
    (folder / "set.zip").write_bytes(pack(files, "zip"))
    return folder / "set.zip"


def kill_trainings(count: int, seed: int, tuned: TunedPipeline) -> dict[str, Any]:
    """Kill `count` trainings and check what they leave; the numbers, with what was lost."""
    dice = random.Random(seed)
    lost: list[str] = []
    left = {"nothing": 0, "checkpoints": 0, "a result": 0}
    again = 0
    with tempfile.TemporaryDirectory() as made:
        archive = training_set(Path(made))
        seconds = {
            kind: _whole_run(archive, Path(made) / f"whole-{kind}", is_lora=kind) for kind in (False, True)
        }
        for number in tqdm(range(count), desc="Kills", unit="kill"):
            output, is_lora = Path(made) / str(number), dice.random() < 0.5
            pid = start_training(archive, output, is_lora=is_lora)
            if number % 2:
                _wait_until_packing(output, pid)
                time.sleep(dice.uniform(0, 0.03))
            else:
                time.sleep(dice.uniform(0, 1.02 * seconds[is_lora]))
            os.kill(pid, signal.SIGKILL)
            finish(pid)
            found = _found(output, tuned)
            if number % RUN_AGAIN_EVERY == 0:
                again += 1
                found += _run_again(archive, output, is_lora=is_lora, tuned=tuned)
            lost += [f"kill {number}: {one}" for one in found]
            checkpoints = any(output.rglob(f"{CHECKPOINTS}/step-*"))
            left["a result" if any(output.rglob(TAR)) else "checkpoints" if checkpoints else "nothing"] += 1
    return {
        "kills": count,
        "left_behind": left,
        "runs_after_a_kill": again,
        "lost": len(lost),
        "what_was_lost": lost[:20],
    }


def _whole_run(archive: Path, output: Path, *, is_lora: bool) -> float:
    """Seconds of a training that nobody kills."""
    started = time.monotonic()
    if code := finish(start_training(archive, output, is_lora=is_lora)):
        raise RuntimeError(f"the training that nobody killed ended with {code}")
    return time.monotonic() - started


def _wait_until_packing(output: Path, pid: int) -> None:
    """Wait until the last step's files are being written, or the training has ended."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        written = [*output.glob(f"sdxl-*/{OUTPUT}/*.safetensors"), *output.glob(f"sdxl-*/.{TAR}.*")]
        ended = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        if written or ended or (output / TAR).exists():
            return
        time.sleep(0.001)


def _found(output: Path, tuned: TunedPipeline) -> list[str]:
    """What looks finished, but is not."""
    found = []
    finished_ones = [*output.rglob(TAR), *output.rglob(f"{CHECKPOINTS}/step-*")]
    for finished in finished_ones:
        if any(part.startswith(".") for part in finished.relative_to(output).parts):
            continue  # being removed
        with tempfile.TemporaryDirectory() as scratch:
            try:
                tuned.load(fine_tune_files.read(finished, Path(scratch)))
            except Exception as error:
                found.append(f"{finished.relative_to(output)}: {type(error).__name__} {error}")
    return found


def _run_again(archive: Path, output: Path, *, is_lora: bool, tuned: TunedPipeline) -> list[str]:
    """Train again in the same folder: it must succeed, and of the killed run only its checkpoints or its result may stay."""
    killed = list(output.glob("sdxl-*"))
    kept = {path for path in output.rglob(f"{CHECKPOINTS}/step-*/*")}
    if code := finish(start_training(archive, output, is_lora=is_lora)):
        return [f"the run after the kill ended with {code}"]
    found = _found(output, tuned)
    if not (output / TAR).exists():
        found.append("the run after the kill has no result")
    found += [f"{path.relative_to(output)} is gone" for path in kept if not path.exists()]
    for folder in killed:
        for path in folder.rglob("*"):
            whole = path.name in (TAR, REPORT) or path in kept
            if path.is_file() and not whole:
                found.append(f"{path.relative_to(output)} is not swept")
    return found
