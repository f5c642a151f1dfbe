"""`python -m benchmarks.sampling`: serving at SDXL's full size on a GPU, compared with diffusers' eager pipeline.

Weights are random. A request is a prompt in and PNG files out. Ours goes through predict.py, with the safety checker and the
watermark; diffusers has neither. The two take turns; figures are medians. `benchmarks.expert` and `benchmarks.fast` add to the
results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import full_size
from benchmarks.quality import about
from benchmarks.results_file import write
from benchmarks.training import ceiling_tflops
from dataset_and_utils import TokenMap, eos_id, pool_at_eos
from sdxl.model.prompt_chunks import States
from sdxl.process import keep_compiled_kernels
from sdxl.serving.conditioning import Prompts, for_base
from sdxl.serving.generation import decode, generate
from sdxl.serving.request import FineTuneOptions, GenerationRequest

PROMPT, STEPS, GUIDANCE, SIDE = "a photo of TOK on the moon", 50, 7.5, 1024
HALF = torch.float16
TIERS = {"12gb": 12, "8gb": 8}
"""Placement → GiB of the GPU's memory that the process may use."""


def milliseconds(work: Callable[[], Any], runs: int, skip: int = 3) -> float:
    """Median time of `runs` calls, each measured until the GPU is idle."""
    times = []
    for _ in range(runs + skip):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return round(median(times[skip:]), 2)


def pair(
    unet: Callable[..., Any], rows: int, dtype: torch.dtype, size: tuple[int, int] = (SIDE, SIDE)
) -> Callable[[], Any]:
    """A call of the UNet with `rows` rows, for pictures of `size` (height, width); a picture with guidance has 2."""
    latents = torch.randn(rows, 4, size[0] // 8, size[1] // 8, device=full_size.DEVICE, dtype=dtype)
    embeds = torch.randn(rows, 77, 2048, device=full_size.DEVICE, dtype=dtype)
    told = {
        "text_embeds": torch.randn(rows, 1280, device=full_size.DEVICE, dtype=dtype),
        "time_ids": torch.full((rows, 6), float(SIDE), device=full_size.DEVICE, dtype=dtype),
    }
    when = torch.tensor(500.0, device=full_size.DEVICE)

    @torch.no_grad()
    def call() -> Any:
        return unet(latents, when, encoder_hidden_states=embeds, added_cond_kwargs=told, return_dict=False)

    return call


def calls(runner: Callable[..., Any], eager: Callable[..., Any]) -> dict[str, float]:
    """Milliseconds of a call of the UNet for several numbers of rows and sizes, by `runner` and by plain kernels."""
    found = {}
    for rows in (2, 8):
        found[f"eager_{rows}_rows_ms"] = milliseconds(pair(eager, rows, HALF), 12)
    for rows in (1, 2, 4, 6, 8):
        found[f"ours_{rows}_rows_ms"] = milliseconds(pair(runner, rows, HALF), 20, skip=6)
    found["ours_832x1216_ms"] = milliseconds(pair(runner, 2, HALF, (832, 1216)), 20, skip=6)
    milliseconds(pair(partial(runner, features="keep"), 2, HALF), 1)
    found["shallow_2_rows_ms"] = milliseconds(pair(partial(runner, features="reuse"), 2, HALF), 20, skip=6)
    return found


def setup_seconds(environment: dict[str, str], folder: Path) -> float:
    """Seconds from the start of `python predict.py` to its first picture on disk, with warm caches."""
    command = [sys.executable, "predict.py", "-i", f"prompt={PROMPT}", "-o", str(folder / "first")]
    times = []
    for _ in range(2):
        started = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        times.append(time.perf_counter() - started)
    return round(times[-1], 1)


def switches(predictor: Any, tars: dict[str, Path]) -> dict[str, float]:
    """Seconds to apply a fine-tune: for the first time, from the cache on disk, and from the cache in memory."""

    def take(name: str | None) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        predictor.painter.apply(FineTuneOptions(replicate_weights=str(tars[name]) if name else None))
        torch.cuda.synchronize()
        return round(time.perf_counter() - started, 3)

    found = {}
    for kind in ("lora", "unet"):
        one, two = f"{kind}-1", f"{kind}-2"
        found[f"{kind}_first_s"] = take(one)
        take(two)
        predictor.painter.fine_tunes._memory.clear()
        found[f"{kind}_from_disk_s"] = take(one)
        take(two)
        found[f"{kind}_from_memory_s"] = take(one)
        found[f"base_after_{kind}_s"] = take(None)
    return found


def requests(predictor: Any, eager: Any, folder: Path, turns: int) -> dict[str, float]:
    """Seconds from prompt to PNG, for one picture and for four at once; also with `speed=fast`."""

    def ours(count: int) -> None:
        predictor.run_with_defaults(prompt=PROMPT, num_outputs=count, seed=0)

    def fast(count: int) -> None:
        predictor.run_with_defaults(prompt=PROMPT, num_outputs=count, seed=0, speed="fast")

    def theirs(count: int) -> None:
        pictures = eager(
            PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, num_images_per_prompt=count
        ).images
        for number, picture in enumerate(pictures):
            picture.save(folder / f"eager-{number}.png")

    found = {}
    for count in (1, 4):
        times: dict[str, list[float]] = {"ours": [], "fast": [], "eager": []}
        for _ in range(turns + 1):
            for name, work in (("ours", ours), ("fast", fast), ("eager", theirs)):
                torch.cuda.synchronize()
                started = time.perf_counter()
                work(count)
                times[name].append(time.perf_counter() - started)
        for name, seconds in times.items():
            found[f"{name}_{count}_s"] = round(median(seconds[1:]), 3)
    return found


def stages(pipeline: Any, states: States) -> dict[str, float]:
    """Milliseconds of a request outside the UNet: encode the prompt, and decode four pictures.

    states: runs the text encoders.
    """
    latents = torch.randn(4, 4, SIDE // 8, SIDE // 8, device=full_size.DEVICE, dtype=HALF)
    prompts = Prompts(
        prompt=PROMPT,
        negative_prompt="",
        token_map=TokenMap({}),
        guidance_scale=GUIDANCE,
        guidance_rescale=0.0,
        count=1,
        size=(SIDE, SIDE),
        device=latents.device,
        states=states,
    )
    with torch.no_grad():
        return {
            "prompt_ms": milliseconds(lambda: for_base(pipeline, prompts), 6),
            "decode_4_ms": milliseconds(lambda: list(decode(pipeline, latents)), 6),
        }


def difference(predictor: Any, eager: Any) -> float:
    """Mean difference, in levels of 255, between our picture and one drawn by plain kernels in fp16."""
    request = GenerationRequest(
        prompt=PROMPT, width=SIDE, height=SIDE, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=0
    )
    painter = predictor.painter
    ours = generate(
        painter.tuned.pipeline,
        request,
        TokenMap({}),
        runner=painter.runners,
        states=painter.runners.encoders,
    )
    eager.upcast_vae()  # as its own call does
    theirs = generate(eager, request, TokenMap({}))
    eager.vae.to(HALF)
    one, other = (np.asarray(pictures[0], dtype=float) for pictures in (ours, theirs))
    return round(float(np.abs(one - other).mean()), 3)


def tier(predictor: Any) -> dict[str, float]:
    """Seconds and peak memory for one picture with offloading."""
    torch.cuda.reset_peak_memory_stats()
    predictor.run_with_defaults(prompt=PROMPT, seed=0)
    started = time.perf_counter()
    predictor.run_with_defaults(prompt=PROMPT, seed=0)
    seconds = round(time.perf_counter() - started, 2)
    return {"request_s": seconds, "peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2)}


def with_defaults(predictor: Any) -> Any:
    """Give `predictor` a method `run_with_defaults`, which fills in defaults as Cog's server does."""
    from sdxl.declared_inputs import declared_inputs

    defaults = {name: declared.default for name, declared in declared_inputs(predictor.run).items()}
    predictor.run_with_defaults = lambda **inputs: predictor.run(**{**defaults, **inputs})
    return predictor


def main() -> None:
    """Measure, print and write the results."""
    args = _arguments()
    keep_compiled_kernels()
    args.workdir.mkdir(parents=True, exist_ok=True)
    base = full_size.save_pipeline(args.workdir / "base")
    os.environ |= {
        "SDXL_BASE": str(base),
        "SDXL_SAFETY_CHECKER": str(full_size.save_checker(args.workdir / "checker")),
        "HF_HUB_OFFLINE": "1",
        "SDXL_WORKSPACE": str(args.workdir),
        "SDXL_SPEED": args.speed,
        "SDXL_MEMORY": args.memory,
    }
    if args.memory != "whole":
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(TIERS[args.memory] / total)
    from diffusers import StableDiffusionXLPipeline

    from predict import Predictor

    results: dict[str, Any] = {"speed": args.speed}

    def note(**found: Any) -> None:
        results.update(found)
        write(args.output, results | about(full_size.DEVICE))
        sys.stdout.write(json.dumps(found) + "\n")

    predictor = Predictor()
    started = time.perf_counter()
    predictor.setup()
    note(
        setup_in_process_s=round(time.perf_counter() - started, 1),
        speed=predictor.painter.runners.speed,  # "eager" if the GPU cannot do what was asked
    )
    with_defaults(predictor)
    if args.memory != "whole":
        note(memory=args.memory, **tier(predictor))
        return
    eager: Any = StableDiffusionXLPipeline.from_pretrained(
        base, variant="fp16", dtype=HALF, add_watermarker=False
    ).to(full_size.DEVICE)
    eager.set_progress_bar_config(disable=True)
    for encoder, tokenizer in (
        (eager.text_encoder, eager.tokenizer),
        (eager.text_encoder_2, eager.tokenizer_2),
    ):
        pool_at_eos(encoder, eos_id(tokenizer))  # the saved encoders have the id of the full vocabulary
    runner = predictor.painter.runners(predictor.painter.tuned.pipeline.unet)
    found = calls(runner, eager.unet)
    ceiling = ceiling_tflops()
    share = 2 * full_size.forward_tflop(SIDE) / (found["ours_2_rows_ms"] / 1000) / ceiling
    note(
        calls=found,
        unet_pair_ms=found["ours_2_rows_ms"],
        ceiling_tflops=ceiling,
        share_of_ceiling=round(share, 3),
    )
    if args.speed == "fp8":  # the cost of fine-tunes and files is the same
        note(picture_difference_levels=difference(predictor, eager))
        return
    found = requests(predictor, eager, args.workdir, args.turns)
    note(
        requests=found,
        stages=stages(predictor.painter.tuned.pipeline, predictor.painter.runners.encoders),
        request_speedup=round(found["eager_1_s"] / found["ours_1_s"], 2),
        request4_speedup=round(found["eager_4_s"] / found["ours_4_s"], 2),
        around_ms=round(1000 * found["ours_1_s"] - STEPS * results["unet_pair_ms"]),
        exact_picture_s=found["ours_1_s"],
        fast_picture_s=found["fast_1_s"],
    )
    note(picture_difference_levels=difference(predictor, eager))
    tars = full_size.save_fine_tunes(eager.unet, args.workdir)
    del eager
    torch.cuda.empty_cache()
    found = switches(predictor, tars)
    note(
        switches=found,
        switch_lora_s=found["lora_first_s"],
        switch_unet_s=found["unet_first_s"],
        switch_base_s=max(found["base_after_lora_s"], found["base_after_unet_s"]),
    )
    del predictor, runner
    torch.cuda.empty_cache()
    note(setup_s=setup_seconds(dict(os.environ), args.workdir))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    parser.add_argument("--speed", default="compiled", choices=["compiled", "fp8", "graphs", "eager"])
    parser.add_argument(
        "--memory",
        default="whole",
        choices=["whole", *TIERS],
        help="a cap in GiB, and parts that take turns below it",
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--workdir", type=Path, default=Path("runs/sampling"), help="30 GB for the base and the fine-tunes"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="default: benchmarks/results/sampling.json, or with what differs in its name",
    )
    args = parser.parse_args()
    if args.output is None:
        changes = [one for one in (args.speed, args.memory) if one not in ("compiled", "whole")]
        name = "-".join(["sampling", *changes])
        args.output = Path("benchmarks/results") / f"{name}.json"
    return args


if __name__ == "__main__":
    main()
