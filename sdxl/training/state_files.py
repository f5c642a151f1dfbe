"""A saved state on disk: a folder with `state.safetensors`, `state.json` and the record of its run, `training.json`.

It appears complete or not at all, also if the machine loses power. It may come from a stranger: everything in it is checked.
Knows these files; does not know what the tensors are for, or when a state is saved.
"""

import importlib.metadata
import json
import math
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sdxl import __version__
from sdxl.errors import WeightsError
from sdxl.files.checksums import checksum
from sdxl.files.weight_files import WeightFile
from sdxl.files.weight_image import WeightImage
from sdxl.training.run_state import Scalars

TENSORS, STATE, RECORD = "state.safetensors", "state.json", "training.json"
FORMAT = "sdxl-training-state/2"
"""Raise the number when the meaning of a state changes."""
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "torchao", "prodigyopt")
"""What computes a step. With other versions the result could be another one."""
_LARGEST_JSON = 64 << 20
"""Bytes. SDXL's UNet with Adafactor has 0.1 million, and each picture that waits in a queue a few."""
_MOST_PROCESSES = 1024


@dataclass(frozen=True, kw_only=True)
class StateNotes:
    """What a state is beside its tensors, as `state.json` holds it."""

    step: int
    """Steps that were done."""
    seed: int
    """The seed of its run."""
    scalars: Scalars
    """Numbers of the optimizers."""
    orders: list[dict[str, Any]]
    """`Order.as_json` of each process."""
    watched: dict[str, Any]
    """What was seen of the fine-tune on the way, as `Watch.as_json` tells it."""
    pictures: str
    """The digest of what was learned, as it was encoded."""


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """A state on disk, whose JSON was checked."""

    folder: Path
    notes: StateNotes
    record: dict[str, Any]
    """The record of its run, as in a fine-tune."""
    software: dict[str, str]
    """The versions of what computed its steps."""

    @property
    def file(self) -> WeightFile:
        """Its tensors."""
        return WeightFile(self.folder / TENSORS, f"{TENSORS} in {self.folder.name}")


def software() -> dict[str, str]:
    """The versions of this project and of the packages that compute a step."""
    return {"sdxl": __version__} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def write_state(
    folder: Path, image: WeightImage, notes: StateNotes, record: Mapping[str, Any], stop: threading.Event
) -> None:
    """Write a state to the new folder `folder`, which appears once it is complete and on the disk.

    Raises:
        StoppedError: `stop` was set.
        OSError: it cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        found = image.write(partial / TENSORS, stop)
        about = {"format": FORMAT, "software": software(), "checksum": found, **asdict(notes)}
        for name, content in ((STATE, about), (RECORD, record)):
            with (partial / name).open("w") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
        _to_disk(partial)
        partial.rename(folder)
        _to_disk(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_state(folder: Path) -> SavedState:
    """Open the state in `folder` and check that nothing in it is damaged.

    Raises:
        WeightsError: it is no state, of another version of the format, or damaged.
    """
    about, record = (_json(folder / name) for name in (STATE, RECORD))
    if about.get("format") != FORMAT:
        raise WeightsError(
            f"{folder.name} is a state of another version of this project: go on with that version, or start anew."
        )
    try:
        state = SavedState(
            folder=folder, notes=_notes(about), record=record, software=dict(about["software"])
        )
        is_whole = checksum(folder / TENSORS) == about["checksum"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(folder) from error
    if not is_whole:
        raise _damaged(folder)
    _ = state.file.keys  # checks the header
    return state


def kinds(file: WeightFile) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The type and the shape of each tensor in `file`."""
    return {name: (dtype, tuple(shape)) for name, (dtype, shape, _) in file.beginnings(0).items()}


def _notes(about: Mapping[str, Any]) -> StateNotes:
    step, seed, scalars, orders, watched = (
        about[name] for name in ("step", "seed", "scalars", "orders", "watched")
    )
    numbers = isinstance(scalars, dict) and all(
        type(value) in (int, float) and math.isfinite(value) for value in scalars.values()
    )
    fine = type(step) is int and type(seed) is int and step > 0 <= seed and numbers
    if not fine or not isinstance(orders, list) or not 0 < len(orders) <= _MOST_PROCESSES:
        raise ValueError("a note is not what it should be")
    return StateNotes(
        step=step,
        seed=seed,
        scalars=scalars,
        orders=orders,
        watched=dict(watched),
        pictures=str(about.get("pictures")),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError("too large")
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path.parent) from error
    if not isinstance(content, dict):
        raise _damaged(path.parent)
    return content


def _damaged(folder: Path) -> WeightsError:
    return WeightsError(f"{folder.name} is no state of a training, or is damaged: take another state.")


def _to_disk(folder: Path) -> None:
    """Make the names in `folder` survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
