"""Files of weights as people give them, most of them something else, and the right outcome of each.

One LoRA of the miniature base is written in every form. All files are made anew in every run.
"""

import functools
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from tests.conftest import TINY_BASE
from tests.field.requests import Write, content, photo

RANK = 4


@dataclass(frozen=True, kw_only=True)
class WeightCase:
    """One file, and whether it is the LoRA."""

    name: str
    write: Write
    says: str = ""
    """Part of the error; empty for a file that must draw exactly like the plain LoRA."""


@functools.cache
def _matrices() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer of the UNet → matrices that change it clearly."""
    generator = torch.Generator().manual_seed(0)
    file = next((TINY_BASE / "unet").glob("*.safetensors"))
    with safe_open(file, "pt") as opened:
        keys = opened.keys()
        shapes = {
            key.removesuffix(".weight"): opened.get_slice(key).get_shape()
            for key in keys
            if key.endswith(("attn1.to_q.weight", "attn2.to_v.weight", "to_out.0.weight"))
        }
    return {
        name: (
            torch.randn(RANK, columns, generator=generator) * 0.3,
            torch.randn(rows, RANK, generator=generator) * 0.3,
        )
        for name, (rows, columns) in sorted(shapes.items())
    }


def lora(strength: float = 0.5, config: Mapping[str, Any] | None = None) -> bytes:
    """The LoRA in diffusers' form. The strength is in its matrices, or else in the `config` of peft."""
    tensors = {}
    for name, (down, up) in _matrices().items():
        tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up * strength}
    packed = {f"unet.{key}": value for key, value in (config or {}).items()}
    return save(tensors, {"lora_adapter_metadata": json.dumps(packed)} if config else None)


def kohya() -> bytes:
    """The LoRA in kohya's form, with alphas."""
    tensors = {}
    for name, (down, up) in _matrices().items():
        key = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(RANK / 2)
    return save(tensors)


def of_peft() -> dict[str, bytes]:
    """The LoRA as peft saves it: its strength is in a file of its own."""
    tensors = {}
    for name, (down, up) in _matrices().items():
        key = f"base_model.model.{name}"
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK / 2}
    return {"adapter_model.safetensors": save(tensors), "adapter_config.json": json.dumps(config).encode()}


def of_sd15() -> bytes:
    """A LoRA of SD 1.5, whose layers have other names, and texts of another width."""
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    return save(
        {f"{key}.lora_down.weight": torch.zeros(4, 768), f"{key}.lora_up.weight": torch.zeros(320, 4)}
    )


def by_pattern(patterns: Mapping[str, float], **others: Any) -> bytes:
    """The LoRA at full strength, which a pattern of alphas halves."""
    return lora(1.0, {"r": RANK, "lora_alpha": RANK, "alpha_pattern": patterns, **others})


def pickled(**options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save({"unet.x.lora_A.weight": torch.zeros(4, 4)}, buffer, **options)
    return buffer.getvalue()


def zipped(files: Mapping[str, bytes]) -> bytes:
    """A zip of these files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def picture() -> bytes:
    """A photograph."""
    buffer = io.BytesIO()
    photo().save(buffer, "PNG")
    return buffer.getvalue()


def folder(files: Mapping[str, bytes]) -> Write:
    """A folder of these files."""

    def write(parent: Path) -> Path:
        made = parent / "given"
        made.mkdir()
        for name, data in files.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_bytes(data)
        return made

    return write


PAGE = b"<!DOCTYPE html>\n<html><body>Log in</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
HALF = RANK / 2

_RIGHT: dict[str, Callable[[], Write]] = {
    "another_name": lambda: content(lora(), "lora.zip"),
    "named_bin": lambda: content(lora(), "pytorch_lora_weights.bin"),
    "in_a_zip": lambda: content(zipped({"my lora/style.safetensors": lora()}), "style.zip"),
    "beside_a_pickle": lambda: folder({"a.safetensors": lora(), "optimizer.bin": pickled()}),
    "kohya": lambda: content(kohya(), "kohya.safetensors"),
    "two_forms": lambda: folder({"pytorch_lora_weights.safetensors": lora(), "my_run.safetensors": kohya()}),
    "two_folders_deep": lambda: content(zipped({"a/b/style.safetensors": lora()}), "style.zip"),
    "earlier_steps": lambda: folder({"a.safetensors": lora(), "checkpoint-2/a.safetensors": lora(0.1)}),
    "peft_folder": lambda: folder(of_peft()),
    "peft_zip": lambda: content(
        zipped({f"out/{name}": data for name, data in of_peft().items()}), "peft.zip"
    ),
    "alpha": lambda: content(lora(1.0, {"r": RANK, "lora_alpha": HALF}), "a.safetensors"),
    "pattern": lambda: content(by_pattern({r".*attn\d\.to_(q|v|out\.0)": HALF}), "a.safetensors"),
    "pattern_without_prefix": lambda: content(by_pattern({r"to_\w+(\.0)?": HALF}), "a.safetensors"),
    "names": lambda: content(by_pattern(dict.fromkeys(_matrices(), HALF)), "a.safetensors"),
    "first_pattern_counts": lambda: content(
        by_pattern({"to_q|to_v": HALF, "to_out.0": HALF, "attn1.to_q": 9}), "a.safetensors"
    ),
}

_REFUSED: dict[str, tuple[Callable[[], Write], str]] = {
    "web_page": (lambda: content(PAGE, "style.safetensors"), "style.safetensors is a web page: the link needs a login"),
    "web_page_zip": (lambda: content(PAGE, "style.zip"), "style.zip is a web page"),
    "lfs_pointer": (lambda: content(POINTER, "style.safetensors"), "is a Git LFS pointer, not the file itself: download"),
    "lfs_pointer_in_zip": (lambda: content(zipped({"a.safetensors": POINTER}), "a.zip"), "a.safetensors is a Git LFS"),
    "web_page_in_folder": (lambda: folder({"a.safetensors": PAGE}), "a.safetensors is a web page"),
    "pickle": (lambda: content(pickled(), "style.pt"), "style.pt is a pickle, which can run code when it is loaded: convert"),
    "pickle_safetensors": (lambda: content(pickled(), "style.safetensors"), "style.safetensors is a pickle"),
    "pickle_zip": (lambda: content(pickled(), "style.zip"), "style.zip is a pickle"),
    "old_pickle": (lambda: content(pickled(_use_new_zipfile_serialization=False), "a.ckpt"), "a.ckpt is a pickle"),
    "pickle_in_zip": (
        lambda: content(zipped({"pytorch_lora_weights.bin": pickled()}), "a.zip"),
        "a.zip holds no .safetensors file, and pytorch_lora_weights.bin is a pickle",
    ),
    "pickle_in_folder": (lambda: folder({"style.pt": pickled()}), "given holds no .safetensors file, and style.pt is a pickle"),
    "cut": (lambda: content(lora()[:5000], "style.safetensors"), "style.safetensors is damaged, since it has only 5,000 of"),
    "cut_in_header": (lambda: content(lora()[:300], "style.safetensors"), "is damaged, since it has only 300 of"),
    "cut_in_zip": (lambda: content(zipped({"a.safetensors": lora()[:-1]}), "a.zip"), "a.safetensors is damaged, since"),
    "cut_zip": (lambda: content(zipped({"a.safetensors": lora()})[:-60], "a.zip"), "a.zip is an incomplete zip archive"),
    "damaged": (lambda: content(lora().replace(b"lora_A", b'lora"A', 1), "a.safetensors"), "a.safetensors is damaged: download"),
    "empty": (lambda: content(b"", "style.safetensors"), "style.safetensors is empty: download or copy it again."),
    "picture": (lambda: content(picture(), "style.safetensors"), "style.safetensors is a picture: give a .safetensors"),
    "json_error": (lambda: content(b'{"error": "no such file"}', "style.safetensors"), "is JSON text, such as a server's"),
    "rar": (lambda: content(b"Rar!\x1a\x07\x01\0" + bytes(99), "a.zip"), "a.zip is a rar archive"),
    "seven_zip": (lambda: content(b"7z\xbc\xaf\x27\x1c\0\4" + bytes(99), "a.zip"), "a.zip is a 7z archive"),
    "gguf": (lambda: content(b"GGUF\3\0\0\0" + bytes(99), "a.gguf"), "a.gguf is a file of weights: give a .safetensors"),
    "unmatched_pattern": (lambda: content(by_pattern({"conv_in": 1}), "a.safetensors"), "sets 'conv_in' in alpha_pattern"),
    "other_rank": (lambda: content(lora(1.0, {"r": 8, "lora_alpha": 4}), "a.safetensors"), "the rank 8 in its metadata, but"),
    "sd15": (lambda: content(of_sd15(), "a.safetensors"), "for no layer of this base (the file looks like SD 1.5): give a"),
    "vae": (
        lambda: content(save({"decoder.conv_in.weight": torch.zeros(4, 4)}), "vae.safetensors"),
        "vae.safetensors holds no UNet, LoRA or embeddings of SDXL (the file looks like an autoencoder (VAE)): give",
    ),
    "no_expression": (lambda: content(by_pattern({"to_(q": 1}), "a.safetensors"), "is no regular expression"),
}  # fmt: skip

WEIGHTS = [
    *(WeightCase(name=name, write=lambda folder, make=make: make()(folder)) for name, make in _RIGHT.items()),
    *(
        WeightCase(name=name, write=lambda folder, make=make: make()(folder), says=says)
        for name, (make, says) in _REFUSED.items()
    ),
]
