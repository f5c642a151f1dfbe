"""One training in two processes, on CPUs: equal weights everywhere, from the pictures of both."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from dataset_and_utils import TokenMap
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.model.components import load_components
from sdxl.training import data_parallel
from sdxl.training.examples import cache_examples
from sdxl.training.recipe import fine_tune
from sdxl.training.state_files import STATE
from tests.conftest import QUICK, REPOSITORY, TINY_BASE, free_port
from tests.test_resume import SMALL, Runs, assert_equal, narrow_components
from tests.test_training import CONFIG


def work(rank: int, folder: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    data_parallel.join()
    assert (data_parallel.rank(), data_parallel.world_size()) == (rank, 2)
    assert data_parallel.agreed(rank + 5) == 5
    mixed = [torch.full((2, 3), float(rank)), torch.full((4,), 2.0 * rank, dtype=torch.bfloat16)]
    data_parallel.average(mixed)
    assert mixed[0].tolist() == [[0.5] * 3] * 2 and mixed[1].tolist() == [1.0] * 4

    learn(folder, str(rank))
    go_on(Path(folder))
    torch.distributed.destroy_process_group()


def learn(folder: str, name: str) -> None:
    config = dataclasses.replace(CONFIG, is_lora=True, lora_lr=1e-3)
    components = load_components(TINY_BASE, is_lora=True, device=torch.device("cpu"))
    data = cache_examples(Path(folder) / "dataset", components, TokenMap.parse(config.token_map), seed=0)
    losses: list[float] = []
    model = fine_tune(components, data, config, on_step=lambda report: losses.append(report.loss))
    torch.save({"weights": model.weights, "rows": model.token_rows, "losses": losses}, f"{folder}/{name}.pt")


def go_on(folder: Path) -> None:
    """Train, go back to the state amid the run, and end at the same weights."""
    runs = Runs(narrow_components(torch.device("cpu")), folder / "state")
    whole, losses = runs.train(SMALL, every=2)
    if data_parallel.agreed(data_parallel.rank()) == data_parallel.rank():  # the states are complete
        [last] = runs.state.glob("*/step-000004")
        orders = json.loads((last / STATE).read_text())["orders"]
        first, second = (order["generators"]["recipe"] for order in orders)
        assert first != second, "each draws its own noise"
        shutil.rmtree(last)
    data_parallel.agreed(0)
    resumed, after = runs.train(SMALL, go_on=True)
    assert after == losses[2:]
    assert_equal(whole, resumed)


def test_two_processes_learn_as_one(captioned_zip: Path, tmp_path: Path):
    prepare_dataset(
        captioned_zip, tmp_path / "dataset", config=PreprocessConfig(target_size=CONFIG.resolution)
    )
    torch.multiprocessing.spawn(work, (str(tmp_path), free_port()), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["losses"] == second["losses"], "both report the mean"
    learn(str(tmp_path), "alone")
    alone = torch.load(tmp_path / "alone.pt")
    assert first["losses"] != pytest.approx(alone["losses"], rel=1e-3), "each sees other pictures and noise"
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name])
    assert all(torch.equal(one, two) for one, two in zip(first["rows"], second["rows"], strict=True))
    assert any(value.abs().max() > 0 for name, value in first["weights"].items() if "lora_B" in name)


def test_torchrun_leaves_one_fine_tune(captioned_zip: Path, tmp_path: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command += [
        str(free_port()),
        "train.py",
        "-o",
        str(tmp_path / "out"),
        "-i",
        f"input_images=@{captioned_zip}",
    ]
    settings = {name: value for name, value in QUICK.items() if name != "seed"}
    command += [word for name, value in settings.items() for word in ("-i", f"{name}={value}")]
    environment = os.environ | {"SDXL_BASE": str(TINY_BASE), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "trained_model.tar"]
    assert done.stderr.count("Training a LoRA of rank 16") == 1
    assert done.stderr.count("Training tokens and UNet:   0%") == 1, "one process shows its progress"
