"""Folders of runs: nothing half done stays, nothing that is needed goes."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdxl import settings
from sdxl.errors import UserInputError
from sdxl.workspace import CHECKPOINTS, OUTPUT, RESULT, sweep, workspace_of_run
from tests.conftest import REPOSITORY


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDXL_WORKSPACE", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def behind_server() -> Iterator[None]:
    settings.set_behind_server(True)
    yield
    settings.set_behind_server(False)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def left_by_a_killed_run(parent: Path, *, checkpoints: bool = False) -> Path:
    """What a process leaves that is killed while it trains."""
    code = f"""
import os
from sdxl.workspace import workspace_of_run
with workspace_of_run("train") as folder:
    for name in ("fetched/a.zip", "dataset/0.src.png", "unpacked-x/checkpoints/a.jpg", "training_out/lora.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    if {checkpoints}:
        (folder / "{OUTPUT}" / "{CHECKPOINTS}" / "step-000002").mkdir(parents=True)
        (folder / "{OUTPUT}" / "{CHECKPOINTS}" / "step-000002" / "unet.safetensors").write_text("x")
    print(folder, flush=True)
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    return Path(done.stdout.strip())


def make_old(folder: Path) -> None:
    os.utime(folder, (0, 0))


def test_results_stay_and_failures_go(parent: Path, caplog: pytest.LogCaptureFixture):
    with workspace_of_run("predict") as kept:
        (kept / "out.png").write_text("x")
    assert names(parent) == [f"{kept.name}/out.png"]
    with pytest.raises(UserInputError), workspace_of_run("predict") as failed:
        (failed / "half.png").write_text("x")
        raise UserInputError("The prompt is wrong: write another.")
    assert not failed.exists()
    assert not caplog.records
    with pytest.raises(ZeroDivisionError), workspace_of_run("predict"):
        _ = 1 // 0
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert names(parent) == [f"{kept.name}/out.png"]


def test_checkpoints_of_failures_stay(parent: Path):
    with pytest.raises(KeyboardInterrupt), workspace_of_run("train") as folder:
        (folder / "dataset").mkdir()
        (folder / OUTPUT / CHECKPOINTS / "step-000002").mkdir(parents=True)
        (folder / OUTPUT / CHECKPOINTS / "step-000002" / "unet.safetensors").write_text("x")
        (folder / OUTPUT / "embeddings.pti").write_text("x")
        raise KeyboardInterrupt
    assert names(folder) == [f"{OUTPUT}/{CHECKPOINTS}/step-000002/unet.safetensors"]
    assert not (folder / "dataset").exists()


@pytest.mark.parametrize("checkpoints", [False, True])
def test_what_a_killed_run_left_is_swept_at_the_next_start(parent: Path, checkpoints: bool):
    killed = left_by_a_killed_run(parent, checkpoints=checkpoints)
    assert len(names(killed)) == 4 + checkpoints
    with workspace_of_run("predict"):
        pass
    assert names(killed) == [f"{OUTPUT}/{CHECKPOINTS}/step-000002/unet.safetensors"] * checkpoints
    assert killed.exists() == checkpoints


def test_running_processes_keep_their_folders(parent: Path):
    with workspace_of_run("train") as running:
        (running / "fetched").mkdir()
        (running / "fetched" / "a.zip").write_text("x")
        make_old(running)
        with workspace_of_run("predict"):
            pass
        assert names(running) == ["fetched/a.zip"]


@pytest.mark.usefixtures("behind_server")
def test_a_server_removes_what_it_has_delivered(parent: Path):
    with workspace_of_run("predict") as old:
        (old / "out.png").write_text("x")
    with workspace_of_run("predict") as new:
        (new / "out.png").write_text("x")
    make_old(old)
    sweep(parent)
    assert not old.exists()
    assert new.exists()


def test_results_of_the_command_line_are_never_swept(parent: Path):
    with workspace_of_run("train") as old:
        (old / "trained_model.tar").write_text("x")
    make_old(old)
    sweep(parent)
    assert names(old) == ["trained_model.tar"]


@pytest.mark.usefixtures("behind_server")
def test_other_folders_are_none_of_our_business(parent: Path, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "fetched").write_text("x")
    parent.mkdir()
    (parent / "train-x").mkdir()
    (parent / "sdxl-link").symlink_to(outside)
    (parent / "sdxl-file").write_text("x")
    for path in (parent / "train-x", outside):
        make_old(path)
    sweep(parent)
    assert (outside / "fetched").exists()
    assert sorted(path.name for path in parent.iterdir()) == ["sdxl-file", "sdxl-link", "train-x"]


def test_a_result_that_was_being_packed_is_swept(parent: Path):
    folder = parent / "sdxl-train-x"
    (folder / OUTPUT / CHECKPOINTS / "step-000002").mkdir(parents=True)
    (folder / OUTPUT / CHECKPOINTS / "step-000002" / "lora.safetensors").write_text("x")
    (folder / OUTPUT / "lora.safetensors").write_text("x")
    sweep(parent)
    assert names(folder) == [f"{OUTPUT}/{CHECKPOINTS}/step-000002/lora.safetensors"]


def test_a_finished_result_of_a_killed_run_stays(parent: Path):
    """The kill came after the tar was complete, and before the rest was removed."""
    folder = parent / "sdxl-train-x"
    for name in (RESULT, "dataset/0.src.png", f"{OUTPUT}/lora.safetensors", f"{OUTPUT}/{CHECKPOINTS}/a/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    sweep(parent)
    assert names(folder) == [RESULT]
    sweep(parent)
    assert names(folder) == [RESULT]
