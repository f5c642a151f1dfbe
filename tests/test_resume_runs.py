"""Trainings as users run them: stopped, killed, in two processes, and started from files."""

from pathlib import Path
from typing import Any

import pytest

import train
from benchmarks.resumed_kills import equal, weights_in
from sdxl import settings
from sdxl.errors import WeightsError
from sdxl.files.archives import pack_tar
from sdxl.training.recipe import StepReport
from tests.conftest import QUICK, call
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
    assert equal(weights_in(tar.parent), weights_in_tar(fine_tunes["lora"], tmp_path))
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
    assert equal(weights_in(tar.parent), weights_in_tar(fine_tunes["lora"], tmp_path))
    assert {path.name for path in tar.parent.iterdir()} == {"report.html", "trained_model.tar"}


def weights_in_tar(tar: Path, scratch: Path) -> Any:
    (scratch / "named").mkdir(exist_ok=True)
    link = scratch / "named" / "trained_model.tar"
    if not link.exists():
        link.symlink_to(tar)
    return weights_in(scratch / "named")
