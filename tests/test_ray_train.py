"""Many trainings as tasks of Ray, with the miniature on processors."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fleet_server import NOT_NICE, ray_environment
from deploy.ray_train import inputs_for, main, subjects_in
from sdxl.errors import UserInputError
from tests.conftest import QUICK, REPOSITORY, write_captioned_zip

SUBJECTS = {"a.b": "a.b.zip", "cat": "cat.tar.gz", "dog": "dog"}
INPUTS = QUICK | {"token_map": "TOK:2", "max_train_steps": 9999, "random_views": 1, "save_every": 4}


def test_each_archive_is_a_subject(tmp_path: Path):
    for name in ("a.b.zip", "cat.tar.gz", "notes.txt", ".hidden.zip"):
        (tmp_path / name).touch()
    (tmp_path / "dog").mkdir()
    assert subjects_in(tmp_path) == {name: tmp_path / file for name, file in SUBJECTS.items()}
    (tmp_path / "dog.zip").touch()
    with pytest.raises(UserInputError, match=r"dog\.zip and dog have one name"):
        subjects_in(tmp_path)
    for nothing in (tmp_path / "dog", tmp_path / "notes.txt", tmp_path / "missing"):
        with pytest.raises(UserInputError, match="has no archives"):
            subjects_in(nothing)


def test_inputs_are_checked_before_the_first_training(captioned_zip: Path):
    inputs = inputs_for(captioned_zip, ["token_map=TOK:3"])
    assert (inputs["input_images"], inputs["resume"]) == (captioned_zip, "auto")
    for item, told in (
        ("resume=auto", "resume cannot be the same for many trainings"),
        ("max_train_step=5", "did you mean max_train_steps?"),
        ("token_map=TOK:0", "token_map 'TOK:0' is wrong"),
        ("init_from=missing.tar", "init_from is missing.tar, which does not exist"),
    ):
        with pytest.raises(UserInputError) as caught:
            inputs_for(captioned_zip, [item])
        assert told in str(caught.value)


def test_a_second_start_goes_on_and_a_failed_training_stops_no_other(
    tmp_path: Path, narrow_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The training of this test never ends by itself: it is stopped once, and then told to end early."""
    monkeypatch.setenv("SDXL_BASE", str(narrow_base))
    monkeypatch.delenv("SDXL_WORKSPACE")  # each training's is its own folder
    pictures, output = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    write_captioned_zip(pictures / "cat.zip")
    options = [str(pictures), "-o", str(output), "--gpus", "0"]
    options += [word for name, value in INPUTS.items() for word in ("-i", f"{name}={value}")]

    with ray_environment() as environment:
        started: Any = {"cwd": REPOSITORY, "env": environment | NOT_NICE, "text": True}
        started |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        command = [sys.executable, "-m", "deploy.ray_train", *options]
        first = subprocess.Popen(command, **started)
        while not [*output.glob("cat/state/*/step-*")]:
            assert first.poll() is None
            time.sleep(0.01)
        first.terminate()
        told, _ = first.communicate()
        assert first.returncode == 130, told

        (pictures / "broken.zip").write_bytes(b"PK nonsense")
        second = subprocess.Popen(command, **started)
        log = output / "cat" / "train.log"
        while "Going on after step " not in log.read_text():
            assert second.poll() is None
            time.sleep(0.01)
        process = re.findall(r"To end this training early, .*: kill -USR1 (\d+)", log.read_text())[-1]
        os.kill(int(process), signal.SIGUSR1)
        told, _ = second.communicate()
        assert second.returncode == 1, told
        assert "cat: finished" in told
        assert "broken: failed. broken.zip is neither a zip nor a tar archive" in told
        assert "1 of 2 failed" in told
    files = {path.name: path.stat().st_mtime_ns for path in (output / "cat").iterdir()}
    assert files.keys() == {"trained_model.tar", "report.html", "train.log"}

    (pictures / "broken.zip").unlink()
    assert main(options) == 0
    assert "1 of 1 are finished already" in capsys.readouterr().out
    assert files == {path.name: path.stat().st_mtime_ns for path in (output / "cat").iterdir()}
