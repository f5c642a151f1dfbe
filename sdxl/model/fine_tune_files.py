"""A fine-tune on disk: `unet.safetensors` or `lora.safetensors`, `embeddings.pti`, `special_params.json`.

The only module that writes and reads this format and recognises the files of other tools. Does not know training or
pipelines.
"""

import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dataset_and_utils import MOST_ROWS, TokenMap, read_embeddings, write_embeddings
from sdxl.errors import WeightsError
from sdxl.files.archives import Limits, in_place, pack_tar, unpack
from sdxl.files.file_kinds import describe_other_kind, looks_like_safetensors
from sdxl.files.weight_files import WeightFile
from sdxl.model.lora_formats import is_lora
from sdxl.workspace import CHECKPOINTS

UNET, LORA = "unet.safetensors", "lora.safetensors"
EMBEDDINGS, TOKENS, RECORD = "embeddings.pti", "special_params.json", "training.json"

LIMITS = Limits(files=1000, total_bytes=32 << 30)
"""Limits on the unpacked archive of a fine-tune."""
_LARGE, _MAX_IN_PLACE = 16 << 20, 16
"""Files in a tar above this size in bytes stay packed, unless there are more than this many."""
_WANTED = "a .safetensors file or the trained_model.tar of a training"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes under which other tools save weights as pickles."""
_LARGEST_RECORD = 1 << 20
"""Bytes of a training.json that is read."""
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True)
class TrainedFineTune:
    """A fine-tune in memory after training: tensors on the CPU, in the dtypes in which they are saved."""

    kind: str
    """"unet" or "lora"."""
    weights: dict[str, Tensor]
    """UNet parameter name → tensor, or `unet.….lora_A.weight` and `…lora_B.weight` → tensor."""
    token_rows: list[Tensor]
    """[tokens, dim] for each text encoder."""
    token_map: TokenMap


@dataclass(frozen=True, kw_only=True)
class FineTuneFiles:
    """A fine-tune on disk, checked: it has at least one file, and not both a UNet and a LoRA."""

    name: str
    """Its name in messages."""
    unet: WeightFile | None
    lora: WeightFile | None
    embeddings: Path | None
    """Token rows under the keys `text_encoders_0` and `text_encoders_1`."""
    clip_embeddings: tuple[WeightFile, ...] = ()
    """Embeddings of other tools: token rows under the keys `clip_l` and `clip_g`; the file name is the token."""
    token_map: TokenMap
    prediction_type: str | None = None
    """What its base predicts, "epsilon" or "v_prediction"; None if there is no record of that."""


def write(model: TrainedFineTune, folder: Path, record: Mapping[str, Any]) -> dict[str, Path]:
    """Write `model` and the run's `record` into `folder`; return file name → path."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / (LORA if model.kind == "lora" else UNET)
    save_file(model.weights, weights, metadata={"format": "pt"})
    write_embeddings(folder / EMBEDDINGS, model.token_rows)
    model.token_map.write(folder / TOKENS)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return {path.name: path for path in (weights, folder / EMBEDDINGS, folder / TOKENS, folder / RECORD)}


def write_atomically(model: TrainedFineTune, folder: Path, record: Mapping[str, Any]) -> None:
    """Call `write`, but create `folder` only when it is complete. Do nothing if it exists already."""
    if folder.exists():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        write(model, partial, record)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def pack(folder: Path, target: Path) -> None:
    """Pack everything under `folder` into the tar `target`, atomically."""
    pack_tar({str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}, target)


def is_checkpoint(path: Path) -> bool:
    """Whether a file in a fine-tune's archive belongs to an earlier training step. `read` ignores such files."""
    return path.parts[0] == CHECKPOINTS


def read(source: Path, folder: Path, *, name: str | None = None) -> FineTuneFiles:
    """Open the fine-tune `source`: a folder, a safetensors file, or an archive.

    Unpacks an archive into `folder`. Large files of an uncompressed tar stay in it, to be read directly from there.
    Recognises files of other tools by their content: LoRAs under any name, and embeddings for both text encoders.

    name: its name in messages; by default the file name.

    Raises:
        ArchiveError: the archive cannot be unpacked.
        WeightsError: the files are not a fine-tune.
        ContractError: special_params.json is malformed.
    """
    name = name or source.name

    # Unpack what is packed. A copy of a tar's large files would only cost time and disk space.
    still_packed: dict[Path, WeightFile] = {}
    if source.is_dir():
        folder = source
    elif is_safetensors(source, name=name):
        return _classify(name, [WeightFile(source, source.name)], TokenMap({}))
    else:
        still_packed = {
            path: WeightFile(source, path.name, start, size)
            for path, (start, size) in (in_place(source, limits=LIMITS) or {}).items()
            if path.suffix == ".safetensors" and size > _LARGE and not is_checkpoint(path)
        }
        if len(still_packed) > _MAX_IN_PLACE:
            still_packed = {}
        unpack(source, folder, limits=LIMITS, skip=lambda path: path in still_packed or is_checkpoint(path))

    # Take the first folder with weights or embeddings: the root, or a folder that the user packed.
    folders = [Path(), *(Path(path.name) for path in sorted(folder.iterdir()) if path.is_dir())]
    for root in dict.fromkeys([*folders, *sorted(path.parent for path in still_packed)]):
        files = {path.name: file for path, file in still_packed.items() if path.parent == root}
        for path in (folder / root).glob("*"):
            if path.is_file() and (path.suffix == ".safetensors" or path.name == EMBEDDINGS):
                files[path.name] = WeightFile(path, path.name)
        if files:
            tokens = folder / root / TOKENS
            token_map = TokenMap.read(tokens) if tokens.is_file() else TokenMap({})
            found = _classify(name, [files[key] for key in sorted(files)], token_map)
            return replace(found, prediction_type=_recorded_prediction(folder / root / RECORD))
    for path in sorted(folder.rglob("*")):
        if path.suffix in _PICKLES and (other := describe_other_kind(path, wanted=_WANTED)):
            raise WeightsError(f"{name} holds no .safetensors file, and {path.name} {other}")
    raise WeightsError(
        f"{name} holds neither {UNET} nor {LORA} nor {EMBEDDINGS}: give the trained_model.tar of a training."
    )


def _classify(name: str, files: list[WeightFile], token_map: TokenMap) -> FineTuneFiles:
    """Find each file's role in the fine-tune, by its name or its keys, and check that the roles fit together."""
    parts: dict[str, list[WeightFile]] = {"unet": [], "lora": [], "embeddings": [], "clip": []}
    for file in files:
        keys = file.keys
        if not keys:
            raise WeightsError(f"{file.name} holds no tensors: take it from a finished training.")
        if file.name == UNET or "conv_in.weight" in keys:
            parts["unet"].append(file)
        elif file.name == EMBEDDINGS or "text_encoders_0" in keys:
            if file.size is not None:
                raise WeightsError(
                    f"{file.name} is too large for token rows: take it from a finished training."
                )
            parts["embeddings"].append(file)
        elif {"clip_l", "clip_g"} <= keys:
            parts["clip"].append(file)
        elif file.name == LORA or is_lora(keys):
            parts["lora"].append(file)
    weights = parts["unet"] + parts["lora"]
    if len(weights) > 1:
        listed = " and ".join(sorted(file.name for file in weights))
        raise WeightsError(f"{name} holds {listed}: keep only the one that you trained.")
    if not weights and not parts["embeddings"] and not parts["clip"]:
        raise WeightsError(f"{name} holds no UNet, LoRA or embeddings of SDXL: give a fine-tune's file.")
    return FineTuneFiles(
        name=name,
        unet=next(iter(parts["unet"]), None),
        lora=next(iter(parts["lora"]), None),
        embeddings=next((file.path for file in parts["embeddings"]), None),
        clip_embeddings=tuple(parts["clip"]) if not parts["embeddings"] else (),
        token_map=token_map,
    )


def read_rows(fine_tune: FineTuneFiles) -> tuple[tuple[Tensor, ...], bool, TokenMap]:
    """Read a fine-tune's token rows, whether they were trained with pooling at the end of text, and its token map.

    The rows are one tensor [tokens, dim_i] for each text encoder i. Each embeddings file of another tool becomes one token
    with the file's name.

    Raises:
        ContractError: the embeddings are malformed.
        WeightsError: a text encoder has no rows, or the two have different numbers of rows.
    """
    if fine_tune.embeddings is not None:
        rows, at_eos = read_embeddings(fine_tune.embeddings)
        if len(rows) != 2:
            raise WeightsError(
                f"{fine_tune.embeddings.name} needs token rows for two text encoders: train again."
            )
        _check_count(len(rows[0]), fine_tune.embeddings.name)
        return tuple(rows), at_eos, fine_tune.token_map

    # Embeddings of other tools: number their rows across all files, as a token map does.
    pairs = []
    placeholders: dict[str, str] = {}
    count = 0
    for file in fine_tune.clip_embeddings:
        tensors = file.read()
        pair = [tensors[key] for key in ("clip_l", "clip_g")]
        pair = [rows[None] if rows.ndim == 1 else rows for rows in pair]
        if any(rows.ndim != 2 or len(rows) != len(pair[0]) or not len(rows) for rows in pair):
            raise WeightsError(
                f"{file.name} must hold equally many rows for clip_l and clip_g: download it again."
            )
        _check_count(count + len(pair[0]), file.name)
        placeholders[Path(file.name).stem] = "".join(f"<s{count + row}>" for row in range(len(pair[0])))
        count += len(pair[0])
        pairs.append(pair)
    if not pairs:
        return (), True, fine_tune.token_map
    token_map = TokenMap({**placeholders, **fine_tune.token_map.placeholders})
    return tuple(torch.cat([pair[i] for pair in pairs]) for i in range(2)), True, token_map


def _recorded_prediction(record: Path) -> str | None:
    """`prediction_type` in the record of a training; None without a usable record."""
    try:
        if record.stat().st_size > _LARGEST_RECORD:
            return None
        said = json.loads(record.read_text())["prediction_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return said if said in ("epsilon", "v_prediction") else None


def _check_count(rows: int, name: str) -> None:
    if rows > MOST_ROWS:
        raise WeightsError(
            f"{name} makes more than {MOST_ROWS} token rows in all: give embeddings of fewer tokens."
        )


def is_safetensors(path: Path, *, name: str | None = None) -> bool:
    """Whether the file's content is safetensors, under any name; else it may be an archive.

    name: its name in messages; by default the file name.

    Raises:
        WeightsError: it cannot be read, is damaged safetensors, or is known to be of another kind.
    """
    name = name or path.name
    try:
        with path.open("rb") as file:
            begins_so = looks_like_safetensors(file.read(9))
    except OSError as error:
        raise WeightsError(
            f"{name} cannot be read ({error.strerror}): check the file and its permissions."
        ) from error
    if begins_so:
        _ = WeightFile(path, name).keys  # checks the header
    elif other := describe_other_kind(path, wanted=_WANTED):
        raise WeightsError(f"{name} {other}")
    return begins_so


def is_read_in_place(source: Path) -> bool:
    """Whether `read` takes the large files directly from `source`, without unpacking them.

    Raises:
        WeightsError: like `is_safetensors`.
    """
    return is_safetensors(source) or in_place(source, limits=LIMITS) is not None


def run_record(config: Mapping[str, Any], dataset: Path, base: Mapping[str, Any]) -> dict[str, Any]:
    """The record for reproducing a run: its settings, the dataset folder's digest, the versions and the device.

    base: the facts about the base, among them `prediction_type`, which `read` finds in the record.
    """
    return {
        "format": "sdxl-fine-tune/1",
        "pooled_at": "eos",
        **base,
        "settings": dict(config),
        "dataset_sha256": digest(dataset),
        "dataset_files": len(list(dataset.iterdir())),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU",
    }


def digest(folder: Path) -> str:
    """SHA-256 of the names and contents of the files directly in `folder`, sorted by name."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
