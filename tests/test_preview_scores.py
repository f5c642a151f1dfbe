"""Previews are scored by models that look at them, if the models are there, and nothing of that stops a training."""

import json
import shutil
import tarfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import train
from dataset_and_utils import TokenMap
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.data.dataset_folder import PreparedPicture, read_dataset_folder
from sdxl.data.picture_encoders import as_tensor, cosine_of_different, picture_encoders
from sdxl.files.hub import CLIP, DINO, _files_of_helper, is_here
from sdxl.history import History, Previews
from sdxl.training.preview_scores import PreviewScorer, in_words, preview_scorer
from tests.conftest import QUICK, call, png, write_zip
from tests.test_training import CONFIG
from tests.tiny_helpers import write_encoders

PROMPTS = ["a photo of TOK", "MT_TOK on a beach", "TOK", "a photo of a dog"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture
def _here(encoders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in encoders.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[PreparedPicture]:
    folder = tmp_path_factory.mktemp("pictures")
    texts = ("a photo of TOK", "TOK on grass", "a photo of MT_TOK")
    files: dict[str, bytes | str] = {f"{i}.png": png(i) for i in range(3)}
    archive = write_zip(folder / "x.zip", files | {f"{i}.txt": text for i, text in enumerate(texts)})
    return read_dataset_folder(
        prepare_dataset(archive, folder / "dataset", config=PreprocessConfig(target_size=64))
    )


def drawn(folder: Path, files: list[Path]) -> Previews:
    names = []
    for number, file in enumerate(files):
        names.append(f"{number}.png")
        shutil.copy(file, folder / names[-1])
    return Previews(step=5, pictures=names)


def scorer(folder: Path, pictures: list[PreparedPicture]) -> PreviewScorer:
    return PreviewScorer(
        picture_encoders(),
        PROMPTS,
        pictures,
        TokenMap.parse("TOK:2,MT_TOK:3"),
        token_init="TOK:dog",
        folder=folder,
        device=torch.device("cpu"),
    )


def test_other_models_read_words_in_place_of_tokens():
    tokens = TokenMap.parse("TOK:2,MT_TOK:3")
    assert in_words("<TOK> and MT_TOK on a beach, TOKYO", tokens, "TOK:old dog") == (
        "old dog and on a beach, TOKYO"
    )
    assert in_words("TOK", tokens, "MT_TOK:dog") == ""


@pytest.mark.usefixtures("_here")
def test_previews_are_compared_with_pictures_of_their_own_subject(
    tmp_path: Path, pictures: list[PreparedPicture], caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    files = [picture.picture for picture in pictures]
    judge = scorer(tmp_path, pictures)
    previews = drawn(tmp_path, [files[0], files[2], files[1], files[2]])
    told = judge(previews)

    models = picture_encoders()
    seen = [as_tensor(Image.open(file)) for file in files]
    alike = models.likeness(seen) @ models.likeness(seen).T
    expected = [float(alike[0, :2].mean()), float(alike[2, 2]), float(alike[1, :2].mean())]
    assert told.likeness is not None
    assert told.likeness == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert expected[1] == pytest.approx(1, abs=1e-5)
    assert judge.among_pictures == pytest.approx(cosine_of_different(alike[:2, :2], torch.eye(2)), abs=1e-5)

    shown = models.shown([seen[0], seen[2], seen[1]])
    texts = models.texts(["a photo of dog", "on a beach", "dog"])
    assert told.prompt_shown == pytest.approx(float((shown * texts).sum(1).mean()), abs=1e-5)
    assert asdict(told) | {"likeness": None, "prompt_shown": None} == asdict(previews)
    assert f"The previews after step 5: likeness {told.likeness:.3f} (training pictures" in caplog.text
    other = judge(drawn(tmp_path, [files[2], files[0], files[2], files[2]]))
    assert other.likeness is not None and other.likeness < told.likeness - 1e-4


@pytest.mark.usefixtures("_here")
def test_prompts_without_tokens_have_no_scores(tmp_path: Path, pictures: list[PreparedPicture]):
    judge = PreviewScorer(
        picture_encoders(),
        PROMPTS[3:],
        pictures,
        TokenMap.parse("TOK:2"),
        token_init="",
        folder=tmp_path,
        device=torch.device("cpu"),
    )
    previews = drawn(tmp_path, [pictures[0].picture])
    assert judge(previews) == previews and judge.among_pictures is None


def wanted(pictures: list[PreparedPicture], folder: Path) -> tuple[PreviewScorer | None, History]:
    history = History(prompts=PROMPTS)
    config = replace(CONFIG, token_map="TOK:2,MT_TOK:3")
    return preview_scorer(config, history, pictures, folder=folder, device=torch.device("cpu")), history


def in_cache(cache: Path, name: str, model: str) -> None:
    """Put a model into the hub's cache, as a download does."""
    folder = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(model, folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")


def test_models_in_the_hubs_cache_are_used_and_others_are_not_fetched(
    encoders: dict[str, str],
    pictures: list[PreparedPicture],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level("INFO")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    in_cache(tmp_path, DINO.hub_name, encoders["SDXL_DINO"])
    assert is_here(DINO) and not is_here(CLIP)
    assert wanted(pictures, tmp_path)[0] is None
    assert [(record.levelname, record.message) for record in caplog.records] == [
        (
            "INFO",
            "Previews are not scored, because DINOv2 and CLIP are not on this machine: SDXL_SCORER=fetch fetches them once "
            "(700 MB).",
        )
    ]
    in_cache(tmp_path, CLIP.hub_name, encoders["SDXL_CLIP"])
    made, history = wanted(pictures, tmp_path)
    assert made is not None and history.likeness_among_pictures == made.among_pictures is not None


def test_weights_for_other_programs_are_not_fetched():
    read = ["config.json", "merges.txt", "model.safetensors"]
    others = ["open_clip_model.safetensors", "pytorch_model.bin", "onnx/model.safetensors", "code.py"]
    assert _files_of_helper([*others, *read]) == read


@pytest.mark.usefixtures("_here")
def test_what_is_wrong_with_the_scorer_is_told(
    pictures: list[PreparedPicture],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setenv("SDXL_SCORER", "none")
    assert wanted(pictures, tmp_path)[0] is None and caplog.text == ""
    monkeypatch.setenv("SDXL_SCORER", "yes")
    assert wanted(pictures, tmp_path)[0] is None
    assert "SDXL_SCORER is 'yes', but must be one of auto, fetch, none." in caplog.text
    monkeypatch.setenv("SDXL_SCORER", "fetch")
    monkeypatch.setenv("SDXL_DINO", str(tmp_path))
    assert wanted(pictures, tmp_path)[0] is None
    assert f"Previews are not scored: SDXL_DINO={tmp_path} has no config.json" in caplog.text
    # Pickle is not read.
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    assert not is_here(DINO) and wanted(pictures, tmp_path)[0] is None


def told_by(tar: Path) -> tuple[dict[str, Any], str, set[str]]:
    """The history, the report and the names in a result."""
    with tarfile.open(tar) as opened:
        history, report = (opened.extractfile(name) for name in ("history.json", "report.html"))
        assert history is not None and report is not None
        return json.load(history), report.read().decode(), set(opened.getnames())


@pytest.mark.usefixtures("_here")
def test_a_training_tells_the_scores_of_its_previews(
    captioned_zip: Path, narrow_base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    monkeypatch.setenv("SDXL_BASE", str(narrow_base))
    monkeypatch.setattr("sdxl.serving.previews.STEPS", 1)
    inputs = {**QUICK, "max_train_steps": 2, "checks": 1, "save_every": 0}
    history, report, names = told_by(call(train.train, input_images=captioned_zip, **inputs))
    assert [one["step"] for one in history["previews"]] == [0, 2]
    for one in history["previews"]:
        assert 0 < one["likeness"] < 1 and -1 < one["prompt_shown"] < 1
        assert len(one["pictures"]) == 4 and set(one["pictures"]) < names
        assert f"The previews after step {one['step']}: likeness {one['likeness']:.3f}" in caplog.text
    assert 0 < history["likeness_among_pictures"] < 1
    assert "Likeness of previews" in report and "Prompts shown in previews" in report
