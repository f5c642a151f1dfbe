"""`python -m benchmarks.hostile`: damaged and lying inputs through the doors of a server, and trainings that are killed.

A seed decides every input. Each is used, or refused in one sentence; everything else is bad: any other exception, an
unclear sentence, a process that dies, too much time or memory, a file where none should be, and wrong data from an
undamaged input. Trainings are killed at random moments: what looks finished afterwards must be complete.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from benchmarks.hostile_damage import BASE, Materials
from benchmarks.hostile_inputs import CONTROL_EVERY, make
from benchmarks.results_file import write_and_print

if TYPE_CHECKING:
    from benchmarks.hostile_doors import Doors

WORKERS = 2
CPU_SECONDS = 10
WALL_SECONDS = 120
GROWTH_MB = 2048
ADDRESSES = 6 << 30
"""Bytes of addresses that a worker may take in addition to those of the loaded base."""


def main(arguments: list[str] | None = None) -> None:
    """Make the inputs, run them, kill trainings, write the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--only", type=int, help="run this one input in this process, and show its traceback")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/hostile.json"))
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made:
        doors = prepare(Path(made))
        if args.only is not None:
            sys.stdout.write(f"{run_one(doors, args.seed, args.only, Path(made) / 'one')}\n")
            return
        result = run(doors, range(args.inputs), args.seed, Path(made), kills=args.kills)
    write_and_print(args.output, result)


def prepare(folder: Path) -> Doors:
    """Train a small LoRA for the materials, and load the base."""
    os.environ |= {"SDXL_BASE": str(BASE), "SDXL_REFINER": f"{BASE}-refiner", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"SDXL_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)  # also because threads do not survive a fork
    from sdxl.process import configure_logging, repeat_on_cpu

    repeat_on_cpu()
    configure_logging()
    import sdxl.training.examples
    import sdxl.training.recipe  # noqa: F401  imported before the forks
    from benchmarks.hostile_doors import Doors
    from benchmarks.hostile_kills import TAR, finish, start_training, training_set

    if code := finish(start_training(training_set(folder), folder / "trained", is_lora=True)):
        raise RuntimeError(f"the training of the materials ended with {code}")
    return Doors(Materials((folder / "trained" / TAR).read_bytes()))


def run(doors: Doors, indices: range, seed: int, folder: Path, *, kills: int) -> dict[str, Any]:
    """Run inputs and kills; the numbers."""
    from benchmarks.hostile_kills import kill_trainings

    started = time.monotonic()
    records = run_all(doors, indices, seed, folder)
    bad = [record for record in records if record["outcome"] == "bad"]
    slowest = max(records, key=lambda record: record["cpu_s"], default={})
    largest = max(records, key=lambda record: record["growth_mb"], default={})
    doors_of = Counter(f"{record['door']} {record['outcome']}" for record in records)
    result = {
        "machine": f"{platform.machine()} CPU, {WORKERS} processes of 1 thread",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "pillow")},
        "seed": seed,
        "inputs": len(records),
        "undamaged": len(range(indices.start, indices.stop, CONTROL_EVERY)),
        **{name: sum(r["outcome"] == name for r in records) for name in ("used", "refused")},
        "bad": len(bad),
        "what_was_bad": bad[:20],
        "by_door": dict(sorted(doors_of.items())),
        "worst_cpu_s": slowest.get("cpu_s"),
        "worst_cpu_index": slowest.get("index"),
        "largest_growth_mb": largest.get("growth_mb"),
        "largest_growth_index": largest.get("index"),
    }
    if kills:
        result |= kill_trainings(kills, seed, doors.painter.tuned)
    return result | {"seconds": round(time.monotonic() - started)}


def run_one(doors: Doors, seed: int, index: int, root: Path) -> dict[str, Any]:
    """Run one input here; its record."""
    from benchmarks.hostile_doors import forget_peak, memory_kb

    made = make(seed, index, doors.materials)
    forget_peak()
    before, cpu = memory_kb("VmRSS"), _cpu_seconds()
    outcome, said = doors.judge(made, root)
    cpu, growth = _cpu_seconds() - cpu, (memory_kb("VmHWM") - before) / 1024
    if cpu > CPU_SECONDS or growth > GROWTH_MB:
        outcome, said = "bad", f"{cpu:.1f} s, {growth:.0f} MB. {said}"
    return {
        "index": index,
        "door": made.door,
        "damage": made.damage,
        "outcome": outcome,
        "said": said,
        "cpu_s": round(cpu, 2),
        "growth_mb": round(growth, 1),
    }


def _cpu_seconds() -> float:
    """CPU time of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


# Processes --------------------------------------------------------------------------------------------------------------


def _work(doors: Doors, seed: int, folder: Path, pipe: Connection) -> None:
    """Run the inputs whose indices come through the pipe, within limits on CPU time and memory."""
    from benchmarks.hostile_doors import memory_kb

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None
    most = memory_kb("VmSize") * 1024 + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (index := pipe.recv()) is not None:
        allowed = (
            int(resource.getrusage(resource.RUSAGE_SELF).ru_utime + time.process_time()) + 2 * CPU_SECONDS
        )
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.RLIM_INFINITY))
        pipe.send(run_one(doors, seed, index, folder / f"input-{index}"))


class _Worker:
    """A forked process, and the input that it has."""

    def __init__(self, doors: Doors, seed: int, folder: Path) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        folder.mkdir(exist_ok=True)
        self.process = context.Process(target=_work, args=(doors, seed, folder, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.index: int | None = None
        self.since = 0.0

    def give(self, index: int | None) -> None:
        """Send an index; None ends the process."""
        self.index, self.since = index, time.monotonic()
        self.pipe.send(index)

    def result(self) -> dict[str, Any] | None:
        """The record of its input; None while it works. A process that died or hangs gives a bad record."""
        hangs = time.monotonic() - self.since > WALL_SECONDS
        if hangs:
            self.process.kill()
        elif not self.pipe.poll():
            return None
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return {
                "index": self.index,
                "outcome": "bad",
                "said": f"hangs for {WALL_SECONDS} s" if hangs else f"died: {_ending(self.process.exitcode)}",
                "cpu_s": 0.0,
                "growth_mb": 0.0,
            }


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def run_all(doors: Doors, indices: range, seed: int, folder: Path) -> list[dict[str, Any]]:
    """The records of all inputs, in order."""
    waiting = iter(indices)
    workers = []
    records = []
    progress = tqdm(total=len(indices), desc="Inputs", unit="input")
    for number in range(min(WORKERS, len(indices))):
        workers.append(_Worker(doors, seed, folder / f"worker-{number}"))
        workers[-1].give(next(waiting))
    while workers:
        wait([worker.pipe for worker in workers], timeout=5)
        for place, worker in reversed(list(enumerate(workers))):
            record = worker.result()
            if record is None:
                continue
            if "door" not in record:  # it died
                made = make(seed, record["index"], doors.materials)
                record |= {"door": made.door, "damage": made.damage}
                workers[place] = _Worker(doors, seed, folder / f"worker-{place}")
            records.append(record)
            progress.update()
            following = next(waiting, None)
            workers[place].give(following)
            if following is None:
                workers.pop(place).process.join()
    progress.close()
    return sorted(records, key=lambda record: record["index"])


if __name__ == "__main__":
    main()
