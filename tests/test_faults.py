"""Faults of the machine: a disk that is full at any write, and kills at any moment."""

import base64
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from sdxl.errors import StorageError
from sdxl.files.archives import pack_tar
from sdxl.files.fetching import fetch
from sdxl.serving.fine_tune_cache import FineTuneCache
from sdxl.settings import CacheLimits
from sdxl.workspace import workspace_of_run
from tests.conftest import REPOSITORY

TRAINING = "is_lora=false max_train_steps=2 train_batch_size=1 resolution=64 random_views=0 seed=0 checkpointing_steps=1 checks=0"


FULL_DISK = {1: "a picture", 40: "the embeddings", 2000: "the weights"}
"""How many KiB a file may have, and what then cannot be written."""
TRAININGS = """
import os, resource, sys
from sdxl.command_line import run_command_line
from train import train

out, sizes, *argv = sys.argv[1:]
for kib in map(int, sizes.split()):
    os.environ.pop("SDXL_WORKSPACE", None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, resource.RLIM_INFINITY))
    code = run_command_line(train, description="", argv=[*argv, "-o", f"{out}/{kib}"])
    print(f"Ended with {code}.", file=sys.stderr)
"""
"""Trainings, one after the other, where no file can grow beyond some size: the system then refuses to write, as on a full
disk."""


def test_a_full_disk_ends_a_training_in_one_sentence(captioned_zip: Path, tmp_path: Path):
    inputs = [f"-i{text}" for text in (f"input_images=@{captioned_zip}", *TRAINING.split())]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(REPOSITORY)}
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", TRAININGS, str(tmp_path / "out"), " ".join(map(str, FULL_DISK)), *inputs],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    logs = done.stderr.split("Ended with 1.\n")
    assert len(logs) == len(FULL_DISK) + 1, done.stderr
    for log, what in zip(logs, FULL_DISK.values(), strict=False):
        [said] = [line for line in log.splitlines() if line.startswith("Error: ")]
        assert "cannot be written (File too large): free space, or choose another folder." in said, what
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").iterdir())


@contextmanager
def full_disk(kib: int) -> Iterator[None]:
    """In this process no file can grow beyond `kib` KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """200 KiB that no packing makes smaller."""
    (tmp_path / "weights.safetensors").write_bytes(np.random.default_rng(0).bytes(200 << 10))
    return tmp_path / "weights.safetensors"


def decode(weights: Path) -> None:
    content = base64.b64encode(weights.read_bytes()).decode()
    fetch(f"data:application/x-tar;base64,{content}", weights.with_name("fetched"))


def pack(weights: Path) -> None:
    weights.with_name("packed").mkdir()
    pack_tar({"weights": weights}, weights.with_name("packed") / "trained_model.tar")


def fill_cache(weights: Path) -> None:
    content = base64.b64encode(weights.read_bytes()).decode()
    cache = FineTuneCache(weights.with_name("cache"), CacheLimits(disk=10**9, memory=0), lambda files: files)  # type: ignore[arg-type, return-value]
    cache.get(f"data:application/octet-stream;base64,{content}")


@pytest.mark.parametrize(("write", "folder"), [(decode, "fetched"), (pack, "packed"), (fill_cache, "cache")])
def test_a_full_disk_leaves_nothing_half_written(weights: Path, write: Callable[[Path], None], folder: str):
    with full_disk(50), pytest.raises((StorageError, OSError)) as failed:
        write(weights)
    told = StorageError.behind(failed.value) or failed.value
    assert isinstance(told, StorageError)
    assert str(told).endswith("cannot be written (File too large): free space, or choose another folder.")
    assert [
        path for path in (weights.parent / folder).rglob("*") if path.is_file() and path.stat().st_size
    ] == []


def test_a_workspace_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("SDXL_WORKSPACE", str(tmp_path / "file" / "runs"))
    with (
        pytest.raises(StorageError, match=r"^runs cannot be written \(Not a directory\): free space"),
        workspace_of_run("x"),
    ):
        pass


def test_missing_permission_is_not_called_a_full_disk():
    refused = StorageError.behind(PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/a/set.zip"))
    assert str(refused) == (
        "set.zip cannot be opened (Permission denied): change its permissions, or choose another one."
    )
