"""The checks of a real base: all are ok on the miniature, and each one notices when its assumption is broken."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import check_real
from benchmarks.real import findings, machine, page
from benchmarks.real.checks import CHECKS
from benchmarks.real.findings import Finding, run
from benchmarks.real.setup import Photo, Setup, Trained, packaged_photo
from benchmarks.real.training import train_lora
from sdxl.files.archives import unpack
from sdxl.serving import safety
from tests.conftest import TINY_BASE
from tests.tiny_helpers import write_captioner, write_checker, write_encoders, write_segmenter

HELPERS = ("captioner", "segmenter", "upscaler", "scorer", "safety_checker")
SOUND = [name for name in CHECKS if name not in HELPERS]
"""Checks that need no helper model."""
QUICK_TRAINING = {"max_train_steps": 8, "train_batch_size": 2, "checks": 0}
UNET = "unet/diffusion_pytorch_model.fp16.safetensors"
VAE = "vae/diffusion_pytorch_model.fp16.safetensors"
Damage = Callable[[Path], object]


def setup_at(folder: Path, **changes: Any) -> Setup:
    """A setup with small pictures and the shortest training that learns."""
    train = partial(train_lora, **QUICK_TRAINING)
    given = {"photo": packaged_photo(), "size": 64, "drawing_steps": 3, "train": train} | changes
    return Setup(folder=folder, **given)


def edit(file: str, **values: Any) -> Damage:
    """Change entries of a JSON file."""

    def damage(base: Path) -> None:
        path = base / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def weights(file: str, change: Callable[[dict[str, Tensor]], object]) -> Damage:
    """Change tensors of a safetensors file."""

    def damage(base: Path) -> None:
        tensors = load_file(base / file)
        change(tensors)
        save_file(tensors, base / file)

    return damage


def scaled(ending: str, factor: float) -> Callable[[dict[str, Tensor]], None]:
    """Multiply the first tensor whose name ends so."""

    def change(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in sorted(tensors) if name.endswith(ending))
        tensors[name] = (tensors[name].float() * factor).half()

    return change


def renamed(tensors: dict[str, Tensor]) -> None:
    tensors["conv_in.gamma"] = tensors.pop("conv_in.weight")


def with_huge_rows(tensors: dict[str, Tensor]) -> None:
    next(value for name, value in tensors.items() if "token_embedding" in name)[:3] *= 100


def without_a_merge(base: Path) -> None:
    path = base / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].pop(3)
    path.write_text(json.dumps(content))


not_a_number = scaled("conv_in.weight", float("nan"))


@pytest.fixture
def damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Damage], Path]:
    """Make a damaged copy of the miniature the base."""

    def make(damage: Damage) -> Path:
        base = shutil.copytree(TINY_BASE, tmp_path / "base")
        damage(base)
        monkeypatch.setenv("SDXL_BASE", str(base))
        return base

    return make


def differing(finding: Finding) -> list[str]:
    return [line.what for line in finding.lines if line.verdict == "differs"]


def test_all_checks_are_ok_on_the_miniature(tmp_path: Path):
    setup = setup_at(tmp_path)
    found = {name: run(name, setup) for name in SOUND}
    wrong = {name: (differing(one), one.error) for name, one in found.items() if differing(one) or one.error}
    assert not wrong
    assert {name for name, one in found.items() if one.status == "not for this base"} == {"configuration"}
    assert all(
        found[name].pictures for name in ("autoencoder_range", "latents", "drawing", "refiner", "training")
    )


@pytest.mark.parametrize(
    "name, damage, noticed",
    [
        ("files", weights(UNET, not_a_number), "unet: numbers that are not finite"),
        ("files", weights(UNET, renamed), "unet: names of weights"),
        ("tokenizers", edit("tokenizer_2/tokenizer_config.json", eos_token="!"), "highest id"),
        ("tokenizers", edit("text_encoder/config.json", vocab_size=1000), "as many ids"),
        ("pooling", edit("tokenizer_2/tokenizer_config.json", eos_token="!"), "diffusers, pooled"),
        ("embeddings", weights("text_encoder/model.fp16.safetensors", with_huge_rows), "length of new rows"),
        ("autoencoder_range", weights(VAE, not_a_number), "all values are finite"),
        ("autoencoder_range", weights(VAE, scaled("encoder.conv_out.weight", 3e4)), "force_upcast"),
        ("latents", edit("vae/config.json", scaling_factor=1.0), "standard deviation of all"),
        ("fp8_range", weights(UNET, scaled("transformer_blocks.0.norm1.weight", 5e3)), "clipped"),
        ("single_file", weights(UNET, not_a_number), "unet: tensors that change"),
    ],
)
def test_a_damaged_base_is_noticed(
    name: str, damage: Damage, noticed: str, damaged: Callable, tmp_path: Path
):
    damaged(damage)
    finding = run(name, setup_at(tmp_path))
    assert finding.status == "differs"
    assert any(noticed in what for what in differing(finding)), differing(finding)


@pytest.mark.parametrize(
    "file, key, value",
    [
        ("vae/config.json", "scaling_factor", 0.18215),
        ("unet/config.json", "in_channels", 9),
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
        ("scheduler/scheduler_config.json", "steps_offset", 0),
        ("text_encoder_2/config.json", "eos_token_id", 920),
        ("text_encoder/config.json", "hidden_act", "gelu"),
    ],
)
def test_a_configuration_other_than_that_of_sdxl_is_noticed(
    file: str, key: str, value: object, damaged: Callable, tmp_path: Path
):
    line = f"{file.partition('/')[0]}: {key}"
    sound = run("configuration", setup_at(tmp_path, expects_sdxl=True))
    assert line not in differing(sound)
    base = shutil.copytree(TINY_BASE, tmp_path / "other")
    setup = setup_at(tmp_path, expects_sdxl=True)
    setup.base = replace_folder(setup, base)
    edit(file, **{key: value})(base)
    assert line in differing(run("configuration", setup))


def replace_folder(setup: Setup, folder: Path) -> Any:
    """The base of `setup` in another folder, whatever is wrong with that."""
    from dataclasses import replace

    return replace(setup.base, folder=folder, vae=folder / "vae")


@pytest.mark.parametrize(
    "name", ["files", "configuration", "tokenizers", "refiner_files", "autoencoder_range"]
)
def test_a_miniature_is_not_taken_for_sdxl(name: str, tmp_path: Path):
    assert run(name, setup_at(tmp_path, expects_sdxl=True)).status == "differs"


def test_pictures_that_differ_from_diffusers_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SDXL_PREDICTION", "v_prediction")
    assert "difference from diffusers" in differing(run("drawing", setup_at(tmp_path)))[0]


@pytest.mark.parametrize(
    "name, damage, noticed",
    [
        ("refiner_files", edit("unet/config.json", cross_attention_dim=96), "width of prompts"),
        ("refiner_files", weights(UNET, not_a_number), "not finite"),
        ("refiner", weights(UNET, scaled("conv_out.weight", 300)), "correlation"),
    ],
)
def test_a_damaged_refiner_is_noticed(
    name: str, damage: Damage, noticed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    refiner = shutil.copytree(str(TINY_BASE) + "-refiner", tmp_path / "refiner")
    damage(Path(refiner))
    monkeypatch.setenv("SDXL_REFINER", str(refiner))
    assert any(noticed in what for what in differing(run(name, setup_at(tmp_path))))


def test_a_training_that_does_not_learn_is_noticed(tmp_path: Path):
    broken = partial(train_lora, **QUICK_TRAINING, lora_lr=1e4)
    setup = setup_at(tmp_path, train=broken)
    assert run("training", setup).status in ("differs", "could not run")


def test_a_training_that_fails_is_not_repeated(damaged: Callable, tmp_path: Path):
    damaged(weights(UNET, not_a_number))
    setup = setup_at(tmp_path)
    assert run("training", setup).status == "could not run"
    assert "see the check training" in run("lora_in_diffusers", setup).error


def test_a_lora_that_diffusers_reads_otherwise_is_noticed(fine_tunes: dict[str, Path], tmp_path: Path):
    tar, folder = fine_tunes["lora"], tmp_path / "trained"
    unpack(tar, folder)
    trained = Trained(tar=tar, folder=folder, losses=[], ends=[], pivot=0, peak_gib=None)
    weights("lora.safetensors", lambda tensors: [value.zero_() for value in tensors.values()])(folder)
    setup = setup_at(tmp_path, _trained=trained)
    assert "share of that change" in differing(run("lora_in_diffusers", setup))[0]


def test_other_versions_of_packages_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pins = tmp_path / "requirements.txt"
    pins.write_text("torch==1.0.0\nnumpy==2.4.6\nno-such-package==1.0\n")
    monkeypatch.setattr(machine, "PINS", (pins,))
    assert differing(run("machine", setup_at(tmp_path))) == ["version of torch", "version of no-such-package"]


# ---------------------------------------------------------------------------------------------------------------------
# Helper models


def test_a_captioner_without_words_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SDXL_CAPTIONER", str(write_captioner(tmp_path / "captioner")))
    found = {"sound": run("captioner", setup_at(tmp_path))}
    stops = "text_decoder.cls.predictions.bias"

    def end_at_once(tensors: dict[str, Tensor]) -> None:
        tensors[stops] = tensors[stops].clone()
        tensors[stops][3] = 1000.0

    weights("model.safetensors", end_at_once)(tmp_path / "captioner")
    found["silent"] = run("captioner", setup_at(tmp_path))
    assert "words after that" not in differing(found["sound"])
    assert "words after that" in differing(found["silent"])


def test_a_mask_that_misses_the_subject_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from sdxl.data.segmenter import segmenter

    folder = write_segmenter(tmp_path / "segmenter")
    last = "decoder.transposed_convolution.weight"
    weights("model.safetensors", lambda tensors: tensors[last].mul_(1000))(folder)  # its masks are hard now
    monkeypatch.setenv("SDXL_SEGMENTER", str(folder))
    photo = packaged_photo()
    with segmenter() as model:
        mask = torch.from_numpy(model.mask(photo.image, [photo.subject], 1.0))

    def differing_at(index: Tensor) -> list[str]:
        down, across = divmod(int(index), mask.shape[1])
        centre = (across / (mask.shape[1] - 1) + 1e-6, down / (mask.shape[0] - 1) + 1e-6)
        there = Photo(image=photo.image, name=photo.name, subject=photo.subject, centre=centre)
        return differing(run("segmenter", setup_at(tmp_path, photo=there)))

    assert differing_at(mask.argmax()) == []
    assert differing_at(mask.argmin()) == ["mask at the subject's middle"]
    weights("model.safetensors", lambda tensors: tensors["decoder.transposed_convolution.bias"].sub_(1e6))(
        folder
    )
    assert differing_at(mask.argmax()) == ['"a cat" is found']


def test_an_upscaler_that_blurs_is_noticed(
    upscaler_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("SDXL_UPSCALER", str(upscaler_folder))
    finding = run("upscaler", setup_at(tmp_path))  # it was taught on smooth noise only
    assert "sharpness, as a share of bicubic's" in differing(finding)
    assert "nearness to bicubic" not in differing(finding)


def test_a_scorer_that_sees_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name, value in write_encoders(tmp_path).items():
        monkeypatch.setenv(name, value)
    mirrored, text = "likeness of the mirrored photograph", "fit of its own text"
    assert mirrored not in differing(run("scorer", setup_at(tmp_path)))
    weights("model.safetensors", lambda tensors: tensors["layernorm.weight"].zero_())(tmp_path / "dino")
    weights("model.safetensors", lambda tensors: tensors["text_projection.weight"].zero_())(tmp_path / "clip")
    assert {mirrored, text} <= set(differing(run("scorer", setup_at(tmp_path))))


def test_judges_that_withhold_a_harmless_picture_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from PIL import Image

    checker = write_checker(tmp_path / "checker")  # its first concept is a red picture
    monkeypatch.setenv("SDXL_SAFETY_CHECKER", str(checker))
    assert run("safety_checker", setup_at(tmp_path)).status == "ok"
    red = Photo(image=Image.new("RGB", (64, 64), "red"), name="red", subject="nothing")
    assert differing(run("safety_checker", setup_at(tmp_path, photo=red))) == ["red is withheld"]
    monkeypatch.setattr(safety, "OPEN_NSFW_THRESHOLD", 0.0)
    assert "chelsea is withheld" in differing(run("open_nsfw", setup_at(tmp_path)))


# ---------------------------------------------------------------------------------------------------------------------
# The command and its page


def test_a_check_that_fails_does_not_stop_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
):
    arguments = ["--base", str(tmp_path / "nothing"), "--only", "files", "open_nsfw"]
    assert check_real.main([*arguments, "--output", str(tmp_path / "out"), "--offline"]) == 1
    facts = json.loads((tmp_path / "out" / page.FACTS).read_text())
    assert [finding["status"] for finding in facts["findings"]] == ["could not run", "ok"]
    assert "1 ok, 1 could not run" in capsys.readouterr().out


def test_the_page_needs_no_other_file_and_names_no_private_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ["--base", str(TINY_BASE), "--only", "files", "latents", "captioner", "--offline"]
    check_real.main([*arguments, "--output", str(tmp_path / "out")])
    text = (tmp_path / "out" / page.PAGE).read_text()
    assert text.count("data:image/jpeg;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:image/jpeg;base64,|#)', text)
    assert "<script" not in text
    assert "https://" not in text
    facts = json.loads((tmp_path / "out" / page.FACTS).read_text())
    for finding in facts["findings"]:
        assert finding["question"] in text
        assert all(line["what"] in text for line in finding["lines"])
    assert str(tmp_path) not in text + json.dumps(facts)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [page.PAGE, page.FACTS]


def test_what_strangers_wrote_is_shown_as_text():
    line = findings.Line(what="<b>", expected='"&', found="<script>alert(1)</script>", verdict="differs")
    finding = Finding(
        name="x", question="?", status="differs", seconds=0, peak_gib=1.5, lines=[line], error="<i>"
    )
    text = page.page({"base": "<u>"}, [finding])
    assert not re.search(r"<(script|b|i|u)>", text)
    assert "&lt;script&gt;" in text


def test_an_unknown_check_is_refused_with_the_list(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped:
        check_real.main(["--only", "filez", "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "no check filez: choose from machine, files" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
