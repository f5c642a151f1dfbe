"""A fine-tune on disk: `unet.safetensors`, `difference.safetensors` or `lora.safetensors`; `embeddings.pti`,
`special_params.json`.

The only module that writes and opens this format. Does not know which files of others are a fine-tune
(fine_tune_choice.py), training or pipelines.
"""

import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dataset_and_utils import TokenMap, write_embeddings
from sdxl.errors import WeightsError
from sdxl.files.archives import Limits, in_place, pack_tar, unpack
from sdxl.files.file_kinds import describe_other_kind, looks_like_safetensors
from sdxl.files.weight_files import WeightFile
from sdxl.model.fine_tune_choice import (
    DIFFERENCE,
    EMBEDDINGS,
    LORA,
    UNET,
    WEB_UI,
    Chosen,
    belongs,
    choose,
)
from sdxl.model.token_files import read_rows
from sdxl.workspace import CHECKPOINTS, EVENTS, PREVIEWS, REPORT

__all__ = ["DIFFERENCE", "EMBEDDINGS", "LORA", "RECORD", "TOKENS", "UNET", "WEB_UI", "read_rows"]

TOKENS, RECORD = "special_params.json", "training.json"
_PEFT_CONFIG = "adapter_config.json"

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
    """"unet", "difference" or "lora"."""
    weights: dict[str, Tensor]
    """UNet parameter name → tensor, the tensors of a difference (differences.py), or `unet.….lora_A.weight` and `…lora_B.weight` → tensor, also for `text_encoder.…` and
    `text_encoder_2.…`."""
    token_rows: list[Tensor]
    """[tokens, dim] for each text encoder."""
    token_map: TokenMap
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    """That of the file of weights."""


@dataclass(frozen=True, kw_only=True)
class FineTuneFiles:
    """A fine-tune on disk, checked: it has at least one file, and only one of a UNet, a difference and a LoRA."""

    name: str
    """Its name in messages."""
    whole: tuple[tuple[str, WeightFile], ...] = ()
    """Files of whole weights, each with the part that its names belong to: "unet", "text_encoder" or "text_encoder_2".
    In a single-file checkpoint the names say it themselves."""
    difference: WeightFile | None = None
    """A whole fine-tune's difference from its base."""
    lora: WeightFile | None = None
    lora_config: Path | None = None
    """peft's configuration of the LoRA, if it is in a file of its own."""
    embeddings: Path | None = None
    """Token rows under the keys `text_encoders_0` and `text_encoders_1`."""
    token_files: tuple[WeightFile, ...] = ()
    """Embeddings of other tools (token_files.py)."""
    token_map: TokenMap
    prediction_type: str | None = None
    """What its base predicts, "epsilon" or "v_prediction"; None if there is no record of that."""


def write(model: TrainedFineTune, folder: Path, record: Mapping[str, Any]) -> dict[str, Path]:
    """Write `model` and the run's `record` into `folder`; return file name → path."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / {"unet": UNET, "difference": DIFFERENCE, "lora": LORA}[model.kind]
    save_file(model.weights, weights, metadata=dict(model.metadata))
    write_embeddings(folder / EMBEDDINGS, model.token_rows)
    model.token_map.write(folder / TOKENS)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return {path.name: path for path in (weights, folder / EMBEDDINGS, folder / TOKENS, folder / RECORD)}


def keeper(
    folder: Path,
    record: Mapping[str, Any],
    in_form: Callable[[TrainedFineTune], TrainedFineTune] = lambda model: model,
) -> Callable[[int, TrainedFineTune], None]:
    """A function `keep(step, model)` that writes the fine-tune of a moment into a folder of its own in `folder`.

    in_form: brings a fine-tune into the form in which it is written.
    """

    def keep(step: int, model: TrainedFineTune) -> None:
        write_atomically(in_form(model), folder / f"step-{step:06d}", record)

    return keep


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


def is_left_out(path: Path) -> bool:
    """Whether `read` ignores a file in a fine-tune's archive: it is of an earlier training step, or for people or other
    programs."""
    return path.parts[0] in (CHECKPOINTS, WEB_UI, PREVIEWS, EVENTS, REPORT)


def read(source: Path, folder: Path, *, name: str | None = None) -> FineTuneFiles:
    """Open the fine-tune `source`: a folder, a safetensors file, or an archive.

    Unpacks an archive into `folder`. Large files of an uncompressed tar stay in it, to be read directly from there.
    Recognises files of other tools by their content, under any name (fine_tune_choice.py).

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
        chosen = choose(name, {Path(source.name): WeightFile(source, source.name)})
        return replace(_opened(name, chosen, source.parent), token_map=TokenMap({}))
    else:
        still_packed = {
            path: WeightFile(source, path.name, start, size)
            for path, (start, size) in (in_place(source, limits=LIMITS) or {}).items()
            if path.suffix == ".safetensors" and size > _LARGE and not is_left_out(path)
        }
        if len(still_packed) > _MAX_IN_PLACE:
            still_packed = {}
        unpack(source, folder, limits=LIMITS, skip=lambda path: path in still_packed or is_left_out(path))

    files = {path: file for path, file in still_packed.items() if belongs(path)}
    for path in folder.rglob("*"):
        if belongs(relative := path.relative_to(folder)) and path.is_file():
            files[relative] = WeightFile(path, path.name)
    if files:
        return _opened(name, choose(name, files), folder)
    for path in sorted(folder.rglob("*")):
        if path.suffix in _PICKLES and (other := describe_other_kind(path, wanted=_WANTED)):
            raise WeightsError(f"{name} holds no .safetensors file, and {path.name} {other}")
    raise WeightsError(
        f"{name} holds neither {UNET} nor {LORA} nor {EMBEDDINGS}: give the trained_model.tar of a training."
    )


def _opened(name: str, chosen: Chosen, folder: Path) -> FineTuneFiles:
    """Add the JSON files that lie beside the chosen ones in `folder`."""
    tokens, config = folder / chosen.root / TOKENS, folder / chosen.root / _PEFT_CONFIG
    return FineTuneFiles(
        name=name,
        whole=chosen.whole,
        difference=chosen.difference,
        lora=chosen.lora,
        lora_config=config if chosen.lora is not None and config.is_file() else None,
        embeddings=None if chosen.embeddings is None else chosen.embeddings.path,
        token_files=chosen.token_files,
        token_map=TokenMap.read(tokens) if tokens.is_file() else TokenMap({}),
        prediction_type=_recorded_prediction(folder / chosen.root),
    )


def read_record(folder: Path) -> dict[str, Any]:
    """The record of the training whose files are in `folder`; empty if there is none that can be read."""
    path = folder / RECORD
    try:
        if path.stat().st_size > _LARGEST_RECORD:
            return {}
        record = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _recorded_prediction(folder: Path) -> str | None:
    said = read_record(folder).get("prediction_type")
    return said if said in ("epsilon", "v_prediction") else None


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
