"""Check of single files: a checkpoint becomes a folder, and a file again, with the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.real.findings import Notes, check
from benchmarks.real.setup import Setup
from sdxl.files.part_files import present
from sdxl.files.weight_files import WeightFile
from sdxl.model.bases import Base, digest, find_base
from sdxl.model.single_file import write_checkpoint
from sdxl.model.single_file_base import convert
from sdxl.model.web_ui_metadata import About

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@check("Does a single-file checkpoint convert to a folder and back without a change?")
def single_file(setup: Setup, notes: Notes) -> None:
    """Convert the checkpoint that `--checkpoint` names, or else a file that is written from the base.

    The converted folder is written as a file again, and that file is converted once more.
    """
    folder = setup.folder / "single-file"
    if setup.checkpoint is not None:
        first = find_base(setup.checkpoint, called="--checkpoint")
        notes.fact("checkpoint", first.name)
        notes.fact("digest of the checkpoint (base_sha256)", digest(first.folder))
        same = digest(first.folder) == digest(setup.base.folder)
        notes.fact("the same weights as the base", same)
    else:
        first = setup.base
    _write(first, folder / "again.safetensors")
    notes.fact("size of the written file, MB", (folder / "again.safetensors").stat().st_size / 1e6)
    (folder / "converted").mkdir()
    convert(
        WeightFile(folder / "again.safetensors", "again.safetensors"), setup.base.folder, folder / "converted"
    )
    for part in PARTS:
        before = _weights(first.vae if part == "vae" else first.folder / part)
        after = _weights(folder / "converted" / part)
        notes.equal(f"{part}: names that are lost or new", 0, len(before.keys() ^ after.keys()))
        changed = sum(not torch.equal(before[name], after[name]) for name in before.keys() & after.keys())
        notes.equal(f"{part}: tensors that change", 0, changed)
    shutil.rmtree(folder)


def _write(base: Base, path: Path) -> None:
    path.parent.mkdir(parents=True)
    weights = _weights(base.folder / "unet", half=False)
    config = json.loads((base.folder / "unet" / "config.json").read_text())
    about = About.of(base.schedule, resolution=config["sample_size"] * 8, words=(), record={})
    write_checkpoint(path, weights, config, base.folder, about, vae=base.vae)


def _weights(part: Path, *, half: bool = True) -> dict[str, Tensor]:
    """All tensors of a part, under names that do not depend on the version of transformers.

    half: in fp16, as a written checkpoint has them.
    """
    files = present(part)
    assert files is not None
    tensors: dict[str, Tensor] = {}
    for name in files.weights:
        tensors |= WeightFile(part / name, f"{part.name}/{name}").read()
    return {
        name.removeprefix("text_model."): value.half() if half else value
        for name, value in tensors.items()
        if not name.endswith("position_ids")
    }
