"""Dataset folder → cached examples: everything that need not be done again in every step.

Knows the dataset folder and the frozen parts that encode it; does not know what trains.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from dataset_and_utils import Example, ExampleDataset, TokenMap, read_captions_csv
from sdxl import settings
from sdxl.data.dataset_folder import FRAMING_COLUMNS
from sdxl.model.components import Components, add_placeholder_tokens
from sdxl.speed.compiled_blocks import fuse_blocks

log = logging.getLogger(__name__)

T = TypeVar("T")

PIXELS_AT_ONCE = 2 * 1024 * 1024
"""Pixels that the autoencoder encodes in one batch: what its activations take must fit beside the model."""
LARGEST_ZOOM = 1.3
"""Views are cut out of the picture enlarged by at most this factor."""


@torch.no_grad()
def cache_examples(
    folder: Path,
    components: Components,
    token_map: TokenMap,
    *,
    seed: int,
    views: int = 0,
    flip: bool = False,
) -> ExampleDataset:
    """Encode the pictures and captions of a dataset folder; the tokenizers learn the map's placeholder tokens.

    Pictures become one sample each of the autoencoder's posterior, scaled by its `scaling_factor`.

    views: examples of each picture enlarged by a random factor up to `LARGEST_ZOOM` and cut at a random place, beside
        the whole; their time ids tell the cut.
    flip: each of them mirrored too.
    """
    add_placeholder_tokens(components, token_map)
    if settings.speed() != "eager":
        fuse_blocks(components.vae)
    table = folder / "captions.csv"
    framings = pd.read_csv(table)[FRAMING_COLUMNS].to_numpy()
    generator = torch.Generator(components.device).manual_seed(seed)
    examples = []
    captions = read_captions_csv(table)
    with ThreadPoolExecutor() as threads:
        works = (
            partial(_shown, folder, name, framing, np.random.default_rng((seed, number)), views, flip)
            for number, (name, framing) in enumerate(zip(captions, framings, strict=True))
        )
        progress = tqdm(captions.items(), desc="Encoding pictures", unit="picture")
        for (name, caption), shown in zip(progress, _ahead(threads, works), strict=True):
            ids = _token_ids(token_map.substitute(caption), name, components)
            for view, latents in zip(shown, _encode(shown, components, generator), strict=True):
                time_ids = [*view.framing, view.picture.height, view.picture.width]
                examples.append(
                    Example(
                        latents=latents,
                        mask=_latent_mask(view.mask, latents),
                        token_ids=ids,
                        time_ids=torch.tensor(time_ids, dtype=torch.float32, device=components.device),
                    )
                )
    return ExampleDataset(examples)


@dataclass(frozen=True, kw_only=True)
class _View:
    """A picture as it is learnt."""

    picture: Image.Image
    mask: Image.Image | None
    framing: Sequence[float]
    """Its original height and width, crop top and left in pixels."""
    covered_width: float
    """Of the whole original, in pixels of `picture`."""


def _ahead(threads: ThreadPoolExecutor, works: Iterable[Callable[[], T]], depth: int = 4) -> Iterator[T]:
    """The results of `works` in their order, made by `threads` up to `depth` ahead of who takes them."""
    waiting: deque[Future[T]] = deque()
    for work in works:
        waiting.append(threads.submit(work))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _shown(
    folder: Path, name: str, framing: Sequence[float], rng: np.random.Generator, views: int, flip: bool
) -> list[_View]:
    """The whole picture first, then its views, then all of them mirrored."""
    whole = _open(folder / name, folder / name.replace(".src.png", ".mask.png"), framing)
    shown = [whole, *(_view(whole, *shares) for shares in _spread_out(views, rng))]
    return shown + [_mirrored(view) for view in shown] if flip else shown


def _open(picture: Path, mask: Path, framing: Sequence[float]) -> _View:
    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    shape = None
    if mask.is_file():
        with Image.open(mask) as opened:
            shape = opened.convert("L")
    original_height, original_width, *_ = framing
    # A crop spans the original across or down: the rest of it lies beside the picture at the same scale.
    scale = max(image.height / original_height, image.width / original_width)
    return _View(picture=image, mask=shape, framing=framing, covered_width=original_width * scale)


def _spread_out(views: int, rng: np.random.Generator) -> np.ndarray:
    """Random points [views, 3] in 0..1, each coordinate once in every `views`-th of the range: few views still show
    all zooms and places. Source: McKay, Beckman, Conover, Latin hypercube sampling (Technometrics, 1979)."""
    order = rng.permuted(np.tile(np.arange(views), (3, 1)), axis=1).T
    return (order + rng.random((views, 3))) / max(views, 1)


def _view(whole: _View, zoom_share: float, left_share: float, top_share: float) -> _View:
    """A part of `whole`, enlarged to its size; shares from 0 to 1 of the zoom and of the room that it gives."""
    width, height = whole.picture.size
    zoom = 1 + (LARGEST_ZOOM - 1) * zoom_share
    left, top = left_share * (zoom - 1) * width, top_share * (zoom - 1) * height
    box = (left / zoom, top / zoom, (left + width) / zoom, (top + height) / zoom)

    def cut(image: Image.Image) -> Image.Image:
        return image.resize((width, height), Image.Resampling.LANCZOS, box=box)

    original_height, original_width, crop_top, crop_left = whole.framing
    return _View(
        picture=cut(whole.picture),
        mask=cut(whole.mask) if whole.mask else None,
        framing=(original_height, original_width, crop_top * zoom + top, crop_left * zoom + left),
        covered_width=whole.covered_width * zoom,
    )


def _mirrored(view: _View) -> _View:
    original_height, original_width, crop_top, crop_left = view.framing
    from_right = max(view.covered_width - crop_left - view.picture.width, 0)
    return replace(
        view,
        picture=ImageOps.mirror(view.picture),
        mask=ImageOps.mirror(view.mask) if view.mask else None,
        framing=(original_height, original_width, crop_top, from_right),
    )


def _encode(views: list[_View], components: Components, generator: torch.Generator) -> Iterator[Tensor]:
    """The latents [4, h, w] of each view, all of one size, as many at once as `PIXELS_AT_ONCE` allows."""
    width, height = views[0].picture.size
    at_once = max(PIXELS_AT_ONCE // (width * height), 1)
    for start in range(0, len(views), at_once):
        stacked = np.stack([np.array(view.picture) for view in views[start : start + at_once]])
        pixels = torch.from_numpy(stacked).to(components.device).permute(0, 3, 1, 2) / 127.5 - 1
        posterior = components.vae.encode(pixels.to(components.vae.dtype)).latent_dist  # type: ignore[union-attr]
        yield from (posterior.sample(generator) * components.vae.config["scaling_factor"]).float()


def _latent_mask(mask: Image.Image | None, latents: Tensor) -> Tensor:
    """The mask [1, h, w] at the latents' size, each latent pixel the mean of its area; all ones without one."""
    height, width = latents.shape[-2:]
    if mask is None:
        return torch.ones(1, height, width, device=latents.device)
    small = mask.resize((width, height), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small, dtype=np.float32) / 255)[None].to(latents.device)


def _token_ids(caption: str, name: str, components: Components) -> tuple[Tensor, Tensor]:
    ids = []
    for tokenizer in components.tokenizers:
        whole = tokenizer(caption).input_ids
        if len(whole) > tokenizer.model_max_length:
            log.warning(
                "The caption of %s is cut after %d tokens: %r", name, tokenizer.model_max_length, caption
            )
        fitted = tokenizer(
            caption,
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )
        ids.append(fitted.input_ids[0].to(components.device))
    return ids[0], ids[1]
