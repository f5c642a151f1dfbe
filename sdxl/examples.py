"""Dataset folder → cached examples: everything that need not be done again in every step.

Knows the dataset folder and the frozen parts that encode it; does not know what trains.
"""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dataset_and_utils import Example, ExampleDataset, TokenMap, read_captions_csv
from sdxl.components import Components, add_placeholder_tokens

log = logging.getLogger(__name__)

_FRAMING_COLUMNS = ["original_height", "original_width", "crop_top", "crop_left"]


@torch.no_grad()
def cache_examples(folder: Path, components: Components, token_map: TokenMap, *, seed: int) -> ExampleDataset:
    """Encode the pictures and captions of a dataset folder; the tokenizers learn the map's placeholder tokens.

    Pictures become one sample each of the autoencoder's posterior, scaled by its `scaling_factor`.
    """
    add_placeholder_tokens(components, token_map)
    table = folder / "captions.csv"
    framings = pd.read_csv(table)[_FRAMING_COLUMNS].to_numpy()
    generator = torch.Generator(components.device).manual_seed(seed)
    examples = []
    captions = read_captions_csv(table)
    for (name, caption), framing in zip(
        tqdm(captions.items(), desc="Encoding pictures", unit="picture"), framings, strict=True
    ):
        with Image.open(folder / name) as opened:
            picture = opened.convert("RGB")
        latents = _encode(picture, components, generator)
        examples.append(
            Example(
                latents=latents,
                mask=_latent_mask(folder / name.replace(".src.png", ".mask.png"), latents),
                token_ids=_token_ids(token_map.substitute(caption), name, components),
                time_ids=torch.tensor(
                    [*framing, picture.height, picture.width], dtype=torch.float32, device=components.device
                ),
            )
        )
    return ExampleDataset(examples)


def _encode(picture: Image.Image, components: Components, generator: torch.Generator) -> Tensor:
    pixels = torch.from_numpy(np.array(picture)).to(components.device).permute(2, 0, 1)[None] / 127.5 - 1
    posterior = components.vae.encode(pixels.to(components.vae.dtype)).latent_dist  # type: ignore[union-attr]
    return (posterior.sample(generator) * components.vae.config["scaling_factor"])[0].float()


def _latent_mask(path: Path, latents: Tensor) -> Tensor:
    """The mask [1, h, w] at the latents' size, each latent pixel the mean of its area; all ones without a file."""
    height, width = latents.shape[-2:]
    if not path.is_file():
        return torch.ones(1, height, width, device=latents.device)
    with Image.open(path) as opened:
        small = opened.convert("L").resize((width, height), Image.Resampling.BOX)
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
