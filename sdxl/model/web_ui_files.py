"""Write LoRAs and token rows as ComfyUI, AUTOMATIC1111's web UI, Forge, InvokeAI and kohya's scripts read them.

All of them know the names that kohya's scripts give to layers: `lora_unet_` with the names of LDM (`ldm_names.py`), `lora_te1_`
and `lora_te2_`. Names with diffusers' block numbers lose layers in some. Knows these files; does not know how a LoRA came
about.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset_and_utils import TokenMap
from sdxl.files.weight_writing import write_weights
from sdxl.model.ldm_names import unet_names
from sdxl.model.low_rank import LoraMatrices
from sdxl.model.web_ui_metadata import About, embedding_metadata, lora_metadata

NAMELESS = "TOK"
"""The word for rows of a fine-tune without a token map."""
_LONGEST_STEM = 50
_RESERVED = re.compile(r"con|prn|aux|nul|com\d|lpt\d", re.IGNORECASE)
"""Names that no file may have on Windows."""
_ROW = re.compile(r"<s(\d+)>")

Rows = tuple[Tensor, Tensor]
"""Token rows of one word for each text encoder: [rows, dim_i]."""


# Names --------------------------------------------------------------------------------------------------------------


def layer_names(layers: Iterable[str], unet_config: Mapping[str, Any] | None) -> dict[str, str]:
    """Layer, such as "unet.down_blocks.1.attentions.0.proj_in" → its name in a kohya file,
    "lora_unet_input_blocks_4_1_proj_in".

    unet_config: the UNet's configuration in diffusers. None: keep diffusers' block numbers, as OneTrainer writes them.
    """
    layers = list(layers)
    of_unet = [layer.removeprefix("unet.") for layer in layers if layer.startswith("unet.")]
    unet = dict.fromkeys(of_unet) if unet_config is None else unet_names(of_unet, unet_config)
    found = {}
    for layer in layers:
        part, _, name = layer.partition(".")
        if part == "unet":
            flat = "lora_unet_" + (unet[name] or name)
        else:
            name = name.removeprefix("text_model.")
            inner = name if name == "text_projection" else f"text_model.{name}"
            flat = f"lora_te{'2' if part == 'text_encoder_2' else '1'}_{inner}"
        found[layer] = flat.replace(".", "_")
    return found


def file_stems(words: Iterable[str]) -> dict[str, str]:
    """Word of a token map → a name for its file, which is the word itself if that is safe on every system.

    A word may come from a stranger and hold anything that can be printed, such as "../x". Names consist of letters, digits,
    underscores and hyphens, and differ in more than upper and lower case. Programs that bundle embeddings split keys at dots.
    """
    stems: dict[str, str] = {}
    taken: set[str] = set()
    for word in words:
        stem = re.sub(r"[^\w-]+", "_", unicodedata.normalize("NFKC", word))[:_LONGEST_STEM]
        stem = re.sub(r"^\W+", "", stem) or "token"
        if _RESERVED.fullmatch(stem):
            stem += "_"
        stems[word] = _free(stem, taken)
    return stems


def _free(stem: str, taken: set[str]) -> str:
    """`stem`, with a number if a file of that name is taken; it is taken from now on."""
    name, number = stem, 1
    while name.casefold() in taken:
        number += 1
        name = f"{stem}_{number}"
    taken.add(name.casefold())
    return name


def weights_stem(words: Sequence[str], kind: str) -> str:
    """The name of the file with the weights, such as "TOK_lora". No embedding has it.

    kind: "lora" or "checkpoint".
    """
    stems = list(file_stems(words).values())
    taken = {stem.casefold() for stem in stems}
    return _free("_".join([*stems, kind]) if len("".join(stems)) <= _LONGEST_STEM else kind, taken)


# Token rows -----------------------------------------------------------------------------------------------------------


def rows_by_word(rows: Sequence[Tensor], token_map: TokenMap) -> dict[str, Rows]:
    """Each word's own rows. Words without rows are left out; rows without any word are those of `NAMELESS`.

    rows: [tokens, dim_i] for each text encoder i, numbered as in the map; empty if there are none.
    """
    if not rows:
        return {}
    first, second = rows
    found = {}
    for word, text in token_map.placeholders.items():
        ids = [int(number) for number in _ROW.findall(text)]
        if ids and max(ids) < len(first):
            found[word] = (first[ids].contiguous(), second[ids].contiguous())
    return found or {NAMELESS: (first.contiguous(), second.contiguous())}


def write_embeddings(folder: Path, words: Mapping[str, Rows], about: About) -> list[Path]:
    """Write one file for each word, named after it, with its rows as `clip_l` and `clip_g`."""
    written = []
    for word, stem in file_stems(words).items():
        first, second = words[word]
        written.append(folder / f"{stem}.safetensors")
        write_weights(written[-1], {"clip_l": first, "clip_g": second}, embedding_metadata(about, word))
    return written


# LoRA -----------------------------------------------------------------------------------------------------------------


def write_lora(
    folder: Path,
    layers: Mapping[str, LoraMatrices],
    words: Mapping[str, Rows],
    unet_config: Mapping[str, Any] | None,
    about: About,
) -> Path:
    """Write a kohya file with all layers, and with each word's rows as a bundled embedding.

    layers: layer, such as "unet.mid_block.attentions.0.proj_in" → its change.
    unet_config: see `layer_names`.
    """
    path = folder / f"{weights_stem(list(words), 'lora')}.safetensors"
    metadata = lora_metadata(
        about,
        ranks=[layer.rank for layer in layers.values()],
        alphas=[layer.alpha for layer in layers.values()],
        dora=any(layer.magnitude is not None for layer in layers.values()),
    )
    write_weights(path, _lora_tensors(layers, unet_config) | _bundled(words), metadata)
    return path


def _lora_tensors(
    layers: Mapping[str, LoraMatrices], unet_config: Mapping[str, Any] | None
) -> dict[str, Tensor]:
    tensors = {}
    for layer, name in layer_names(layers, unet_config).items():
        change = layers[layer]
        tensors |= {
            f"{name}.alpha": torch.tensor(change.alpha),
            f"{name}.lora_down.weight": change.down,
            f"{name}.lora_up.weight": change.up,
        }
        if change.magnitude is not None:
            # One number for each output, as LyCORIS with `wd_on_output`: the first side of the shape says so to readers.
            sides = [1] * (change.down.ndim - 1)
            tensors[f"{name}.dora_scale"] = change.magnitude.reshape(-1, *sides)
    return tensors


def _bundled(words: Mapping[str, Rows]) -> dict[str, Tensor]:
    return {
        f"bundle_emb.{stem}.{key}": rows
        for word, stem in file_stems(words).items()
        for key, rows in zip(("clip_l", "clip_g"), words[word], strict=True)
    }
