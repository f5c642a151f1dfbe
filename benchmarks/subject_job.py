"""One subject, one method: learn it by the project's own recipe, draw every prompt, judge the pictures."""

from __future__ import annotations

import csv
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import prompts as P
from dataset_and_utils import TokenMap
from preprocess import PreprocessConfig, prepare_dataset
from sdxl import artifacts
from sdxl.components import load_components
from sdxl.config import LoraTargets, TrainingConfig
from sdxl.examples import cache_examples
from sdxl.pipelines import load_pipeline
from sdxl.training import fine_tune
from sdxl.tuned_weights import TunedPipeline
from tiny_world.following import following, shares
from tiny_world.parts import pad
from tiny_world.raster import render
from tiny_world.scorer import Scorer
from tiny_world.sheets import to_pil
from tiny_world.subjects import random_shot, shot_parts, subject

BASE = Path("base_models/tiny-sdxl")
GUIDANCE = 3.0
REAL_SHOTS = 16


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a subject is learnt. lora: matrices instead of the UNet itself. rate: their learning rate, 0 to train
    the token rows alone. ti: share of the steps in which the rows train, 0 for rows that stay as they start.
    init: known word that the rows start from. targets: layers that get LoRA matrices. Not `trained` is the untuned
    base."""

    name: str
    lora: bool = False
    rate: float = 0.0
    ti: float = 0.0
    ti_rate: float = 5e-3
    init: str = ""
    targets: LoraTargets = "attention"
    trained: bool = True


def run_job(
    seed: int, method: Method, *, steps: int, batch_size: int, seeds: int, sampling_steps: int, device: str
) -> dict[str, Any]:
    """Results of one job as flat numbers, and `pictures`, uint8 [prompts, 3, 256, 256] of the first seed."""
    torch.manual_seed(0)
    started = time.monotonic()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        tuned = None
        if method.trained:
            tuned = _learn(seed, method, Path(folder), steps, batch_size, device)
        learnt = time.monotonic()
        pipeline = TunedPipeline(load_pipeline(BASE, torch.device(device)))
        pipeline.activate(tuned)
        pipeline.pipeline.set_progress_bar_config(disable=True)
        numbers, pictures = _judge(seed, pipeline, seeds, sampling_steps, device, untuned=tuned is None)
    numbers["train_seconds"] = round(learnt - started, 1) if method.trained else 0.0
    numbers["seconds"] = round(time.monotonic() - started, 1)
    if device == "cuda":
        numbers["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return {"seed": seed, "method": method.name, **numbers, "pictures": pictures}


def training_pictures(seed: int) -> Tensor:
    """The six pictures [6, 3, 256, 256] in 0..1 that subject `seed` is learnt from."""
    cast = {P.NAME: subject(seed)}
    return render(pad([shot_parts(s, cast, seed * 1000 + i) for i, s in enumerate(P.TRAINING)])).images


def real_pictures(seed: int, n: int = REAL_SHOTS) -> Tensor:
    """Fresh pictures [n, 3, 256, 256] in 0..1 of a subject, none of them learnt from."""
    rng = np.random.default_rng((seed, 616))
    cast = {P.NAME: subject(seed)}
    scenes = [random_shot(P.NAME, rng) for _ in range(n)]
    return render(pad([shot_parts(s, cast, 900_000 + i) for i, s in enumerate(scenes)])).images


def learn(
    raw: Path,
    folder: Path,
    method: Method,
    *,
    base: Path,
    token_map: str,
    resolution: int,
    steps: int,
    batch_size: int,
    device: str,
    gradient_checkpointing: bool = False,
) -> artifacts.FineTune:
    """Fine-tune `base` on the pictures and captions in `raw` with the project's own stages, in the empty `folder`."""
    config = TrainingConfig(
        base=str(base),
        token_map=token_map,
        token_init=_token_init(token_map, method.init),
        resolution=resolution,
        max_train_steps=steps,
        train_batch_size=batch_size,
        unet_learning_rate=method.rate or 1e-6,
        lora_lr=method.rate,
        ti_lr=method.ti_rate,
        is_lora=method.lora,
        lora_rank=16,
        lora_targets=method.targets,
        lr_scheduler="cosine",
        lr_warmup_steps=min(5, steps - 1),
        seed=0,
        checkpointing_steps=0,
        pivot_fraction=method.ti,
        gradient_checkpointing=gradient_checkpointing,
    )
    dataset = prepare_dataset(raw, folder / "dataset", config=PreprocessConfig(target_size=resolution))
    components = load_components(base, is_lora=method.lora, device=torch.device(device))
    examples = cache_examples(dataset, components, TokenMap.parse(config.token_map), seed=0)
    model = fine_tune(components, examples, config)
    artifacts.write(model, folder / "tuned", {})
    return artifacts.read(folder / "tuned", folder / "unpacked")


def _token_init(token_map: str, word: str) -> str:
    """`word` for every token of the map; nothing for no word."""
    return ",".join(f"{name}:{word}" for name in TokenMap.parse(token_map).placeholders if word)


def write_raw(folder: Path, pictures: list[Image.Image], captions: list[str]) -> None:
    """Pictures and their captions.csv, as people hand them over, into the new `folder`."""
    folder.mkdir()
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i}.png")
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image_file", "caption"))
        writer.writerows((f"{i}.png", caption) for i, caption in enumerate(captions))


def _learn(
    seed: int, method: Method, folder: Path, steps: int, batch_size: int, device: str
) -> artifacts.FineTune:
    write_raw(folder / "raw", [to_pil(picture) for picture in training_pictures(seed)], P.training_captions())
    return learn(
        folder / "raw",
        folder,
        method,
        base=BASE,
        token_map=f"{P.NAME}:2",
        resolution=256,
        steps=steps,
        batch_size=batch_size,
        device=device,
    )


def _judge(
    seed: int, tuned: TunedPipeline, seeds: int, sampling_steps: int, device: str, *, untuned: bool
) -> tuple[dict[str, float], Tensor]:
    scorer = Scorer(device=device)
    asked, known, prior = P.subject_prompts(), P.known_prompts(), P.prior_prompts()

    def drawn_of(prompts: list[str], seed: int) -> Tensor:
        return draw(tuned, prompts, seed, side=256, steps=sampling_steps)

    drawn = [drawn_of([prompt for prompt, _ in asked], 100 + 50 * i) for i in range(seeds)]
    pictures = torch.cat(drawn)
    real = scorer.identity(real_pictures(seed))
    others = scorer.identity(real_pictures(seed + 2, 8))
    embedded = scorer.identity(pictures)
    numbers = {
        "similarity": float((embedded @ real.T).mean()),
        "real_similarity": float((real @ real.T).fill_diagonal_(0).sum() / (len(real) * (len(real) - 1))),
        "other_similarity": float((real @ others.T).mean()),
    }
    for i, value in enumerate((embedded @ real.T).mean(1).view(seeds, -1).mean(0).tolist()):
        numbers[f"similarity_prompt_{i}"] = round(value, 3)
    met = following(scorer.attributes(pictures), [scene for _, scene in asked] * seeds)
    numbers |= {f"prompt_{name}": value for name, value in shares(met).items()}
    for name, pairs in (("known", known), ("prior", prior)) if untuned else (("prior", prior),):
        images = drawn_of([prompt for prompt, _ in pairs], 200)
        met = following(scorer.attributes(images), [scene for _, scene in pairs])
        numbers |= {f"{name}_{key}": value for key, value in shares(met).items()}
    numbers["diversity"] = spread(pictures.unflatten(0, (seeds, -1)).transpose(0, 1))
    again = drawn_of([P.DIVERSITY_PROMPT] * 6, 300)
    numbers["prior_diversity"] = spread(again.unsqueeze(0))
    return numbers, (drawn[0] * 255).round().to(torch.uint8).contiguous()


def spread(pictures: Tensor) -> float:
    """Mean root mean square difference, 0..1, between pictures [prompts, n, 3, h, w] of one prompt, as 32 pixel
    thumbnails; 0 for n = 1."""
    small = torch.nn.functional.interpolate(pictures.flatten(0, 1), size=(32, 32), mode="area")
    small = small.unflatten(0, pictures.shape[:2]).flatten(2)
    n = small.shape[1]
    if n == 1:
        return 0.0
    distances = torch.cdist(small, small) / small.shape[2] ** 0.5
    return round(float(distances.sum((1, 2)).mean() / (n * (n - 1))), 4)


@torch.inference_mode()
def draw(tuned: TunedPipeline, prompts: list[str], seed: int, *, side: int, steps: int) -> Tensor:
    """One picture a prompt, [n, 3, side, side] in 0..1 on the CPU; picture i from the seed `seed` + i."""
    output: Any = tuned.pipeline(
        prompt=[tuned.token_map.substitute(prompt) for prompt in prompts],
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        height=side,
        width=side,
        generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))],
        output_type="pt",
    )
    return output.images.float().cpu()
