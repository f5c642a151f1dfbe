"""`python -m benchmarks.resumed_kills`: trainings are killed at random moments and go on with resume=auto.

After each kill no finished state may be damaged, and at most one step may be lost: a state is saved after each. At the end the
weights must equal those of a training that nobody killed, bit by bit. Every second kill comes while a state is written.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import random
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from benchmarks.hostile_kills import TAR, finish, training_set
from benchmarks.results_file import write_and_print
from sdxl.command_line import run_command_line
from sdxl.errors import WeightsError
from sdxl.files.archives import unpack
from sdxl.process import configure_logging, repeat_on_cpu
from sdxl.training.state_files import read_state

BASE = Path(__file__).parent.parent / "base_models" / "tiny-sdxl"
STEPS = 6
INPUTS = {
    "resolution": 64,
    "max_train_steps": STEPS,
    "train_batch_size": 1,
    "random_views": 0,
    "seed": 0,
    "save_every": 1,
    "checks": 2,
    "preview_prompts": "none",
}
KINDS: dict[str, dict[str, Any]] = {"lora": {"is_lora": True}, "full": {"is_lora": False}}


def main(arguments: list[str] | None = None) -> None:
    """Kill trainings; write the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trainings", type=int, default=50)
    parser.add_argument("--most-kills", type=int, default=4, help="kills of one training")
    parser.add_argument("--kind", choices=sorted(KINDS), help="only such trainings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, default=BASE, help="the base, a small one")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/resumed_kills.json"))
    args = parser.parse_args(arguments)
    prepare(args.base)
    result = {
        "machine": f"{platform.machine()} CPU",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers")},
        **kill_and_go_on(
            args.trainings,
            args.seed,
            kinds=[args.kind] if args.kind else sorted(KINDS),
            most_kills=args.most_kills,
        ),
    }
    write_and_print(args.output, result)


def prepare(base: Path) -> None:
    """Import everything that a training needs, so that forks need not, and start no threads, which no fork would have."""
    os.environ |= {"SDXL_BASE": str(base), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    repeat_on_cpu()
    configure_logging()
    import sdxl.training.examples
    import sdxl.training.recipe  # noqa: F401


def kill_and_go_on(count: int, seed: int, *, kinds: list[str], most_kills: int) -> dict[str, Any]:
    """Kill `count` trainings until each is finished; the numbers, with all that was wrong."""
    dice = random.Random(seed)
    wrong: list[str] = []
    kills = while_saving = 0
    most_lost = 0
    with tempfile.TemporaryDirectory() as made:
        archive = training_set(Path(made))
        seconds, expected = {}, {}
        for kind in kinds:
            started = time.monotonic()
            if code := finish(start(archive, Path(made) / kind, kind)):
                raise RuntimeError(f"the training that nobody killed ended with {code}")
            seconds[kind], expected[kind] = time.monotonic() - started, weights_in(Path(made) / kind / TAR)
        for number in tqdm(range(count), desc="Trainings", unit="training"):
            output, kind = Path(made) / f"run-{number}", kinds[number % len(kinds)]
            found: list[str] = []
            for attempt in range(dice.randint(1, most_kills)):
                pid = start(archive, output, kind)
                saving = attempt % 2 == 0 and _wait_until_saving(output, pid, dice.randint(1, STEPS))
                time.sleep(dice.uniform(0, 0.02 if saving else seconds[kind]))
                if _ended(pid):
                    finish(pid)
                    break
                os.kill(pid, signal.SIGKILL)
                finish(pid)
                kills += 1
                while_saving += saving
                lost = _look(output, found)
                most_lost = max(most_lost, lost)
                if lost > INPUTS["save_every"]:
                    found.append(f"{lost} steps are lost")
            if not (output / TAR).exists() and (code := finish(start(archive, output, kind))):
                found.append(f"the last run ended with {code}")
            elif not equal(weights_in(output / TAR), expected[kind]):
                found.append("the weights differ")
            if any((output / "state").rglob("*.safetensors")):
                found.append("states are left behind")
            wrong += [f"training {number} ({kind}): {one}" for one in found]
    return {
        "trainings": count,
        "kills": kills,
        "kills_while_a_state_was_written": while_saving,
        "most_steps_lost": most_lost,
        "wrong": len(wrong),
        "what_was_wrong": wrong[:20],
    }


def start(archive: Path, output: Path, kind: str) -> int:
    """Start a training that goes on from whatever there is, in a fork that notes its steps; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.environ.pop("SDXL_WORKSPACE", None)
        output.mkdir(exist_ok=True)
        log = os.open(output / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        import train

        notes = os.open(output / "steps", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        train._record_metrics = lambda report: os.pwrite(notes, f"{report.step}\n".encode(), 0)  # type: ignore[assignment]
        inputs = INPUTS | KINDS[kind] | {"input_images": f"@{archive}", "resume": "auto"}
        given = [part for name, value in inputs.items() for part in ("-i", f"{name}={value}")]
        code = run_command_line(train.train, description="", argv=[*given, "-o", str(output)])
    finally:
        os._exit(code)


def weights_in(tar: Path) -> Mapping[str, torch.Tensor]:
    """All tensors of a result."""
    with tempfile.TemporaryDirectory() as scratch:
        unpack(tar, Path(scratch))
        files = [*Path(scratch).glob("*.safetensors"), Path(scratch) / "embeddings.pti"]
        return {name: value for file in files for name, value in load_file(file).items()}


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether both hold the same, bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _look(output: Path, found: list[str]) -> int:
    """Add what is damaged to `found`; return how many steps were done after the last state."""
    last = 0
    for folder in output.glob("state/[!.]*/step-*"):  # others are being removed
        try:
            last = max(last, read_state(folder).notes.step)
        except WeightsError as error:
            found.append(str(error))
    steps = output / "steps"
    done = int(steps.read_text() or 0) if steps.exists() else 0
    is_finished = any(output.rglob(TAR))
    return 0 if is_finished else max(done - last, 0)


def _wait_until_saving(output: Path, pid: int, step: int) -> bool:
    """Wait until the state of `step` or a later one is being written; False if the training ends before."""
    while not _ended(pid):
        writing = [path.name for path in output.glob("state/*/.step-*.partial")]
        if any(int(name.split("-")[1].split(".")[0]) >= step for name in writing):
            return True
        time.sleep(0.0005)
    return False


def _ended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


if __name__ == "__main__":
    main()
