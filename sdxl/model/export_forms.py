"""The forms in which a fine-tune can be written, and what each cannot hold.

Knows the layout of each form; does not know how fine-tunes are read or merged.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset_and_utils import TokenMap, write_embeddings
from sdxl.files.weight_writing import write_weights
from sdxl.model import web_ui_files
from sdxl.model.fine_tune_files import EMBEDDINGS, LORA, RECORD, TOKENS, UNET, WEB_UI
from sdxl.model.layer_names import diffusers_key
from sdxl.model.low_rank import LoraMatrices
from sdxl.model.single_file import write_checkpoint
from sdxl.model.web_ui_metadata import About

DORA_ELSEWHERE = (
    "DoRA means other things elsewhere: ComfyUI and new Forge come near, AUTOMATIC1111 and InvokeAI draw noise; for them write "
    "--to kohya with --rank 128, which makes a plain LoRA."
)
DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for a LoRA."""


@dataclass(frozen=True, kw_only=True)
class LoadedBase:
    """The base to which a fine-tune belongs."""

    folder: Path
    """In diffusers' layout."""
    vae: Path
    """Folder of the autoencoder."""
    parameters: Mapping[str, Tensor]
    """Parameter, such as "unet.conv_in.weight" → its value."""
    layers: Sequence[str]
    """The names of all linear layers and convolutions."""
    unet_config: Mapping[str, Any]
    """The UNet's configuration in diffusers."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A fine-tune in memory, ready to be written: a whole SDXL or a LoRA."""

    whole: Mapping[str, Tensor]
    """The parameters that differ from the base's; empty for a LoRA."""
    lora: Mapping[str, LoraMatrices]
    """Layer → its change."""
    rows: Sequence[Tensor]
    """Token rows [tokens, dim_i] for each text encoder; empty if there are none."""
    pooled_at_eos: bool
    """Whether they were trained with prompts pooled at the end of the text."""
    token_map: TokenMap
    about: About

    @property
    def words(self) -> dict[str, web_ui_files.Rows]:
        """The rows of each word."""
        return web_ui_files.rows_by_word(self.rows, self.token_map)


def ours(folder: Path, exported: Exported, base: LoadedBase) -> list[str]:
    """What a training writes: the files of `trained_model.tar`, with those for web UIs."""
    lost = []
    if exported.whole:
        half = {name: value.to("cpu", torch.float16) for name, value in _unet(exported, base).items()}
        write_weights(folder / UNET, half, {"format": "pt"})
        lost += _lost_encoders(exported, UNET)
    elif exported.lora:
        write_weights(folder / LORA, peft_tensors(exported.lora), {"format": "pt"})
    _write_tokens(folder, exported)
    (folder / RECORD).write_text(json.dumps(dict(exported.about.record), indent=2) + "\n")
    _write_kohya(folder / WEB_UI, exported, base.unet_config)
    return lost


def diffusers(folder: Path, exported: Exported, base: LoadedBase) -> list[str]:
    """A LoRA as diffusers saves it, and the token rows for both ways to load them."""
    if exported.lora:
        write_weights(folder / DIFFUSERS_LORA, peft_tensors(exported.lora), {"format": "pt"})
    _write_tokens(folder, exported)
    web_ui_files.write_embeddings(folder, exported.words, exported.about)
    return []


def kohya(folder: Path, exported: Exported, base: LoadedBase) -> list[str]:
    """A LoRA for web UIs, and one file of token rows for each word."""
    return _write_kohya(folder, exported, base.unet_config)


def onetrainer(folder: Path, exported: Exported, base: LoadedBase) -> list[str]:
    """The same with the names that OneTrainer reads: diffusers' block numbers."""
    return _write_kohya(folder, exported, None)


def _write_kohya(folder: Path, exported: Exported, unet_config: Mapping[str, Any] | None) -> list[str]:
    folder.mkdir(exist_ok=True)
    if exported.lora:
        web_ui_files.write_lora(folder, exported.lora, exported.words, unet_config, exported.about)
    web_ui_files.write_embeddings(folder, exported.words, exported.about)
    is_dora = any(change.magnitude is not None for change in exported.lora.values())
    return _lost_for_web_uis(exported) + ([DORA_ELSEWHERE] if is_dora else [])


def single_file(folder: Path, exported: Exported, base: LoadedBase) -> list[str]:
    """A whole SDXL in one file, and one file of token rows for each word."""
    words = exported.words
    path = folder / f"{web_ui_files.weights_stem(list(words), 'checkpoint')}.safetensors"
    encoders = {name: value for name, value in exported.whole.items() if not name.startswith("unet.")}
    write_checkpoint(
        path,
        _unet(exported, base),
        base.unet_config,
        base.folder,
        exported.about,
        vae=base.vae,
        encoders=encoders,
    )
    web_ui_files.write_embeddings(folder, words, exported.about)
    return _lost_for_web_uis(exported)


FORMS: dict[str, Callable[[Path, Exported, LoadedBase], list[str]]] = {
    "ours": ours,
    "diffusers": diffusers,
    "kohya": kohya,
    "onetrainer": onetrainer,
    "single_file": single_file,
    "lora": ours,
}
"""Public name of a form → what writes it into a folder and returns a sentence for each thing that it lost."""
ONLY_LORA = ("diffusers", "kohya", "onetrainer", "lora")
"""Forms that hold a LoRA only."""


def peft_tensors(layers: Mapping[str, LoraMatrices]) -> dict[str, Tensor]:
    """A LoRA as peft and diffusers name it. These files have no alpha, so it is multiplied into the second matrix."""
    tensors = {}
    for layer, own in layers.items():
        change = own.folded()
        tensors[diffusers_key(f"{layer}.lora_A.weight")] = change.down
        tensors[diffusers_key(f"{layer}.lora_B.weight")] = change.up
        if change.magnitude is not None:
            sides = (1, -1, 1, 1) if change.down.ndim == 4 else (-1,)
            tensors[diffusers_key(f"{layer}.lora_magnitude_vector")] = change.magnitude.reshape(sides)
    return tensors


def _unet(exported: Exported, base: LoadedBase) -> dict[str, Tensor]:
    """Every parameter of the UNet, with diffusers' names."""
    own = {name: value for name, value in base.parameters.items() if name.startswith("unet.")}
    return {name.removeprefix("unet."): exported.whole.get(name, value) for name, value in own.items()}


def _write_tokens(folder: Path, exported: Exported) -> None:
    if exported.rows:
        write_embeddings(folder / EMBEDDINGS, exported.rows, pooled_at_eos=exported.pooled_at_eos)
        exported.token_map.write(folder / TOKENS)


def _lost_encoders(exported: Exported, file: str) -> list[str]:
    names = [name for name in exported.whole if not name.startswith("unet.")]
    if not names:
        return []
    return [f"{file} has no place for the text encoders: the changes of {len(names)} weights are left out."]


def _lost_for_web_uis(exported: Exported) -> list[str]:
    lost = [
        f'The word "{word}" is no safe file name: in other programs it is {stem}.'
        for word, stem in web_ui_files.file_stems(exported.words).items()
        if stem != word
    ]
    if exported.rows and not exported.pooled_at_eos:
        lost.append(
            "The token rows were trained with prompts pooled at the highest id, but other programs pool at the end of the "
            "text: pictures differ."
        )
    if len(exported.words) < len(exported.token_map.placeholders):
        lost.append("Words of the token map without token rows are left out.")
    return lost
