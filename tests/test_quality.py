"""The quality bench: the scorer's ceilings, what its measures mean, and small real runs of both harnesses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import base, dreambench, prompts, quality
from benchmarks.dreambench import real_scores
from benchmarks.judging import real_pictures, spread
from benchmarks.quality import flat_keys, markdown, summarise
from benchmarks.subject_job import training_pictures
from sdxl.data.picture_encoders import picture_encoders
from tests.conftest import REPOSITORY, TINY_BASE
from tests.tiny_helpers import write_encoders
from tiny_world.following import following, shares
from tiny_world.scorer import Scorer
from tiny_world.sheets import to_pil


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(device="cpu")


def test_the_scorer_tells_creatures_apart(scorer: Scorer):
    embedded = [scorer.identity(real_pictures(seed, 4)) for seed in (0, 2, 4, 6)]
    for i, own in enumerate(embedded):
        assert float((own @ own.T).min()) > 0.8
        for other in embedded[i + 1 :]:
            assert float((own @ other.T).max()) < 0.6


def test_the_scorer_sees_what_the_training_pictures_were_asked_to_show(scorer: Scorer):
    met = following(scorer.attributes(training_pictures(0).images), prompts.TRAINING)
    assert shares(met)["all"] >= 5 / 6
    wrong = following(scorer.attributes(training_pictures(0).images.flip(0)), prompts.TRAINING)
    assert shares(wrong)["all"] < 0.5


def test_prompts_ask_for_places_and_backgrounds_that_the_training_pictures_do_not_show():
    shown = {(scene.background, scene.texture) for scene in prompts.TRAINING}
    for text, scene in prompts.subject_prompts():
        assert prompts.NAME in text and (scene.background, scene.texture) not in shown
    assert all(prompts.KNOWN in text for text, _ in prompts.known_prompts())


def test_spread_is_nought_for_equal_pictures_and_the_distance_for_others():
    black, white = torch.zeros(3, 64, 64), torch.ones(3, 64, 64)
    assert spread(torch.stack([black, black]).unsqueeze(0)) == 0
    assert spread(torch.stack([black, white]).unsqueeze(0)) == pytest.approx(1)
    assert spread(black[None, None]) == 0


def test_fidelity_is_1_for_real_pictures_and_0_for_the_untuned_base():
    common = {
        "seed": 0,
        "real_similarity": 0.9,
        "prompt_all": 0.8,
        "prior_diversity": 0.3,
        "diversity": 0.2,
        "seconds": 1,
    }
    untuned = common | {"method": "untuned", "similarity": 0.1, "known_all": 1.0, "prior_all": 0.95}
    tuned = common | {"method": "full_pivotal", "similarity": 0.9, "prior_all": 0.9}
    table = summarise([untuned, tuned])
    assert table["untuned"]["fidelity"] == 0 and table["full_pivotal"]["fidelity"] == 1
    assert table["full_pivotal"]["prompt_share"] == 0.8
    assert flat_keys(table)["prior_drift_full_pivotal"] == pytest.approx(5)
    assert "full UNet + pivotal | 1.00 | 0.80" in markdown(table)


def test_a_small_run_of_the_quality_bench_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(base, "STEPS", 2)
    arguments = ["--subjects", "1", "--development", "--methods", "untuned", "lora_pivotal", "--steps", "2"]
    arguments += [
        "--batch-size",
        "2",
        "--side",
        "64",
        "--seeds",
        "1",
        "--sampling-steps",
        "1",
        "--workers",
        "1",
    ]
    arguments += ["--device", "cpu", "--workdir", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    quality.main(arguments)
    first = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "work").iterdir()}
    capsys.readouterr()
    quality.main([*arguments, "--base-prompts", "1"])
    table = capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "work").iterdir()} == first
    assert len(first) == 4 and "| LoRA + pivotal |" in table
    written = json.loads((tmp_path / "out" / "quality.json").read_text())
    keys = {"fidelity_lora_pivotal", "base_kind", "base_colour", "autoencoder_psnr", "machine", "versions"}
    assert keys <= written.keys()
    assert written["autoencoder_identity"] > 0.8  # of a subject that the autoencoder was never shown
    with Image.open(tmp_path / "out" / "quality.jpg") as sheet:
        assert sheet.width > 1000


@pytest.fixture
def _encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in write_encoders(tmp_path).items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("_encoders")
def test_dino_and_clip_give_unit_vectors_and_real_scores_leave_out_a_picture_against_itself():
    encoders = picture_encoders()
    pictures = list(torch.rand(3, 3, 40, 56))
    for vectors in (
        encoders.likeness(pictures),
        encoders.shown(pictures),
        encoders.texts(["a dog"]),
    ):
        assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-5)
    same = real_scores(encoders, [pictures[0], pictures[0]])
    assert same["dino"] == pytest.approx(1, abs=1e-5)
    assert real_scores(encoders, pictures)["dino"] < 0.99999


@pytest.mark.usefixtures("_encoders")
def test_a_small_run_of_the_dreambench_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "pictures" / "bear_plushie2"
    folder.mkdir(parents=True)
    for i, picture in enumerate(training_pictures(0).images[:3]):
        to_pil(picture).save(folder / f"{i}.png")
    dreambench.main(
        [
            str(tmp_path / "pictures"),
            *("--base", str(TINY_BASE), "--resolution", "64", "--steps", "2"),
            *(
                "--prompts",
                "2",
                "--seeds",
                "1",
                "--sampling-steps",
                "2",
                "--batch-size",
                "2",
                "--device",
                "cpu",
            ),
            *("--methods", "untuned base", "full UNet + pivotal", "--output", str(tmp_path / "out.json")),
        ]
    )
    scores = json.loads((tmp_path / "out.json").read_text())["scores"]
    assert set(scores) == {"real pictures", "untuned base", "full UNet + pivotal"}
    assert all(-1 <= value <= 1 for rows in scores.values() for row in rows for value in row.values())
    assert capsys.readouterr().out.startswith("| method | DINO | CLIP-I | CLIP-T |")


def test_the_refiner_draws_from_a_picture_with_its_second_encoder_alone():
    from diffusers import StableDiffusionXLImg2ImgPipeline

    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        REPOSITORY / "base_models" / "tiny-sdxl-refiner",
        variant="fp16",
        dtype=torch.float32,
        add_watermarker=False,
    )
    assert pipeline.text_encoder is None and pipeline.config["requires_aesthetics_score"]
    pipeline.set_progress_bar_config(disable=True)
    before = training_pictures(0).images[:1]
    output: Any = pipeline(
        "a photo of a robot on a plain white background",
        image=before,
        strength=0.2,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    assert float((output.images - before).abs().mean()) < 0.08, "a light refinement keeps the picture"
