"""One job: learn a subject by one method with the project's own recipe, draw every prompt and judge the pictures."""

from __future__ import annotations

import csv
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import prompts as P
from benchmarks.judging import judge
from dataset_and_utils import TokenMap
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.data.dataset_folder import read_dataset_folder
from sdxl.model import fine_tune_files
from sdxl.model.components import Components, load_components
from sdxl.serving.pipeline import load_pipeline
from sdxl.serving.previews import drawer
from sdxl.serving.tuned_pipeline import TunedPipeline
from sdxl.training.config import TrainingConfig, resolve_views
from sdxl.training.examples import cache_examples
from sdxl.training.presets import PRESETS
from sdxl.training.prior import PriorConfig, prior_dataset
from sdxl.training.recipe import fine_tune
from sdxl.training.watch import Watch
from tiny_world.captions import caption
from tiny_world.parts import pad
from tiny_world.raster import Rendered, render
from tiny_world.scenes import random_scene
from tiny_world.sheets import to_pil
from tiny_world.subjects import shot_parts, subject

BASE = Path("base_models/tiny-sdxl")
RAW_SIDE = 512
"""Side in pixels of training pictures as users would upload them. They are prepared at 256 pixels, so that there are pixels
for views. Edges are as soft as at 256, in shares of the picture, so that the whole picture looks as it does at 256."""
PRIOR_IMAGES = 24


@dataclass(frozen=True, kw_only=True)
class Method:
    """How to learn a subject."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TrainingConfig` that differ from `SETTINGS`."""
    called: str = P.NAME
    """The subject's name in captions and prompts: the token, or plain words for a method without token."""
    init: str = ""
    """A known word at which the token's rows start. Empty: they start at random."""
    rows: int = 2
    """Number of the token's rows."""
    pictures: int = len(P.TRAINING)
    """How many pictures to learn from, at most `P.MOST_PICTURES`."""
    one_caption: bool = False
    """Whether all pictures have the same caption, which only names the subject."""
    views: int | None = 0
    """Random views of each picture, learned in addition to the whole picture. None: as many as training chooses."""
    raw_side: int = RAW_SIDE
    """Side in pixels of the training pictures before they are prepared at 256. 256 leaves no pixels for views."""
    masks: bool = False
    """Whether the pictures have masks of the subject."""
    prior: str = ""
    """Prompts for prior preservation, separated by |."""
    steps_factor: float = 1.0
    """How many times as many steps as the other methods."""
    trained: bool = True
    """False: the base without training."""


def common_captions(count: int, seed: int) -> list[str]:
    """Captions such as the miniature learned from: what it is to keep, as SDXL keeps the product's own list."""
    rng = np.random.default_rng((seed, 4242))
    return [caption(random_scene(rng, held=False, pairs=0.15), rng) for _ in range(count)]


_GOOD = PRESETS["good"]
SETTINGS: dict[str, Any] = {
    "unet_learning_rate": _GOOD.unet_learning_rate,
    "lora_lr": _GOOD.lora_lr,
    "ti_lr": _GOOD.ti_lr_at_random,
    "is_lora": False,
    "lora_rank": _GOOD.lora_rank,
    "lora_targets": _GOOD.lora_targets,
    "lr_scheduler": "cosine",
    "seed": 0,
    "checkpointing_steps": 0,
    "preservation_prompts": "|".join(common_captions(32, seed=1)),
}
"""Settings of all methods, which a method may replace."""


def run_job(
    seed: int,
    method: Method,
    *,
    steps: int,
    batch_size: int,
    seeds: int,
    sampling_steps: int,
    side: int = 256,
    device: str,
) -> dict[str, Any]:
    """The figures of one job, and its `pictures` of the first seed, uint8 [prompts, 3, side, side]."""
    torch.manual_seed(0)
    started = time.monotonic()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        tuned = None
        if method.trained:
            tuned = learn_subject(
                seed, method, Path(folder), steps=steps, batch_size=batch_size, side=side, device=device
            )
        learnt = time.monotonic()
        pipeline = TunedPipeline(load_pipeline(BASE, torch.device(device)))
        pipeline.activate(tuned)
        pipeline.pipeline.set_progress_bar_config(disable=True)
        numbers, pictures = judge(
            seed,
            pipeline,
            called=method.called,
            is_base=not method.trained,
            seeds=seeds,
            sampling_steps=sampling_steps,
            side=side,
            device=device,
        )
    numbers["train_seconds"] = round(learnt - started, 1) if method.trained else 0.0
    numbers["seconds"] = round(time.monotonic() - started, 1)
    if device == "cuda":
        numbers["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return {"seed": seed, "method": method.name, **numbers, "pictures": pictures}


def training_pictures(seed: int, side: int = 256, count: int = len(P.TRAINING)) -> Rendered:
    """The first `count` training pictures of subject `seed`, of side×side pixels, with masks of the subject."""
    cast = {P.NAME: subject(seed)}
    table = pad([shot_parts(s, cast, seed * 1000 + i) for i, s in enumerate(P.training_scenes(count))])
    return render(table, size=side)


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
    watch_of: Callable[[Path, Components, TrainingConfig], Watch] | None = None,
) -> fine_tune_files.FineTuneFiles:
    """Fine-tune `base` on the pictures and captions in `raw` with the project's own stages.

    The stages write into `folder`. `watch_of` makes what watches the training, of the prepared data set.
    """
    settings = {
        **SETTINGS,
        "base": str(base),
        "token_map": token_map,
        "token_init": _token_init(token_map, method.init),
        "resolution": resolution,
        "max_train_steps": round(steps * method.steps_factor),
        "train_batch_size": batch_size,
        "gradient_checkpointing": gradient_checkpointing,
        **method.settings,
    }
    config = TrainingConfig(**settings, lr_warmup_steps=min(5, settings["max_train_steps"] - 1))
    dataset = prepare_dataset(raw, folder / "dataset", config=PreprocessConfig(target_size=resolution))
    draws = config.max_train_steps * config.learned_at_once
    components = load_components(base, is_lora=config.is_lora, device=torch.device(device))
    examples = cache_examples(
        dataset,
        components,
        TokenMap.parse(config.token_map),
        seed=config.seed,
        views=resolve_views(method.views, draws=draws, images=len(read_dataset_folder(dataset))),
        flip=config.horizontal_flip,
    )
    prior = None
    if method.prior:
        wanted = PriorConfig.parse(method.prior, base=str(base), images=PRIOR_IMAGES, resolution=resolution)
        drawn = prior_dataset(wanted, drawer(components))
        prior = cache_examples(drawn, components, TokenMap({}), seed=0)
    watch = watch_of(dataset, components, config) if watch_of else None
    model = fine_tune(components, examples, config, prior=prior, watch=watch)
    fine_tune_files.write(model, folder / "tuned", {})
    return fine_tune_files.read(folder / "tuned", folder / "unpacked")


def _token_init(token_map: str, word: str) -> str:
    """The input `token_init` that starts every token at `word`, or at random for an empty word."""
    return ",".join(f"{name}:{word}" for name in TokenMap.parse(token_map).placeholders if word)


def write_raw(
    folder: Path,
    pictures: list[Image.Image],
    captions: list[str],
    masks: list[Image.Image] | None = None,
) -> None:
    """Write pictures, captions.csv and masks into the new `folder`, in the form that users upload."""
    folder.mkdir()
    names = [f"{i}.src.png" for i in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        picture.save(folder / name)
    for i, mask in enumerate(masks or ()):
        mask.save(folder / f"{i}.mask.png")
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image_file", "caption"))
        writer.writerows(zip(names, captions, strict=True))


def write_renders(folder: Path, images: Tensor, captions: list[str], masks: Tensor | None) -> None:
    """`write_raw` for renders [n, 3, h, w] in 0..1.

    masks: [n, things, h, w]. The first thing's mask is written, with a margin as people leave it.
    """
    drawn = None if masks is None else [to_pil(_grown(mask).expand(3, -1, -1)) for mask in masks[:, :1]]
    write_raw(folder, [to_pil(image) for image in images], captions, drawn)


def learn_subject(
    seed: int,
    method: Method,
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    side: int,
    device: str,
    watch_of: Callable[[Path, Components, TrainingConfig], Watch] | None = None,
) -> fine_tune_files.FineTuneFiles:
    """`learn` subject `seed` from its training pictures with captions."""
    shown = training_pictures(seed, method.raw_side, method.pictures)
    captions = P.training_captions(method.called, method.pictures)
    if method.one_caption:
        captions = [f"a photo of {method.called}"] * len(captions)
    write_renders(
        folder / "raw",
        shown.images,
        captions,
        shown.masks if method.masks else None,
    )
    return learn(
        folder / "raw",
        folder,
        method,
        base=BASE,
        token_map=f"{P.NAME}:{method.rows}",
        resolution=side,
        steps=steps,
        batch_size=batch_size,
        device=device,
        watch_of=watch_of,
    )


def _grown(mask: Tensor) -> Tensor:
    """A mask [1, h, w], grown by a 64th of its width."""
    by = mask.shape[-1] // 64
    return torch.nn.functional.max_pool2d(mask[None], 2 * by + 1, 1, by)[0]
