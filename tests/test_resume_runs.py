"""Trainings as users run them: stopped and killed, and going on."""

import io
import json
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import train
from benchmarks.resumed_kills import equal, weights_in
from sdxl import settings
from sdxl.errors import UserInputError, WeightsError
from sdxl.files.archives import pack_tar
from sdxl.history import Previews
from sdxl.serving.previews import PreviewDrawer
from sdxl.training.kept_previews import as_json, as_tensors, restored
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
        call(train.train, **{**LORA, **inputs})
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


def test_a_run_that_goes_on_has_the_previews_of_before(
    captioned_zip: Path, narrow_base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    drawn: dict[int, list[bytes]] = {}
    draw = PreviewDrawer.__call__

    def record(self: PreviewDrawer, step: int) -> Previews:
        told = draw(self, step)
        drawn[step] = [(self._folder.parent / name).read_bytes() for name in told.pictures]
        return told

    monkeypatch.setattr(PreviewDrawer, "__call__", record)
    monkeypatch.setattr("sdxl.serving.previews.STEPS", 1)
    monkeypatch.setenv("SDXL_BASE", str(narrow_base))
    monkeypatch.setenv("SDXL_STATE", str(tmp_path / "state"))
    watched = {"max_train_steps": 2, "checks": 1, "preview_prompts": "a photo of TOK|a photo of a dog"}
    assert stop_after(1, monkeypatch, input_images=captioned_zip, **watched) == ["step-000001"]
    before = dict(drawn)
    assert list(before) == [0]
    drawn.clear()
    monkeypatch.setenv("SDXL_WORKSPACE", str(tmp_path / "elsewhere"))
    tar = call(train.train, input_images=captioned_zip, **{**LORA, **watched}, resume="auto")
    assert list(drawn) == [2]
    with tarfile.open(tar) as opened:

        def content(name: str) -> bytes:
            file = opened.extractfile(name)
            assert file is not None
            return file.read()

        told = json.loads(content("history.json"))["previews"]
        found = {one["step"]: [content(name) for name in one["pictures"]] for one in told}
    assert found == before | drawn


JPEG = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(JPEG, "JPEG")
PNG = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(PNG, "PNG")
GOOD = "previews/step-000002-0.jpg"


@pytest.mark.parametrize(
    ("name", "content", "changes"),
    [
        ("../step-000002-0.jpg", JPEG, {}),
        ("previews/../step-000002-0.jpg", JPEG, {}),
        ("previews/step-000002-0.html", JPEG, {}),
        (GOOD, PNG, {}),
        (GOOD, io.BytesIO(JPEG.getvalue()[:200]), {}),
        (GOOD, JPEG, {"step": "2"}),
        (GOOD, JPEG, {"likeness": float("nan")}),
        (GOOD, JPEG, {"more": 1}),
    ],
)
def test_previews_of_strangers_are_checked(
    tmp_path: Path, name: str, content: io.BytesIO, changes: dict[str, Any]
):
    files = {name: torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8)}
    told = asdict(Previews(step=2, pictures=[name])) | changes
    with pytest.raises((TypeError, ValueError)):
        restored([told], files, tmp_path / "new")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_state_holds_the_first_and_the_last_previews(tmp_path: Path):
    previews = [Previews(step=step, pictures=[f"previews/step-{step:06d}-0.jpg"]) for step in range(40)]
    (tmp_path / "previews").mkdir()
    for one in previews[:-1]:  # somebody removed the file of the last
        (tmp_path / one.pictures[0]).write_bytes(JPEG.getvalue())
    again = restored(as_json(previews), as_tensors(previews, tmp_path), tmp_path / "new")
    assert [one.step for one in again] == [0, *range(27, 39)]
    assert all((tmp_path / "new" / one.pictures[0]).read_bytes() == JPEG.getvalue() for one in again)


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
