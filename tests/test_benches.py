"""The benches of the recipe: their variants are valid, their sums right, and real pictures get the best marks."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import ablation, cases, few, many_gpus
from benchmarks import prompts as P
from benchmarks.subject_job import SETTINGS
from sdxl.training.config import TrainingConfig
from tiny_world.parts import pad
from tiny_world.raster import render
from tiny_world.scorer import Scorer
from tiny_world.subjects import shot_parts, subject
from tiny_world.words import COLOURS, KINDS, RELATIONS, TEXTURES


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer()


@pytest.mark.parametrize("base", [ablation.FULL, ablation.LORA])
def test_every_variant_is_a_valid_training(base):
    made = ablation.variants(base, 200, 2)
    assert len({method.name for method in made}) == len(made)
    default = next(m for m in made if m.name.endswith("/default/0"))
    for method in made:
        settings = {
            **SETTINGS,
            "base": "b",
            "token_map": "TOK:2",
            "resolution": 256,
            "max_train_steps": 200,
            "train_batch_size": 4,
            **method.settings,
        }
        TrainingConfig(**settings, lr_warmup_steps=5)
        changed = dataclasses.replace(method, name=default.name) != default
        assert changed == (method.name != default.name)
    rate = "lora_lr" if base is ablation.LORA else "unet_learning_rate"
    twice = next(m for m in made if "/twice the learning rate/" in m.name)
    assert twice.settings[rate] == 2 * base.settings[rate]
    assert next(m for m in made if "/four times the steps/" in m.name).settings["max_train_steps"] == 800


def test_gains_are_paired_by_subject_and_seed():
    def result(subject_seed: int, method: str, similarity: float) -> dict:
        return {
            "seed": subject_seed,
            "method": method,
            "similarity": similarity,
            "real_similarity": 1.0,
            "prompt_all": 0.5,
            "prior_all": 0.9,
            "diversity": 0.1,
        }

    results = [result(s, "untuned", 0.0) for s in (0, 2)]
    results += [result(0, "full/default/0", 0.6), result(2, "full/default/0", 0.8)]
    results += [result(0, "full/more/0", 0.7), result(2, "full/more/0", 1.0)]
    row = ablation.summarise(results)["full/more"]
    assert row["fidelity"] == pytest.approx(0.85)
    assert row["gain"] == pytest.approx(7.5)  # 100 * 0.5 * mean of 0.1 and 0.2
    assert row["gain_error"] == pytest.approx(2.5)
    assert "+7.5 ± 2.5" in ablation.markdown(ablation.summarise(results))


def test_real_pictures_of_two_subjects_are_told_apart(scorer: Scorer):
    case = cases.two_subjects(0)
    assert len(case.pictures) == len(case.captions) == 12
    scenes = [scene for _, scene in P.subject_prompts()[:8]]
    parts = [
        shot_parts(scene, {P.NAME: subject(seed)}, 5000 + i)
        for seed in (0, 2)
        for i, scene in enumerate(scenes)
    ]
    numbers = case.judge(render(pad(parts)).images, scorer)
    assert numbers["confusion"] == 0 and numbers["prompt"] > 0.9
    assert min(numbers[f"similarity_{name}"] for name in ("TOK", "OTHER")) > 0.9
    swapped = case.judge(render(pad(parts[8:] + parts[:8])).images, scorer)
    assert swapped["confusion"] == 1


def test_clutter_is_of_this_world_and_masked_out():
    for kind, colour, relation, background, texture in cases.CLUTTER:
        assert kind in KINDS and colour in COLOURS and relation in RELATIONS
        assert background in COLOURS and texture in TEXTURES and colour != background
    case = cases.cluttered(0)
    share = case.masks.mean((1, 2, 3))
    assert ((share > 0.05) & (share < 0.5)).all()


def test_a_style_is_known_by_its_inks(scorer: Scorer):
    case = cases.style(0)
    pictures = case.pictures.repeat(2, 1, 1, 1)[: len(case.prompts)]
    assert case.judge(pictures, scorer)["style"] > 0.99
    assert case.judge(torch.rand_like(pictures), scorer)["style"] < 0.5


def test_a_case_runs_through(monkeypatch: pytest.MonkeyPatch):
    args = argparse.Namespace(steps=2, batch_size=2, device="cpu", sampling_steps=1, side=64)
    case = dataclasses.replace(cases.cluttered(0), prompts=["a photo of TOK"])
    case = dataclasses.replace(case, judge=lambda drawn, scorer: {"count": float(len(drawn))})
    method = dataclasses.replace(cases.LORA, views=0, masks=True)
    assert cases.judge_method(case, method, args) == {"count": 1.0}


def test_fidelity_is_between_the_untuned_base_and_real_pictures():
    numbers = {"real_TOK": 0.9, "similarity_TOK": 0.5, "prompt": 0.8}
    untuned = {"real_TOK": 0.9, "similarity_TOK": 0.1, "prompt": 0.7}
    assert cases.fidelities(numbers, untuned) == pytest.approx({"prompt": 0.8, "fidelity_TOK": 0.5})


def test_few_pictures_are_summed_up_over_subjects_and_seeds(tmp_path: Path):
    made = few.methods(2, 1)
    assert [m.name for m in made[:3]] == ["untuned", "few_1/0", "few_1/1"] and made[-1].name == "few_6_long/0"
    assert made[-1].steps_factor == 4 and made[-1].pictures == 6 and made[1].views is None
    pictures = torch.zeros(len(P.subject_prompts()), 3, 8, 8, dtype=torch.uint8)

    def result(seed: int, method: str, similarity: float, prior: float = 0.9) -> dict:
        numbers = {"similarity": similarity, "real_similarity": 1.0, "prompt_all": 0.8, "prior_all": prior}
        return {"seed": seed, "method": method, "pictures": pictures, **numbers}

    results = [result(seed, "untuned", 0.0, 1.0) | {"known_all": 1.0} for seed in (1, 3)]
    for method in made[1:]:
        long = method.name.startswith(few.LONG)
        results += [result(seed, method.name, (0.9 if long else 0.5) + seed / 100) for seed in (1, 3)]
    table = few.summarise(results)
    assert table["few_1"] == {
        "score": pytest.approx(41.6),
        "fidelity": pytest.approx(52.0),
        "prompt": pytest.approx(80.0),
        "drift": pytest.approx(10.0),
        "score_error": pytest.approx(0.46, abs=0.01),
        "runs": 4,
    }
    keys = few.flat_keys(table)
    assert {*few.CASES, "few_worst_drift", "long_score_loss", "long_drift"} == {*keys}
    assert keys["long_score_loss"] == pytest.approx(-32.0) and keys["few_worst_drift"] == pytest.approx(10.0)
    assert "| 3 pictures, one caption for all | 41.6 ± 0.5 | 52 | 80 | 10.0 | 4 |" in few.markdown(table)
    few.save_sheet(results, tmp_path / "few.jpg")
    assert (tmp_path / "few.jpg").stat().st_size > 1000


def test_many_gpus_are_compared_with_one():
    assert [many_gpus.counts(gpus) for gpus in (1, 2, 3, 4, 8)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 8],
    ]

    def run(kind: str, gpus: int, *, losses_of: int = 0, batch: int = 4, steps: int = 0) -> dict | None:
        if losses_of:
            return {"losses": [1.0, 0.5 if gpus == 1 else 0.505]}
        if batch > (6 if kind == "full" else 11):
            return None
        return {"after_pivot_ms": {1: 100, 2: 110, 4: 125}[gpus] * (2 if kind == "full_sharded" else 1)}

    found = many_gpus.speeds(run, 4, [*many_gpus.KINDS])
    assert found["lora_gpus_1_speedup"] == 1 and found["lora_gpus_2_speedup"] == pytest.approx(1.818)
    assert found["full_gpus_4_speedup"] == 3.2 and found["full_sharded_gpus_4_speedup"] == 1.6
    assert "full_sharded, 1 GPU" not in found["rows"], "one GPU cannot share"
    assert found["rows"]["lora, 4 GPUs"] == {
        "after_pivot_ms": 125,
        "pictures_per_s": 128.0,
        "share_of_linear": 0.8,
    }
    losses = many_gpus.learns_alike(run, 2, ["full", "full_sharded"])
    assert losses["full_sharded_gpus_2_loss_difference"] == pytest.approx(0.01)
    batches = many_gpus.largest_batches(run, 2)
    assert (batches["full_gpus_2_largest_batch"], batches["full_sharded_gpus_2_largest_batch"]) == (6, 11)


@pytest.mark.parametrize("answer", [0, 1, 5, 8, 63, 64, 100])
def test_the_largest_that_fits_is_found_in_few_tries(answer: int):
    tried: list[int] = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= answer

    assert many_gpus.largest(fits, 64) == min(answer, 64)
    assert len(tried) == len(set(tried)) <= 13 and max(tried) <= 64
