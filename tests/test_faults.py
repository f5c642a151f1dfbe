"""Faults of the machine: a disk that is full at any write, and kills at any moment."""

import base64
import errno
import os
import resource
import shlex
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
from tests.conftest import REPOSITORY, TINY_BASE

TRAINING = "is_lora=false max_train_steps=4 train_batch_size=1 resolution=64 random_views=0 seed=0 checkpointing_steps=2"


def limited(command: list[str], folder: Path, kib: int) -> subprocess.CompletedProcess[str]:
    """Run `command` where no file can grow beyond `kib` KiB: the system then refuses to write, as on a full disk."""
    line = f"ulimit -f {kib}; exec {shlex.join(command)}"
    environment = os.environ | {
        "SDXL_BASE": str(TINY_BASE),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SDXL_CACHE": str(folder / "cache"),
    }
    environment.pop("SDXL_WORKSPACE", None)
    return subprocess.run(
        ["bash", "-c", line], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("kib", [1, 40, 2000], ids=["a picture", "the embeddings", "the weights"])
def test_a_full_disk_ends_a_training_in_one_sentence(captioned_zip: Path, tmp_path: Path, kib: int):
    inputs = [f"input_images=@{captioned_zip}", *TRAINING.split()]
    command = [sys.executable, "train.py", *(f"-i{text}" for text in inputs), "-o", str(tmp_path / "out")]
    done = limited(command, tmp_path, kib)
    assert done.returncode == 1, done.stderr
    [said] = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert "cannot be written (File too large): free space, or choose another folder." in said
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/*"))


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
