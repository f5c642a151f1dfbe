"""What needs CUDA: a run that goes on in captured graphs ends where the run that never stopped does."""

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdxl.model.fine_tune_files import TrainedFineTune
from tests.test_resume import FULL, Runs, Stop, assert_equal, narrow_components

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LONG = dataclasses.replace(FULL, max_train_steps=20, caption_dropout=0.2, noise_offset=0.1)
"""Long enough that all graphs are captured before and after the pivot, which is step 10."""


@contextlib.contextmanager
def repeatable():
    """Kernels that always add up in one order. Those of attention's gradient do not: they add with atomics."""
    cudnn = torch.backends.cudnn
    before, cudnn.deterministic = cudnn.deterministic, True
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        cudnn.deterministic = before


def distance(one: TrainedFineTune, other: TrainedFineTune, start: TrainedFineTune) -> float:
    """How far apart two results are, relative to how far the first has come from `start`."""
    apart = sum(float((v.float() - other.weights[n].float()).square().sum()) for n, v in one.weights.items())
    moved = sum(float((v.float() - start.weights[n].float()).square().sum()) for n, v in one.weights.items())
    return (apart / moved) ** 0.5


@pytest.mark.parametrize("at", [7, 10, 16], ids=["before the pivot", "at the pivot", "after the pivot"])
@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"is_lora": True}, {"masks": True, "prior": True}),
        ({"is_lora": True, "cuda_graph": False}, {}),
        ({"is_lora": True, "optimizer": "adamw_8bit", "lora_rank": 128, "preservation": 1.0}, {}),
        ({}, {}),
        ({"optimizer": "adamw_8bit", "precision": "bf16"}, {}),
        ({"optimizer": "adafactor"}, {}),
        ({"is_lora": True, "optimizer": "prodigy", "lora_lr": 1.0}, {}),
    ],
)
def test_a_stopped_run_goes_on_to_the_last_bit_in_graphs(
    tmp_path: Path, changes: dict[str, Any], more: dict[str, Any], at: int
):
    config = dataclasses.replace(LONG, **changes)
    runs = Runs(narrow_components(torch.device("cuda")), tmp_path / "state")
    with repeatable():
        whole, losses = runs.train(config, **more)
        with pytest.raises(Stop):
            runs.train(config, until=at, every=4, **more)
        resumed, after = runs.train(config, go_on=True, **more)
    assert after == losses[at:]
    assert_equal(whole, resumed)


def test_a_state_that_is_copied_beside_the_next_step_is_whole(tmp_path: Path):
    """The copies of a periodic state run on a stream of their own, and the next update waits for them."""
    runs = Runs(narrow_components(torch.device("cuda")), tmp_path / "state")
    with repeatable():
        whole, losses = runs.train(LONG, every=3)
        [last] = runs.state.glob("*/step-000018")
        resumed, after = runs.train(LONG, go_on=True)
    assert last.exists() and after == losses[18:]
    assert_equal(whole, resumed)


def test_with_the_fast_kernels_a_run_goes_on_as_exactly_as_it_repeats(tmp_path: Path):
    """Atomics add in another order each time, so that equal runs differ too: going on may cost no more than that."""
    config = dataclasses.replace(LONG, is_lora=True)
    runs = Runs(narrow_components(torch.device("cuda")), tmp_path / "state")
    start, _ = runs.train(dataclasses.replace(config, max_train_steps=1, lora_lr=0.0))
    whole, again = (runs.train(config)[0] for _ in range(2))
    with pytest.raises(Stop):
        runs.train(config, until=7, every=4)
    resumed, _ = runs.train(config, go_on=True)
    repeats, goes_on = distance(whole, again, start), distance(whole, resumed, start)
    sys.stdout.write(f"Equal runs differ by {repeats:.1e} of the way, a resumed one by {goes_on:.1e}.\n")
    assert goes_on <= 3 * repeats
