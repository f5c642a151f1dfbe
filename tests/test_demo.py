"""The demo: the command that it prints works when copied, and a failure takes one sentence."""

import runpy
import shlex
import subprocess
import sys

import pytest

import demo
from sdxl.errors import UserInputError
from tests.conftest import REPOSITORY


def test_the_printed_command_can_be_copied_and_a_failed_training_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(demo, "TRAINING", {"input_images": "@no such file.zip"})
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserInputError, match=r"training failed\."):
        demo.train(tmp_path / "my demo")
    printed, errors = capfd.readouterr()
    assert shlex.split(printed) == [
        "SDXL_BASE=base_models/tiny-sdxl",
        *(sys.executable, "train.py", "-i", "input_images=@no such file.zip"),
        *("-o", str(tmp_path / "my demo")),
    ]
    copied = subprocess.run(printed, shell=True, capture_output=True, text=True, check=False)
    assert copied.returncode == 2
    assert copied.stderr == errors
    assert "no such file.zip" in errors


def test_a_failed_demo_takes_one_sentence(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # where no train.py is
    monkeypatch.setattr(sys, "argv", ["demo.py", "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as failed:
        runpy.run_path(str(REPOSITORY / "demo.py"), run_name="__main__")
    # Python writes a code that is a text to stderr, and exits with 1.
    assert isinstance(failed.value.code, str) and failed.value.code.startswith("The demo failed: ")
    assert "\n" not in failed.value.code
    assert "Traceback" not in capfd.readouterr().err
