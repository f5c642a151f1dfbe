"""A fine-tune on disk: `unet.safetensors` or `lora.safetensors`, `embeddings.pti`, `special_params.json`.

The only place that writes or reads the format; knows nothing of training or pipelines.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dataset_and_utils import TokenMap, write_embeddings
from sdxl.archives import Limits, pack_tar, unpack
from sdxl.errors import WeightsError
from sdxl.training import TrainedModel

UNET, LORA = "unet.safetensors", "lora.safetensors"
EMBEDDINGS, TOKENS, RECORD = "embeddings.pti", "special_params.json", "training.json"

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """A fine-tune's files, checked: exactly one of `unet` and `lora` is a path, unless it is embeddings alone."""

    unet: Path | None
    lora: Path | None
    embeddings: Path | None
    token_map: TokenMap


def write(model: TrainedModel, folder: Path, record: Mapping[str, Any]) -> dict[str, Path]:
    """Write `model` and the run's `record` into `folder`; return name → file."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / (LORA if model.kind == "lora" else UNET)
    save_file(model.weights, weights, metadata={"format": "pt"})
    write_embeddings(folder / EMBEDDINGS, model.token_rows)
    model.token_map.write(folder / TOKENS)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return {path.name: path for path in (weights, folder / EMBEDDINGS, folder / TOKENS, folder / RECORD)}


def write_atomically(model: TrainedModel, folder: Path, record: Mapping[str, Any]) -> None:
    """`write`, but `folder` appears only when it is complete; one that is there already stays."""
    if folder.exists():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    write(model, partial, record)
    partial.replace(folder)


def pack(folder: Path, target: Path) -> None:
    """Pack everything under `folder` into the tar `target`, atomically."""
    pack_tar({str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}, target)


def read(source: Path, folder: Path) -> FineTune:
    """Open the fine-tune `source`, a folder or an archive, which is unpacked into `folder`.

    Raises:
        ArchiveError: the archive cannot be unpacked.
        WeightsError: the files are not a fine-tune.
        ContractError: special_params.json is malformed.
    """
    if not source.is_dir():
        unpack(source, folder, limits=Limits(files=1000, total_bytes=32 << 30))
        source = folder
    roots = [source, *sorted(path for path in source.iterdir() if path.is_dir())]
    root = next(
        (path for path in roots if any((path / name).is_file() for name in (UNET, LORA, EMBEDDINGS))), None
    )
    if root is None:
        raise WeightsError(
            f"{source.name} holds neither {UNET} nor {LORA} nor {EMBEDDINGS}: give the trained_model.tar of a training."
        )
    found = {name: root / name for name in (UNET, LORA, EMBEDDINGS) if (root / name).is_file()}
    for path in found.values():
        _check(path)
    if UNET in found and LORA in found:
        raise WeightsError(f"{source.name} holds both {UNET} and {LORA}: keep the one that you trained.")
    token_map = TokenMap.read(root / TOKENS) if (root / TOKENS).is_file() else TokenMap({})
    return FineTune(
        unet=found.get(UNET), lora=found.get(LORA), embeddings=found.get(EMBEDDINGS), token_map=token_map
    )


def _check(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            empty = not file.keys()
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path.name} is damaged or no safetensors file: download it again.") from error
    if empty:
        raise WeightsError(f"{path.name} holds no tensors: take it from a finished training.")


def run_record(config: Mapping[str, Any], dataset: Path) -> dict[str, Any]:
    """What is needed to reproduce a run: its settings, the data set's digest, the versions and the machine."""
    return {
        "format": "sdxl-fine-tune/1",
        "pooled_at": "eos",
        "settings": dict(config),
        "dataset_sha256": digest(dataset),
        "dataset_files": len(list(dataset.iterdir())),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU",
    }


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the files directly in `folder`, in the names' order."""
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        whole.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
