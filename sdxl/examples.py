"""Dataset folder → cached examples: everything that need not be done again in every step.

Knows the dataset folder and the frozen parts that encode it; does not know what trains.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from dataset_and_utils import Example, ExampleDataset, TokenMap, read_captions_csv
from sdxl.components import Components, add_placeholder_tokens
from sdxl.dataset_folder import FRAMING_COLUMNS

log = logging.getLogger(__name__)

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
    table = folder / "captions.csv"
    framings = pd.read_csv(table)[FRAMING_COLUMNS].to_numpy()
    generator = torch.Generator(components.device).manual_seed(seed)
    rng = np.random.default_rng(seed)
    examples = []
    captions = read_captions_csv(table)
    for (name, caption), framing in zip(
        tqdm(captions.items(), desc="Encoding pictures", unit="picture"), framings, strict=True
    ):
        whole = _open(folder / name, folder / name.replace(".src.png", ".mask.png"), framing)
        shown = [whole, *(_view(whole, rng) for _ in range(views))]
        shown += [_mirrored(view) for view in shown] if flip else []
        ids = _token_ids(token_map.substitute(caption), name, components)
        for view in shown:
            latents = _encode(view.picture, components, generator)
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
    """A picture as it is learnt: with its mask, and its original height and width, crop top and left in pixels."""

    picture: Image.Image
    mask: Image.Image | None
    framing: Sequence[float]


def _open(picture: Path, mask: Path, framing: Sequence[float]) -> _View:
    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    if not mask.is_file():
        return _View(picture=image, mask=None, framing=framing)
    with Image.open(mask) as opened:
        return _View(picture=image, mask=opened.convert("L"), framing=framing)


def _view(whole: _View, rng: np.random.Generator) -> _View:
    """A random part of `whole`, at its size."""
    width, height = whole.picture.size
    zoom = rng.uniform(1.0, LARGEST_ZOOM)
    left, top = (float(rng.uniform(0, (zoom - 1) * side)) for side in (width, height))
    box = (left / zoom, top / zoom, (left + width) / zoom, (top + height) / zoom)

    def cut(image: Image.Image) -> Image.Image:
        return image.resize((width, height), Image.Resampling.LANCZOS, box=box)

    original_height, original_width, crop_top, crop_left = whole.framing
    return _View(
        picture=cut(whole.picture),
        mask=cut(whole.mask) if whole.mask else None,
        framing=(original_height, original_width, crop_top * zoom + top, crop_left * zoom + left),
    )


def _mirrored(view: _View) -> _View:
    return _View(
        picture=ImageOps.mirror(view.picture),
        mask=ImageOps.mirror(view.mask) if view.mask else None,
        framing=view.framing,
    )


def _encode(picture: Image.Image, components: Components, generator: torch.Generator) -> Tensor:
    pixels = torch.from_numpy(np.array(picture)).to(components.device).permute(2, 0, 1)[None] / 127.5 - 1
    posterior = components.vae.encode(pixels.to(components.vae.dtype)).latent_dist  # type: ignore[union-attr]
    return (posterior.sample(generator) * components.vae.config["scaling_factor"])[0].float()


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
