"""One training in two processes, on CPUs: equal weights everywhere, from the pictures of both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from preprocess import PreprocessConfig, prepare_dataset
from tests.conftest import QUICK, REPOSITORY, TINY_BASE, free_port, write_captioned_zip
from tests.parallel_work import MARK, learn
from tests.test_training import CONFIG


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a data set, `out` of a train.py that torchrun started, its `log`, and what each process learned."""
    folder = tmp_path_factory.mktemp("parallel")
    archive = write_captioned_zip(folder / "captioned.zip")
    prepare_dataset(archive, folder / "dataset", config=PreprocessConfig(target_size=CONFIG.resolution))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command += [str(free_port()), "-m", "tests.parallel_work", str(folder)]
    settings = {name: value for name, value in QUICK.items() if name != "seed"} | {"max_train_steps": 2}
    inputs = {"input_images": f"@{archive}", **settings}
    command += ["-o", str(folder / "out"), *(f"-i{name}={value}" for name, value in inputs.items())]
    environment = os.environ | {"SDXL_BASE": str(TINY_BASE), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "log").write_text(done.stderr)
    return folder


def test_two_processes_learn_as_one(folder: Path):
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    assert first["losses"] == second["losses"], "both report the mean"
    learn(folder, "alone")
    alone = torch.load(folder / "alone.pt")
    assert first["losses"] != pytest.approx(alone["losses"], rel=1e-3), "each sees other pictures and noise"
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name])
    assert all(torch.equal(one, two) for one, two in zip(first["rows"], second["rows"], strict=True))
    assert any(value.abs().max() > 0 for name, value in first["weights"].items() if "lora_B" in name)


def test_torchrun_leaves_one_fine_tune(folder: Path):
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["report.html", "trained_model.tar"]
    _, mark, log = (folder / "log").read_text().partition(MARK)
    assert mark and log.count("Training a LoRA of rank 16") == 1
    assert log.count("Training tokens and UNet:   0%") == 1, "one process shows its progress"
