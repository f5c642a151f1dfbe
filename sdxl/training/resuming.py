"""Find the state that a run goes on from, and refuse one of another run.

Knows what identifies a run: its settings, pictures, base and software. Does not know what is in a state.
"""

import hashlib
import logging
import socket
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from dataset_and_utils import ExampleDataset
from sdxl import settings
from sdxl.errors import UserInputError, WeightsError
from sdxl.files.archives import Limits, unpack
from sdxl.files.fetching import fetch
from sdxl.training import data_parallel
from sdxl.training.config import TrainingConfig
from sdxl.training.state_files import SavedState, software
from sdxl.training.state_folders import RunFolder, furthest, key_of, state_at, sweep
from sdxl.training.states import RunStates

log = logging.getLogger(__name__)

AUTO = "auto"
"""The input that asks for a state of the same run, if there is any."""
UNPACKED = "unpacked-state"
"""The folder of an unpacked archive in a run's workspace."""
_LIMITS = Limits(files=100, total_bytes=128 << 30)
_NEVER_MATTER = {"base", "seed", "checkpointing_steps", "single_file", "full_result", "save_every"}
"""Settings that may differ. `base` is only a name; the seed is looked at by itself."""
_LAST_BITS = {"gradient_checkpointing", "compile_blocks", "cuda_graph", "fp8", "shard"}
"""Settings that may differ too, but change how results are rounded."""
_FACTS = {
    "base_sha256": "another base: give the base of its run",
    "dataset_sha256": "another data set: give the pictures, captions and settings of its run",
    "init_from": "a run that began with another init_from: give the same",
}

_NAMED = {"settings": "inputs", "base_sha256": "weights of the base", "captions": "pictures or captions"}
"""What identifies a run → what it is called."""


def opened(asked: str | None, workspace: Path) -> SavedState | None:
    """The state that the user names by a path or a URL, unpacked into `workspace` if it is an archive. None if there is none
    to be named, and in all processes but the first.

    Raises:
        UserInputError: it cannot be fetched, is no state, or is damaged.
    """
    if asked in (None, AUTO) or data_parallel.rank() > 0:
        return None
    path = fetch(asked, workspace / "fetched")
    if path.is_file():
        unpack(path, workspace / UNPACKED, limits=_LIMITS)
        path = workspace / UNPACKED
    saved = state_at(path)
    _refuse_other_software(saved)
    return saved


def chosen(
    named: SavedState | None, asked: str | None, record: Mapping[str, Any], *, seed: int | None
) -> SavedState | None:
    """The state that this run goes on from, in all processes; None to begin at the beginning.

    named: what `opened` returned.
    asked: what the user asked for.
    record: the record of this run.
    seed: the seed that the user gave.

    Raises:
        WeightsError: the state is of another run.
    """
    saved = named
    if data_parallel.rank() == 0:
        parent, key = settings.state_folder(), key_of(identity(record))
        sweep(parent)
        if asked == AUTO:
            saved = furthest(parent, key, seed=seed)
            if saved is None:
                log.info("There is no state of such a run in %s: it begins at the beginning.", parent)
        elif asked is None and (left := next(parent.glob(f"{key}-*/step-*"), None)) is not None:
            log.info("A run with these settings has left a state, %s: resume=auto goes on from it.", left)
        if saved is not None:
            _refuse_other_run(saved, record, seed)
    return data_parallel.agreed(saved)  # its tensors are read by the first process alone: see states.py


def states_of(
    config: TrainingConfig,
    record: Mapping[str, Any],
    saved: SavedState | None,
    pictures: tuple[ExampleDataset | None, ...],
) -> RunStates:
    """What saves the states of this run, and goes on from `saved`.

    pictures: everything that is learned.
    """
    encoded = digest(pictures)
    if saved is not None and saved.notes.pictures != encoded:
        log.warning(
            "The pictures are encoded otherwise here than when the state was written: the result will differ in its last digits."
        )
    is_first = data_parallel.rank() == 0
    return RunStates(
        RunFolder(settings.state_folder(), key_of(identity(record)), saved if is_first else None),
        record,
        every=config.save_every,
        seed=config.seed,
        pictures=encoded,
        goes_on=saved,
    )


def require_one_run(record: Mapping[str, Any], captions: Sequence[str]) -> None:
    """Refuse processes that were given different things, as can happen on several hosts.

    Raises:
        UserInputError: names a host and what differs there.
    """
    about = identity(record) | {"captions": [*captions]}
    about.pop("dataset_sha256")  # on another GPU a mask may differ in its last digits
    (first, wanted), *others = data_parallel.gathered((socket.gethostname(), about))
    for host, found in others:
        for key, value in found.items():
            if value != wanted[key]:
                raise UserInputError(
                    f"{host} was given other {_NAMED.get(key, key)} than {first}: give all hosts the same inputs, pictures and "
                    "base."
                )


def identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs of one identity have in common, except for the seed."""
    names = {entry.name for entry in fields(TrainingConfig)} - _NEVER_MATTER - _LAST_BITS
    found = {name: record["settings"].get(name) for name in names}
    return {"settings": found, **{name: record.get(name) for name in _FACTS}}


def digest(pictures: tuple[ExampleDataset | None, ...]) -> str:
    """SHA-256 of all that was encoded."""
    total = hashlib.sha256()
    for dataset in pictures:
        for example in () if dataset is None else dataset.examples:
            tensors = (example.latents, example.mask, *example.token_ids, example.time_ids)
            for tensor in tensors:
                total.update(f"{tuple(tensor.shape)}".encode())
                total.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            total.update(f"{example.share}".encode())
    return total.hexdigest()


def _refuse_other_software(saved: SavedState) -> None:
    for name, version in software().items():
        if saved.software.get(name) != version:
            raise WeightsError(
                f"{saved.folder.name} was written with {name} {saved.software.get(name)}, but here is {version}: go on with "
                "that version, or leave out resume."
            )


def _refuse_other_run(saved: SavedState, record: Mapping[str, Any], seed: int | None) -> None:
    """Refuse a state whose run had another base, other pictures, other settings or another kind of device."""
    _refuse_other_software(saved)
    name, theirs = saved.folder.name, saved.record
    for fact, meaning in _FACTS.items():
        if theirs.get(fact) != record.get(fact):
            raise WeightsError(f"{name} is a state of {meaning}, or leave out resume.")
    had = theirs.get("settings")
    had = had if isinstance(had, dict) else {}
    for setting, value in identity(record)["settings"].items():
        if had.get(setting) != value:
            raise WeightsError(
                f"{name} is a state of a run with {setting} {had.get(setting)}, but here it is {value}: give the same, or "
                "leave out resume."
            )
    if seed not in (None, saved.notes.seed):
        raise WeightsError(
            f"{name} is a state of a run with seed {saved.notes.seed}, but here it is {seed}: leave out seed or resume."
        )
    processes = len(saved.notes.orders)
    if processes != data_parallel.world_size():
        raise WeightsError(
            f"{name} is a state of {processes} processes, but here are {data_parallel.world_size()}: start as many."
        )
    device, other = record["device"], str(theirs.get("device"))
    if device.endswith("CPU") != other.endswith("CPU"):
        raise WeightsError(
            f"{name} was written on {other}, but this is {device}: go on there, or leave out resume."
        )
    rounding = [setting for setting in sorted(_LAST_BITS) if had.get(setting) != record["settings"][setting]]
    if device != other or rounding:
        what = f"another device ({other})" if device != other else f"another {rounding[0]}"
        log.warning("The state was written with %s: the result will differ in its last digits.", what)
