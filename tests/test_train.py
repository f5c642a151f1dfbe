"""The training entry point as a function: old and new inputs, artifacts, wrong inputs."""

import base64
import json
import logging
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import train
from sdxl.errors import UserInputError
from sdxl.files.archives import unpack
from sdxl.history import History
from sdxl.training.recipe import StepReport
from tests.conftest import FULL, QUICK, TINY_BASE, call, png, write_zip


@pytest.fixture(autouse=True)
def _narrow_base(monkeypatch: pytest.MonkeyPatch, narrow_base: Path) -> None:
    monkeypatch.setenv("SDXL_BASE", str(narrow_base))


def run(tmp_path: Path, **inputs) -> Path:
    """Train, unpack the tar, return the folder."""
    tar = call(train.train, **inputs)
    assert tar.name == "trained_model.tar"
    assert sorted(path.name for path in tar.parent.iterdir()) == ["report.html", "trained_model.tar"]
    unpack(tar, tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_bytes() == (tar.parent / "report.html").read_bytes()
    return tmp_path / "out"


def test_artifacts_of_a_full_training(captioned_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SDXL_BASE", str(TINY_BASE))
    out = run(tmp_path, input_images=captioned_zip, single_file=True, **QUICK, **FULL)
    assert sorted(path.name for path in out.iterdir()) == [
        "embeddings.pti",
        "history.json",
        "report.html",
        "special_params.json",
        "training.json",
        "unet.safetensors",
        "web_ui",
    ]
    checkpoint, embedding = sorted((out / "web_ui").iterdir(), reverse=True)
    assert (checkpoint.name, embedding.name) == ("TOK_checkpoint.safetensors", "TOK.safetensors")
    with safe_open(checkpoint, framework="pt") as file:
        conv_in = file.get_tensor("model.diffusion_model.input_blocks.0.0.weight")
    assert torch.equal(conv_in, load_file(out / "unet.safetensors")["conv_in.weight"])
    assert json.loads((out / "special_params.json").read_text()) == {"TOK": "<s0><s1>"}
    rows = load_file(out / "embeddings.pti")
    assert sorted(rows) == ["text_encoders_0", "text_encoders_1"]
    assert [len(row) for row in rows.values()] == [2, 2]
    with safe_open(out / "embeddings.pti", framework="pt") as file:
        assert file.metadata() == {"pooled_at": "eos"}
    assert {value.dtype for value in load_file(out / "unet.safetensors").values()} == {torch.float16}
    record = json.loads((out / "training.json").read_text())
    assert record["settings"]["seed"] == 0
    assert record["settings"]["token_init"] == "", "the captions have no word for TOK"
    assert record["settings"]["resolution"] == 64
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["dataset_sha256"]) == 64


def test_two_tokens_go_on_counting(tmp_path: Path):
    rows = "image_file,caption\n0.png,a CLOCK_TOK\n1.png,MT_TOK and CLOCK_TOK\n"
    archive = write_zip(tmp_path / "x.zip", {"0.png": png(0), "1.png": png(1), "captions.csv": rows})
    out = run(tmp_path, input_images=archive, token_map="CLOCK_TOK:2,MT_TOK:3", **QUICK)
    expected = {"CLOCK_TOK": "<s0><s1>", "MT_TOK": "<s2><s3><s4>"}
    assert json.loads((out / "special_params.json").read_text()) == expected
    assert len(load_file(out / "embeddings.pti")["text_encoders_1"]) == 5


def test_a_training_is_asked_to_end(tmp_path: Path, captioned_zip: Path, monkeypatch: pytest.MonkeyPatch):
    """By the signal, in the middle of a run, with a history that others can read meanwhile."""
    seen = []

    def in_the_third_step(report: StepReport) -> None:
        if report.step == 3:
            [history] = tmp_path.rglob("training_out/history.json")
            seen.append(len(json.loads(history.read_text())["steps"]))
            signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(train, "_record_metrics", in_the_third_step)
    before = signal.getsignal(signal.SIGUSR1)
    out = run(tmp_path, input_images=captioned_zip, **QUICK | {"max_train_steps": 50, "checks": 1})
    signal.signal(signal.SIGUSR1, before)
    history = History.read(out)
    assert seen and [step.step for step in history.steps] == [1, 2, 3]
    assert [check.step for check in history.checks] == [3]
    assert json.loads((out / "training.json").read_text())["choice"]["step"] == 3
    assert load_file(out / "lora.safetensors")


def test_a_training_is_watched(tmp_path: Path):
    archive = write_zip(tmp_path / "x.zip", {"0.png": png(0), "0.txt": "a photo of TOK"})
    inputs = QUICK | {"checks": 1, "keep_checked": True, "preview_prompts": "TOK on the left|a red house"}
    out = run(tmp_path / "watched", input_images=archive, **inputs, lora_lr=1e-3)
    history = History.read(out)
    assert json.loads((out / "training.json").read_text())["choice"]["step"] == 4
    assert (out / "checkpoints/step-000004/lora.safetensors").is_file() and history.watched_seconds > 0
    assert [check.step for check in history.checks] == [4]
    assert all(
        check.drift > 0 and set(check.held_out) == {"low", "middle", "high"} for check in history.checks
    )
    assert history.choice is not None and history.choice.step == 4
    assert history.prompts == ["TOK on the left", "a red house"]
    assert [previews.step for previews in history.previews] == [0, 4]
    before, after = (
        [np.array(Image.open(out / name)) for name in previews.pictures] for previews in history.previews
    )
    assert not np.array_equal(before[0], after[0]), "the preview shows what was learned"
    unwatched = run(tmp_path / "unwatched", input_images=archive, **QUICK, lora_lr=1e-3)
    first, second = (load_file(folder / "lora.safetensors") for folder in (out, unwatched))
    assert all(torch.equal(first[name], second[name]) for name in second), "to watch disturbs nothing"
    assert not (unwatched / "previews").exists()


def test_epochs_count_pictures_however_many_a_step_takes(captioned_zip: Path, tmp_path: Path):
    uri = "data:application/zip;base64," + base64.b64encode(captioned_zip.read_bytes()).decode()
    quick = {name: value for name, value in QUICK.items() if name != "max_train_steps"}
    took = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "preservation": 1.0}
    out = run(tmp_path, **quick | took | {"input_images": uri, "num_train_epochs": 2})
    settings = json.loads((out / "training.json").read_text())["settings"]
    assert (
        settings["max_train_steps"] == 4
    )  # 2 epochs × 4 pictures ÷ (1 × 2) a step: the base teaches the other


def test_the_call_of_the_first_years_works(tmp_path: Path):
    rows = "image_file,caption\n0.png,a CLOCK_TOK\n1.png,a MT_TOK\n"
    archive = write_zip(tmp_path / "x.zip", {"0.png": png(0), "1.png": png(1), "captions.csv": rows})
    out = run(
        tmp_path,
        input_data_tar_or_zip=archive,
        token_map="CLOCK_TOK:2,MT_TOK:3",
        num_train_epochs=4,
        unet_learning_rate=6e-6,
        ti_learning_rate_multiplier=100,
        resolution=64,
        checks=0,
    )
    settings = json.loads((out / "training.json").read_text())["settings"]
    assert settings["is_lora"] is True and settings["ti_lr"] == pytest.approx(6e-4)
    assert settings["max_train_steps"] == 3  # 4 epochs × 2 pictures ÷ 3 a step: the base teaches the fourth


def test_the_call_of_the_later_years_works(tmp_path: Path):
    archive = write_zip(tmp_path / "x.zip", {"0.png": png(0), "1.png": png(1)})
    out = run(
        tmp_path,
        input_images=archive,
        token_string="TOK",
        caption_prefix="a photo of TOK, ",
        max_train_steps=3,
        resolution=64,
        checks=0,
    )
    assert (out / "lora.safetensors").is_file()
    assert not (out / "unet.safetensors").exists()
    assert json.loads((out / "training.json").read_text())["settings"]["token_map"] == "TOK:2"


def test_checkpoints_come_along_and_are_fine_tunes(captioned_zip: Path, tmp_path: Path):
    out = run(tmp_path, input_images=captioned_zip, checkpointing_steps=2, **QUICK, **FULL)
    steps = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert steps == ["step-000002", "step-000004"]
    last, final = (
        load_file(out / "checkpoints" / steps[-1] / "unet.safetensors"),
        load_file(out / "unet.safetensors"),
    )
    assert all(torch.equal(last[name], final[name]) for name in final)


def test_equal_runs_give_equal_bytes(
    captioned_zip: Path, fine_tunes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Except in the date of a file for web UIs, and in how long the steps took."""
    monkeypatch.setenv("SDXL_BASE", str(TINY_BASE))
    again = call(train.train, input_images=captioned_zip, **QUICK, **FULL)
    one, other = tmp_path / "one", tmp_path / "other"
    for tar, folder in ((again, one), (fine_tunes["full"], other)):
        unpack(tar, folder)
    histories = History.read(one), History.read(other)
    for history in histories:
        history.steps = [replace(step, seconds=0.0) for step in history.steps]
    assert histories[0] == histories[1] and len(histories[0].steps) == 4
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for name in names:
        if name.name not in ("history.json", "report.html"):
            assert without_date(one / name) == without_date(other / name), name


def without_date(path: Path) -> bytes:
    return re.sub(rb'"modelspec.date":"[\d-]+"', b"", path.read_bytes())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input_images is missing"),
        ({"input_images": "/nowhere.zip"}, r"/nowhere\.zip does not exist"),
        ({"token_map": "TOK"}, "token_map"),
        ({"token_map": "CAT:2"}, "names no token"),
        ({"token_string": "T K"}, "token_map"),
        ({"token_map": "CAT:2", "token_string": "TOK"}, "token_string is the old form"),
        ({"input_data_tar_or_zip": "x.zip"}, "old name of input_images"),
        ({"resolution": 100}, "multiple of 8"),
        ({"resolution": 0}, "multiple of 8"),
        ({"max_train_steps": 0}, "max_train_steps is 0"),
        ({"train_batch_size": 0}, "train_batch_size is 0"),
        ({"unet_learning_rate": -1.0}, "unet_learning_rate is -1.0"),
        ({"preset": "fast"}, "preset is 'fast', but must be one of quick, good, patient"),
        ({"ti_lr": float("nan")}, "ti_lr is nan"),
        ({"lr_warmup_steps": 4}, "lr_warmup_steps is 4"),
        ({"seed": -1}, "seed is -1"),
        ({"clipseg_temperature": 0.0}, "temperature of masks is 0"),
        ({"mask_target_prompts": "a dog"}, "set SDXL_SEGMENTER"),
        ({"caption_prefix": "a photo of <s0>"}, "holds <s0>"),
        ({"lr_scheduler": "wave"}, "lr_scheduler"),
        ({"input_images": "http://127.0.0.1:9/data.zip"}, r"127\.0\.0\.1:9/data\.zip could not be fetched"),
        ({"input_images": "data:application/zip;base64,aGVsbG8="}, "is a text file: give a .zip"),
    ],
)
def test_bad_inputs_end_in_one_sentence_and_leave_nothing(
    captioned_zip: Path, tmp_path: Path, inputs: dict, message: str
):
    given = {"input_images": captioned_zip, **QUICK, **inputs} if inputs else QUICK
    with pytest.raises(UserInputError, match=message) as caught:
        call(train.train, **given)
    assert "\n" not in str(caught.value)
    workspace = tmp_path / "workspace"
    assert not workspace.exists() or list(workspace.iterdir()) == []


def test_the_inputs_of_preprocessing_are_honoured_and_recorded(captioned_zip: Path, tmp_path: Path):
    inputs = {"use_face_detection_instead": True, "crop_based_on_salience": True, "temp": 0.5}
    out = run(tmp_path, input_images=captioned_zip, **QUICK, **inputs)
    settings = json.loads((out / "training.json").read_text())["settings"]
    assert settings["use_face_detection_instead"] is True
    assert settings["crop_based_on_salience"] is True
    assert settings["mask_temperature"] == 0.5
    assert settings["bucketing"] is False


def test_settings_without_effect_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    archive = write_zip(
        tmp_path / "x.zip", {"0.png": png(0), "0.txt": "a TOK", "1.png": png(1), "1.txt": "my TOK"}
    )
    useless = {
        "global_caption": "this TOK",
        "caption_prefix": "a drawing of TOK",
        "mask_floor": 0.5,
        "temp": 0.5,
        "unet_learning_rate": 1e-3,
    }
    out = run(tmp_path, input_images=archive, **QUICK, **useless)
    assert (out / "lora.safetensors").is_file()
    for told in (
        "unet_learning_rate has no effect on a LoRA, whose rate is lora_lr: set is_lora=false to train the whole UNet.",
        "The temperature of masks, 0.5, has no effect without mask_target_prompts or use_face_detection_instead.",
        "mask_floor has no effect, because no picture has a mask.",
        "global_caption is not used, because the pictures have captions.",
        '"a drawing of TOK" is not used, because the pictures have captions.',
    ):
        assert caplog.messages.count(told) == 1, told


def test_a_wrong_base_is_told_what_to_do(
    captioned_zip: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("SDXL_BASE", str(tmp_path))
    with pytest.raises(UserInputError, match="model_index"):
        call(train.train, input_images=captioned_zip, **QUICK)
    monkeypatch.setenv("SDXL_BASE", "somebody/some-sdxl")
    with pytest.raises(UserInputError, match="set SDXL_BASE"):
        call(train.train, input_images=captioned_zip, **QUICK)


def test_a_preset_and_a_word_of_the_captions_decide_what_is_not_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    archive = write_zip(
        tmp_path / "x.zip", {"0.png": png(0), "0.txt": "a TOK dog", "1.png": png(1), "1.txt": "TOK"}
    )
    caplog.set_level(logging.INFO)
    out = run(tmp_path, input_images=archive, preset="patient", lora_rank=2, token_init="auto", **QUICK)
    assert "Given, not from the preset: max_train_steps, lora_rank." in caplog.text
    settings = json.loads((out / "training.json").read_text())["settings"]
    decided = {"token_init": "", "ti_lr": 1e-3, "lora_targets": "all", "lora_rank": 2, "lr_warmup_steps": 0}
    assert {name: settings[name] for name in decided} == decided, "one of two captions is too few"
    archive = write_zip(tmp_path / "y.zip", {"0.png": png(0), "0.txt": "a TOK dog"})
    shutil.rmtree(out)
    settings = json.loads((run(tmp_path, input_images=archive, **QUICK) / "training.json").read_text())[
        "settings"
    ]
    assert (settings["token_init"], settings["ti_lr"]) == ("TOK:dog", 3e-4)
