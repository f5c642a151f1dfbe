"""`python -m benchmarks.training`: compare `fine_tune` with a plain loop at SDXL's full size: speed and memory.

Weights are random, in the published configuration. "Ours" are real runs of the recipe: token rows and both text encoders
train up to the pivot, prompts are cached after it, and gradients are clipped. The plain loop is diffusers and peft under
bf16 autocast, for the UNet alone. Each part takes minutes on a GPU and adds its figures to the results file.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from benchmarks import full_size, many_gpus, results_file, whole_runs
from benchmarks.quality import about
from sdxl.process import keep_compiled_kernels
from sdxl.training import lora_memory
from sdxl.training.config import TrainingConfig, TrainingOptions
from sdxl.training.diffusion import sample_timesteps
from sdxl.training.presets import PRESETS
from sdxl.training.recipe import StepReport, fine_tune
from sdxl.training.trainable import LORA_TARGETS

BATCH, RANK, PICTURES = 4, 32, 8
MANY_GPUS = ("many_gpus_speeds", "many_gpus_losses", "many_gpus_batches")
"""The parts of the part `many_gpus`."""
DEFAULT_LORA = {
    "lora_rank": PRESETS["good"].lora_rank,
    "lora_targets": PRESETS["good"].lora_targets,
    "preservation": TrainingOptions.preservation,
}
"""What the product trains unless the user says otherwise."""
STEPS, SETTLED = 60, 12
"""The steps of a run, with the pivot in the middle, and how many steps after the start and after the pivot do not count."""


def settings(side: int, **changes: Any) -> TrainingConfig:
    """The settings of a run: by default a LoRA of rank 32 on attention, with batch 4."""
    common: dict[str, Any] = {
        "base": "random",
        "token_map": "TOK:2",
        "resolution": side,
        "max_train_steps": STEPS,
        "train_batch_size": BATCH,
        "unet_learning_rate": 1e-6,
        "ti_lr": 3e-4,
        "is_lora": True,
        "lora_rank": RANK,
        "lora_targets": "attention",
        "lora_lr": 1e-4,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "seed": 0,
        "checkpointing_steps": 0,
    }
    return TrainingConfig(**common | changes)


def ours(config: TrainingConfig, losses: list[float] | None = None) -> dict[str, float]:
    """Milliseconds of a step before and after the pivot, the 10th and 90th percentile, and the peak memory in GiB.

    Appends every step's loss to `losses`.
    """
    _forget()
    waits = lora_memory.waits_on_cpu(config, torch.device(full_size.DEVICE))
    parts = full_size.components(is_lora=config.is_lora, unet_waits=waits)
    data = full_size.examples(parts, PICTURES, config.resolution)
    started, ends = time.perf_counter(), []

    def note(report: StepReport) -> None:
        ends.append(time.perf_counter())
        if losses is not None:
            losses.append(report.loss)

    fine_tune(parts, data, config, on_step=note)
    steps = [1000 * (after - before) for before, after in itertools.pairwise(ends)]
    before, after = steps[SETTLED : config.pivot_step - 1], steps[config.pivot_step + SETTLED :]
    del parts, data
    return {
        "before_pivot_ms": middle(before),
        "after_pivot_ms": middle(after),
        "after_pivot_p10_ms": middle(after, 0.1),
        "after_pivot_p90_ms": middle(after, 0.9),
        "first_step_s": round(ends[0] - started, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def plain(config: TrainingConfig, *, compiled: bool, steps: int = 14) -> dict[str, float]:
    """The same for a loop as in the examples of diffusers and peft: bf16 UNet, fp32 LoRA, autocast, AdamW.

    It trains the LoRA of `config` on pictures of its size, and does nothing else that the config says.
    """
    side, rank, targets = config.resolution, config.lora_rank, LORA_TARGETS[config.lora_targets]
    _forget()
    torch.manual_seed(0)
    with torch.device(full_size.DEVICE):
        unet = UNet2DConditionModel(**full_size.UNET).to(torch.bfloat16).requires_grad_(False).train()
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    trained = [p for p in unet.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    if compiled:
        torch._dynamo.config.recompile_limit = 1024  # type: ignore[attr-defined]
        unet.compile_repeated_blocks(fullgraph=False, dynamic=False)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    scheduler = full_size.DDPMScheduler(**full_size.SCHEDULE)
    generator = torch.Generator(full_size.DEVICE).manual_seed(0)
    latents = torch.randn(BATCH, 4, side // 8, side // 8, device=full_size.DEVICE)
    hidden = torch.randn(BATCH, 77, 2048, device=full_size.DEVICE, dtype=torch.bfloat16)
    pooled = torch.randn(BATCH, 1280, device=full_size.DEVICE, dtype=torch.bfloat16)
    ids = torch.tensor([[side, side, 0, 0, side, side]] * BATCH, device=full_size.DEVICE)
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        noise = torch.randn(latents.shape, generator=generator, device=full_size.DEVICE)
        when = sample_timesteps(scheduler, BATCH, generator)
        with torch.autocast(full_size.DEVICE, torch.bfloat16):
            condition = {"text_embeds": pooled, "time_ids": ids}
            noisy = scheduler.add_noise(latents, noise, when)
            loss = torch.nn.functional.mse_loss(
                unet(noisy, when, hidden, added_cond_kwargs=condition).sample.float(), noise
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        times.append(1000 * (time.perf_counter() - started))
    return {
        "after_pivot_ms": middle(times[4:]),
        "after_pivot_p10_ms": middle(times[4:], 0.1),
        "after_pivot_p90_ms": middle(times[4:], 0.9),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def ceiling_tflops() -> float:
    """TFLOP/s of a bf16 matrix product of 8192³ on this GPU, the median of ten."""
    one, two = (torch.randn(8192, 8192, device=full_size.DEVICE, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(14):
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.mm(one, two)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return round(2 * 8192**3 / median(times[4:]) / 1e12, 1)


def compare(name: str, side: int, *, all_ways: bool, **kind: Any) -> dict[str, Any]:
    """Measure LoRA by the recipe and by the plain loop in turns. With `all_ways`, also measure the steps between the two.

    name: what it is called in the results. kind: settings of the LoRA.
    """
    config = settings(side, **kind)
    fast_losses: list[float] = []
    eager_losses: list[float] = []
    rows = {"plain loop": plain(config, compiled=False), "ours": ours(config, fast_losses)}
    if all_ways:
        uncompiled = dataclasses.replace(config, compile_blocks=False)
        rows["ours, graphs without compiling"] = ours(uncompiled)
        rows["ours, eager"] = ours(dataclasses.replace(uncompiled, cuda_graph=False), eager_losses)
    rows["plain loop, again"] = plain(config, compiled=False)
    if all_ways:
        rows["plain loop, compiled blocks"] = plain(config, compiled=True)
    rows["ours, again"] = ours(config)
    tflop = 2 * BATCH * full_size.forward_tflop(side)  # forward, and backward for the activations
    ceiling = ceiling_tflops()
    for row in rows.values():
        row["share_of_ceiling"] = round(tflop / (row["after_pivot_ms"] / 1000) / ceiling, 3)
    fast = median([rows["ours"]["after_pivot_ms"], rows["ours, again"]["after_pivot_ms"]])
    slow = median([rows["plain loop"]["after_pivot_ms"], rows["plain loop, again"]["after_pivot_ms"]])
    return {
        "rows": rows,
        f"lora_{name}_after_pivot_ms": round(fast, 1),
        f"lora_{name}_before_pivot_ms": rows["ours"]["before_pivot_ms"],
        f"speedup_{name}": round(slow / fast, 2),
        f"loss_difference_{name}": max(
            (abs(a - b) / b for a, b in zip(fast_losses, eager_losses, strict=False)), default=None
        ),
        "ceiling_tflops": ceiling,
    }


def full() -> dict[str, Any]:
    """Measure full training at 1024×1024 with fp32 weights."""
    rows = {
        "ours": ours(settings(1024, is_lora=False, precision="fp32", gradient_checkpointing=False)),
        "ours, graphs without compiling": ours(
            settings(
                1024,
                is_lora=False,
                precision="fp32",
                gradient_checkpointing=False,
                compile_blocks=False,
            )
        ),
    }
    return {"rows": rows, "full_1024_after_pivot_ms": rows["ours"]["after_pivot_ms"]}


def tier(gib: float, *, is_lora: bool, name: str, **kind: Any) -> dict[str, Any]:
    """Measure batch 1 at 1024×1024 in a process that may use `gib` GiB of the GPU.

    name: what it is called in the results. kind: settings of the run.
    """
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(gib / total)
    try:
        row = ours(settings(1024, is_lora=is_lora, train_batch_size=1, max_train_steps=40, **kind))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    row["peak_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    return {"rows": {f"ours, limited to {gib:g} GiB": row}, f"{name}_peak_gib": row["peak_gib"]}


def fp8() -> dict[str, Any]:
    """Measure the default LoRA with the base's products in bf16 and in fp8, and compare the losses of all steps."""
    config = settings(1024, **DEFAULT_LORA)
    curves: dict[str, list[float]] = {"bf16": [], "fp8": []}
    rows = {
        f"ours, {name}": ours(dataclasses.replace(config, fp8=name == "fp8"), losses)
        for name, losses in curves.items()
    }
    differences = [abs(ours - theirs) / theirs for theirs, ours in zip(*curves.values(), strict=True)]
    return {
        "rows": rows,
        "lora_fp8_after_pivot_ms": rows["ours, fp8"]["after_pivot_ms"],
        "lora_fp8_loss_difference": max(differences),
    }


def _forget() -> None:
    """Free the memory of earlier runs and reset its peak. Also drop compiled shapes, which count against one limit."""
    torch._dynamo.reset()
    gc.collect()  # compiled modules refer to themselves
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def middle(times: list[float], share: float = 0.5) -> float:
    """The value that a `share` of `times` is at most, rounded to a tenth: by default the median."""
    return round(sorted(times)[int(share * (len(times) - 1))], 1)


def main() -> None:
    """Run the chosen parts. Each adds its figures to the results file when it ends."""
    args = _arguments()
    keep_compiled_kernels()
    run, gpus = many_gpus.with_torchrun, args.gpus or torch.cuda.device_count()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "lora_default": lambda: compare("default", 1024, all_ways=False, **DEFAULT_LORA),
        "lora_1024": lambda: compare("1024", 1024, all_ways=True),
        "lora_768": lambda: compare("768", 768, all_ways=False),
        "full": full,
        "lora_8gb": lambda: tier(7.5, is_lora=True, name="lora_8gb", **DEFAULT_LORA),
        "lora_12gb": lambda: tier(12, is_lora=True, name="lora"),
        "full_16gb": lambda: tier(15, is_lora=False, name="full_16gb", preservation=0.0),
        "full_24gb": lambda: tier(24, is_lora=False, name="full"),
        "lora_fp8": fp8,
        "whole_run": lambda: whole_runs.default_run(args.workdir, args.steps),
        "quick_run": lambda: whole_runs.quick_run(args.workdir),
        "many_gpus_speeds": lambda: many_gpus.speeds(run, gpus, args.kinds),
        "many_gpus_losses": lambda: many_gpus.learns_alike(run, gpus, args.kinds),
        "many_gpus_batches": lambda: many_gpus.largest_batches(run, gpus),
    }
    results = results_file.read(args.output)
    for name in itertools.chain(*(MANY_GPUS if name == "many_gpus" else [name] for name in args.parts)):
        found = parts[name]()
        results.setdefault("table", {})[name] = found.pop("rows", {})
        results |= found | about(full_size.DEVICE)
        results.setdefault("machines", {})[name] = results["machine"]
        results_file.write(args.output, results)
        sys.stdout.write(json.dumps({name: results["table"][name] | found}, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    known = [
        "lora_default",
        "lora_1024",
        "lora_768",
        "full",
        "lora_8gb",
        "lora_12gb",
        "full_16gb",
        "full_24gb",
        "lora_fp8",
        "whole_run",
        "quick_run",
    ]
    parser.add_argument("--parts", nargs="+", choices=[*known, "many_gpus", *MANY_GPUS], default=known)
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=many_gpus.KINDS,
        default=[*many_gpus.KINDS],
        help="of many_gpus; full comes before full_sharded, which is compared with it",
    )
    parser.add_argument("--gpus", type=int, help="the most GPUs of many_gpus; all by default")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the whole run")
    parser.add_argument(
        "--workdir", type=Path, default=Path("runs/training"), help="needs 9 GB for the base and tars"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/training.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
