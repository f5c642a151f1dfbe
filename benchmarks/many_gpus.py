"""One training on 1, 2, 4 … GPUs of one host: pictures a second, memory, and whether it learns as one GPU would.

`python -m benchmarks.training --parts many_gpus` measures all of it. Each figure comes from processes that torchrun starts
as a user would, with this module's `main` in each of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import full_size
from dataset_and_utils import ExampleDataset, TokenMap
from sdxl.model.components import Components
from sdxl.process import keep_compiled_kernels
from sdxl.training import data_parallel
from sdxl.training.batches import Batches
from sdxl.training.config import TrainingConfig
from sdxl.training.loss import DenoisingLoss, Part
from sdxl.training.optimizers import Group, Optimizers
from sdxl.training.recipe import fine_tune, learning_rate_share
from sdxl.training.step import TrainingStep
from sdxl.training.token_rows import NewTokens
from sdxl.training.trainable import full_unet, lora

BATCH = 4
"""Pictures a GPU in a step."""
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"is_lora": True, "lora_rank": 16, "lora_targets": "transformer"},
    "full": {"is_lora": False, "precision": "fp32", "shard": False, "gradient_checkpointing": False},
    "full_sharded": {"is_lora": False, "precision": "fp32", "shard": True, "gradient_checkpointing": False},
}
"""What is measured: the default LoRA, and full training with a copy of the UNet on each GPU or one that all share."""
COMPARED = 8
"""Steps whose losses are compared."""
_MOST = 64
"""The largest batch that is tried."""

Run = Callable[..., "dict[str, Any] | None"]
"""`run(kind, gpus, **options)`: the figures of the first process, or None if memory ran out."""


def counts(gpus: int) -> list[int]:
    """1, 2, 4 … and all of `gpus`."""
    powers = itertools.takewhile(lambda count: count < gpus, (2**i for i in itertools.count()))
    return [*powers, gpus]


def speeds(run: Run, gpus: int, kinds: Sequence[str]) -> dict[str, Any]:
    """The speed and memory of each of `kinds` on 1, 2, 4 … of `gpus`, with the share of linear scaling."""
    rows: dict[str, Any] = {}
    found: dict[str, Any] = {"rows": rows}
    for kind, count in itertools.product(kinds, counts(gpus)):
        if _needs_two(kind) and count == 1:
            continue
        if (row := run(kind, count)) is None:
            rows[name_of(kind, count)] = {"out_of_memory": True}
            continue
        row["pictures_per_s"] = round(1000 * BATCH * count / row["after_pivot_ms"], 2)
        rows[name_of(kind, count)] = row
        alone = rows.get(name_of(_alone(kind), 1), {}).get("pictures_per_s")
        if alone:
            found[f"{kind}_gpus_{count}_speedup"] = round(row["pictures_per_s"] / alone, 3)
            row["share_of_linear"] = round(row["pictures_per_s"] / alone / count, 3)
    return found


def learns_alike(run: Run, gpus: int, kinds: Sequence[str]) -> dict[str, Any]:
    """How far the losses on 2, 4 … GPUs are from those of one GPU with the same pictures and noise, the largest difference."""
    found: dict[str, Any] = {"rows": {}}
    for kind, count in itertools.product(kinds, counts(gpus)[1:]):
        alone = run(_alone(kind), 1, losses_of=count)
        together = run(kind, count, losses_of=count)
        if alone is None or together is None:
            continue
        difference = largest_difference(together["losses"], alone["losses"])
        found["rows"][f"{kind}, losses on {count} GPUs"] = {"alone": alone["losses"], **together}
        found[f"{kind}_gpus_{count}_loss_difference"] = difference
    return found


def largest_batches(run: Run, gpus: int) -> dict[str, Any]:
    """The largest batch a GPU that fits, with its speed, in full training on all of `gpus`: copied and sharded."""
    found: dict[str, Any] = {"rows": {}}
    for kind in ("full", "full_sharded"):
        fits: dict[int, dict[str, Any]] = {}

        def tried(batch: int, kind: str = kind, fits: dict[int, dict[str, Any]] = fits) -> bool:
            row = run(kind, gpus, batch=batch, steps=30)
            if row is not None:
                fits[batch] = row
            return row is not None

        batch = largest(tried, _MOST)
        if batch:
            row = fits[batch]
            row["pictures_per_s"] = round(1000 * batch * gpus / row["after_pivot_ms"], 2)
            found["rows"][f"{kind}, largest batch on {gpus} GPUs"] = {"batch": batch, **row}
        found[f"{kind}_gpus_{gpus}_largest_batch"] = batch
    return found


def name_of(kind: str, count: int) -> str:
    """What a run is called in the results."""
    return f"{kind}, {count} GPU{'s' if count > 1 else ''}"


def _needs_two(kind: str) -> bool:
    """Whether one GPU cannot do it alone: it has nobody to share with."""
    return bool(KINDS[kind].get("shard"))


def _alone(kind: str) -> str:
    """What one GPU does instead of `kind`."""
    return "full" if _needs_two(kind) else kind


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that `fits`, if all smaller ones do; 0 if none does. Tries few."""
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference between two lists of losses."""
    return max(abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True))


def losses_together(components: Components, data: ExampleDataset, config: TrainingConfig) -> list[float]:
    """The losses of `fine_tune` in these processes."""
    losses: list[float] = []
    fine_tune(components, data, config, on_step=lambda report: losses.append(report.loss))
    return losses


def losses_alone(
    components: Components, data: ExampleDataset, config: TrainingConfig, processes: int
) -> list[float]:
    """The losses of one process that sees in each step what so many `processes` see: their pictures, with their noise.

    The recipe up to the pivot, written down again without processes. `config` has neither preservation nor a pivot.
    """
    assert (
        not config.preservation and config.pivot_step == config.max_train_steps and not config.prior_prompts
    )
    generator = torch.Generator(components.device).manual_seed(config.seed)
    torch.manual_seed(config.seed)
    trainable = (lora if config.is_lora else full_unet)(components.unet, config)
    tokens = NewTokens(components, TokenMap.parse(config.token_map), config.token_init, generator)
    weights, rows = trainable.weights, Group(params=tokens.parameters, lr=config.ti_lr)
    optimizers = Optimizers(trainable.optimizer, weights=weights, rows=rows, device=components.device)
    ranks = range(processes)
    size, seed = config.learned_at_once, config.seed
    sources = [Batches(data, size, seed=seed + rank, weight=1 / processes) for rank in ranks]
    noise = [torch.Generator(components.device).manual_seed(seed + rank) for rank in ranks]
    losses = itertools.cycle([DenoisingLoss(components, config, one, None) for one in noise])

    def loss(*parts: Part) -> list[torch.Tensor]:
        return next(losses)(*parts)

    step = TrainingStep(
        loss,
        sources,
        optimizers,
        tokens,
        dataclasses.replace(config, cuda_graph=False),
        generator,
        mixed_precision=trainable.mixed_precision,
    )
    found = []
    for number in range(config.max_train_steps):
        warmup, total = config.lr_warmup_steps, config.max_train_steps
        share = learning_rate_share(config.lr_scheduler, number, warmup=warmup, total=total)
        optimizers.set_rates(weights=weights.lr * share, rows=rows.lr * share)
        value, _ = step.gradients(tuple(batches.draw() for batches in sources))
        step.update()
        found.append(value)
    tokens.remove()
    return found


def compared(config: TrainingConfig) -> TrainingConfig:
    """`config` for runs whose losses are compared: short, with rates that move them, and only what `losses_alone` knows."""
    return dataclasses.replace(
        config,
        max_train_steps=COMPARED,
        lr_warmup_steps=0,
        lr_scheduler="constant",
        preservation=0.0,
        pivot_fraction=1.0,
        unet_learning_rate=1e-5,
        lora_lr=1e-3,
        gradient_checkpointing=True if config.is_lora else config.gradient_checkpointing,
    )


def with_torchrun(kind: str, gpus: int, **options: Any) -> dict[str, Any] | None:
    """`Run` on this host. Shows the log of its processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    command += ["-m", "benchmarks.many_gpus", kind]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode} and gave no figures")
    found = json.loads(lines[-1])
    return None if "out_of_memory" in found else found


def main() -> None:
    """One process of a run. The first one prints the figures, any one that memory ran out."""
    from benchmarks.training import ours, settings

    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_gpus", description=main.__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--losses-of", type=int, default=0, help="compare losses with this many processes")
    args = parser.parse_args()
    keep_compiled_kernels()
    data_parallel.join()
    config = settings(1024, train_batch_size=args.batch, max_train_steps=args.steps, **KINDS[args.kind])
    try:
        if args.losses_of:
            config = compared(config)
            parts = full_size.components(is_lora=config.is_lora)
            data = full_size.examples(parts, 8 * args.losses_of, config.resolution)
            is_alone = data_parallel.world_size() == 1
            losses = (
                losses_alone(parts, data, config, args.losses_of)
                if is_alone
                else losses_together(parts, data, config)
            )
            row: dict[str, Any] = {"losses": losses}
        else:
            row = dict(ours(config))
            row["peak_gib"] = max(data_parallel.gathered(row["peak_gib"]))
    except torch.OutOfMemoryError:
        sys.stdout.write(json.dumps({"out_of_memory": True}) + "\n")
        sys.stdout.flush()
        raise
    if data_parallel.rank() == 0:
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
    data_parallel.leave()


if __name__ == "__main__":
    main()
