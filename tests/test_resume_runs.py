"""Trainings as users run them: stopped and killed, and going on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import train
from benchmarks.resumed_kills import equal, weights_in
from sdxl import settings
from sdxl.errors import UserInputError, WeightsError
from sdxl.files.archives import pack_tar
from sdxl.training.recipe import StepReport
from tests.conftest import QUICK, REPOSITORY, call
from tests.test_resume import Stop

LORA = {**QUICK, "is_lora": True, "lora_lr": 1e-2}
"""The inputs of the fixture `fine_tunes`."""


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch, **inputs: Any) -> list[str]:
    """Start a training that stops after `steps`; the states that it leaves."""

    def stop(report: StepReport) -> None:
        if report.step == steps:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train, "_record_metrics", stop)
        call(train.train, **LORA, **inputs)
    return sorted(path.name for path in settings.state_folder().glob("*/*"))


def test_auto_goes_on_from_a_stopped_run(
    captioned_zip: Path,
    fine_tunes: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level("INFO")
    assert stop_after(3, monkeypatch, input_images=captioned_zip, save_every=2) == [
        "step-000002",
        "step-000003",
    ]
    [folder] = settings.state_folder().glob("*/step-000003")
    assert f"The state after step 3 is in {folder}: give resume=auto." in caplog.messages
    files = {f"step-000003/{path.name}": path for path in folder.iterdir()}
    pack_tar(files, tmp_path / "state.tar")

    tar = call(train.train, input_images=captioned_zip, **{**LORA, "seed": None}, resume="auto")
    assert f"Going on after step 3, from {folder}." in caplog.messages
    assert equal(weights_in(tar), weights_in(fine_tunes["lora"]))
    assert {path.name for path in tar.parent.iterdir()} == {"report.html", "trained_model.tar"}
    assert not settings.state_folder().exists()

    caplog.clear()
    with pytest.raises(WeightsError, match=r"of a run with lora_lr 0\.01, but here it is 0\.5"):
        call(
            train.train,
            input_images=captioned_zip,
            **{**LORA, "lora_lr": 0.5},
            resume=str(tmp_path / "state.tar"),
        )
    tar = call(train.train, input_images=captioned_zip, **LORA, resume=str(tmp_path / "state.tar"))
    assert any(message.startswith("Going on after step 3") for message in caplog.messages)
    assert equal(weights_in(tar), weights_in(fine_tunes["lora"]))
    assert {path.name for path in tar.parent.iterdir()} == {"report.html", "trained_model.tar"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "x holds no state of a training: give a folder such as step-000250."),
        (lambda path: path.write_bytes(b"PK nonsense"), "x cannot be unpacked|x is "),
        (lambda path: pack_tar({"../../evil": Path(__file__)}, path), "x holds the unsafe path"),
        (lambda path: None, "resume is .*x, which does not exist: give auto"),
    ],
)
def test_what_is_no_state_is_refused(captioned_zip: Path, tmp_path: Path, make: Any, message: str):
    make(tmp_path / "x")
    with pytest.raises(UserInputError, match=message):
        call(train.train, input_images=captioned_zip, **LORA, resume=str(tmp_path / "x"))


def test_killed_trainings_go_on_to_the_last_bit(narrow_base: Path, tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.resumed_kills",
        "--trainings",
        "2",
        "--most-kills",
        "1",
        "--kind",
        "lora",
        "--base",
        str(narrow_base),
    ]
    subprocess.run(
        [*command, "--output", str(tmp_path / "r.json")], cwd=REPOSITORY, check=True, capture_output=True
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["kills"], result["wrong"]) == (2, 0), result["what_was_wrong"]
