"""The benchmark of the best moment: what it would choose, and how it is summarised."""

from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.best import chosen_step, summarise
from sdxl.history import Check
from sdxl.training.best_moment import PATIENCE


def checks_of(*followed: float) -> list[Check]:
    """A check after every tenth step; all have learned equally much."""
    return [
        Check(step=10 * n, strength=1.0, held_out={"low": 0.5}, followed=value, drift=0.0, score=0.0)
        for n, value in enumerate(followed, 1)
    ]


def test_a_run_that_stops_early_cannot_choose_what_comes_later():
    falling = [0.6, 0.9, *[0.5] * (PATIENCE + 1)]
    assert chosen_step(checks_of(*falling, 1.0), pivot=0) == 20
    assert chosen_step(checks_of(*falling, 1.0), pivot=1000) == 10 * (len(falling) + 1), "too early to stop"
    assert chosen_step(checks_of(0.6, 0.9, 0.91), pivot=0) == 30


def judged(similarity: float, prior: float = 0.9) -> dict[str, float]:
    return {
        "similarity": similarity,
        "real_similarity": 1.0,
        "prompt_all": 0.8,
        "known_all": 0.8,
        "prior_all": prior,
    }


def result(factor: float, followed: list[float], similarities: list[float]) -> dict[str, Any]:
    moments = [
        {"check": asdict(check), "judged": judged(similarity)}
        for check, similarity in zip(checks_of(*followed), similarities, strict=True)
    ]
    weaker = {"0.7": judged(0.5, prior=0.7)}
    return {"seed": 1, "pictures": 3, "factor": factor, "pivot": 0, "moments": moments, "weaker": weaker}


def test_the_chosen_moment_is_compared_with_the_best_and_the_last():
    base = {"seed": 1, "pictures": 0, "base": judged(0.0)}
    short = result(1.0, [0.5, 0.9], [0.6, 0.9])
    long = result(4.0, [0.9, 0.5], [0.8, 0.7])
    wrong = result(4.0, [0.5, 0.9], [0.9, 0.6])
    found = summarise([base, short, long, wrong])
    assert found["runs"] == 3 and found["within_2_points_share"] == pytest.approx(2 / 3, abs=1e-3)
    assert found["long_score_loss"] == pytest.approx(90 - (80 + 60) / 2)
    row = found["table"]["3 pictures, 4x"]
    assert row["chosen"] == 70 and row["best"] == 85 and row["last"] == 65 and row["earlier"] == 0.5
    assert row["strength 0.7"] == pytest.approx(50 - 100 * 0.2 / 2)
