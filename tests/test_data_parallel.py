"""One training in two processes, of one host or of two, on CPUs: equal weights everywhere, from the pictures of both."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.many_gpus import losses_alone
from preprocess import PreprocessConfig, prepare_dataset
from tests.conftest import QUICK, REPOSITORY, free_port, write_captioned_zip
from tests.parallel_work import MARK, compared_runs, learn
from tests.test_resume import examples, narrow_components
from tests.test_training import CONFIG

INPUTS = QUICK | {"max_train_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, narrow_base: Path) -> Path:
    """With a data set, `out` of a train.py that torchrun started, its `log`, and what each process learned."""
    folder = tmp_path_factory.mktemp("parallel")
    archive = write_captioned_zip(folder / "captioned.zip")
    prepare_dataset(archive, folder / "dataset", config=PreprocessConfig(target_size=CONFIG.resolution))
    inputs = {name: value for name, value in INPUTS.items() if name != "seed"}
    arguments = ["-m", "tests.parallel_work", str(folder), *_train_arguments(archive, folder / "out", inputs)]
    started = ["--nproc-per-node", "2", "--master-port", str(free_port())]
    [log] = _ended([_torchrun([*started, *arguments], narrow_base)])
    (folder / "log").write_text(log)
    return folder


def _train_arguments(archive: Path, out: Path, inputs: Mapping[str, Any]) -> list[str]:
    given = {"input_images": f"@{archive}", **inputs}
    return ["-o", str(out), *(f"-i{name}={value}" for name, value in given.items())]


def _torchrun(arguments: list[str], base: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"SDXL_BASE": str(base), "HF_HUB_OFFLINE": "1"}
    environment.pop("SDXL_WORKSPACE", None)  # as a user, whose runs are in the output folder
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _ended(processes: list[subprocess.Popen[str]], code: int = 0) -> list[str]:
    """What each of the processes wrote to stderr; all end with `code`."""
    with ThreadPoolExecutor() as threads:
        logs = list(threads.map(lambda process: process.communicate(timeout=200)[1], processes))
    for process, log in zip(processes, logs, strict=True):
        assert process.returncode == code, log[-3000:]
    return logs


def _two_hosts(
    archives: list[Path], outs: list[Path], base: Path, **inputs: Any
) -> list[subprocess.Popen[str]]:
    """One torchrun for each of two hosts, which meet at a port of this machine."""
    meet = [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{free_port()}",
        "--local-addr",
        "127.0.0.1",
    ]
    return [
        _torchrun(
            [
                "--nnodes",
                "2",
                "--nproc-per-node",
                "1",
                *meet,
                "train.py",
                *_train_arguments(archive, out, inputs),
            ],
            base,
        )
        for archive, out in zip(archives, outs, strict=True)
    ]


def test_two_hosts_train_as_two_processes_of_one(folder: Path, narrow_base: Path, tmp_path: Path):
    def content(tar: Path, name: str) -> bytes:
        with tarfile.open(tar) as archive:
            member = archive.extractfile(name)
            assert member is not None
            return member.read()

    of_one = folder / "out" / "trained_model.tar"
    seed = json.loads(content(of_one, "training.json"))["settings"]["seed"]
    archives = [Path(shutil.copy(folder / "captioned.zip", tmp_path / f"{host}.zip")) for host in "ab"]
    outs = [tmp_path / "a", tmp_path / "b"]
    logs = _ended(_two_hosts(archives, outs, narrow_base, **INPUTS | {"seed": seed}))
    [first] = [out for out in outs if out.exists()]
    assert sorted(path.name for path in first.iterdir()) == ["report.html", "trained_model.tar"]
    for name in ("lora.safetensors", "embeddings.pti", "special_params.json"):
        assert content(first / "trained_model.tar", name) == content(of_one, name)
    helper = logs[1 - outs.index(first)]
    assert "where the log and the results are" in helper and "Training" not in helper


def test_two_processes_learn_as_one(folder: Path, narrow_base: Path):
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    assert first["losses"] == second["losses"], "both report the mean"
    learn(folder, "alone", narrow_base)
    alone = torch.load(folder / "alone.pt")
    assert first["pictures"] == second["pictures"] == alone["pictures"], "encoded once, as by one"
    assert first["count"] == alone["count"] > 4, "with random crops"
    assert first["losses"] != pytest.approx(alone["losses"], rel=1e-3), "each sees other pictures and noise"
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name])
    assert all(torch.equal(one, two) for one, two in zip(first["rows"], second["rows"], strict=True))
    assert any(value.abs().max() > 0 for name, value in first["weights"].items() if "lora_B" in name)


@pytest.mark.parametrize("kind", ["lora", "full", "full_sharded"])
def test_two_processes_learn_as_one_with_their_pictures(folder: Path, kind: str):
    config = dataclasses.replace(compared_runs()[kind], shard=False)
    parts = narrow_components(torch.device("cpu"))
    alone = losses_alone(parts, examples(parts), config, 2)
    first, second = (json.loads((folder / f"{rank}.json").read_text())["losses"][kind] for rank in range(2))
    assert first == second
    assert first[0] != pytest.approx(first[-1], rel=1e-3), "it learns"
    assert first == pytest.approx(alone, rel=1e-4)


def test_processes_that_share_the_unet_learn_as_those_with_copies(folder: Path):
    found = json.loads((folder / "0.json").read_text())["shared"]
    assert found["shared_losses"] < 1e-4
    assert found["shared_weights"] < 2e-3, "in fp16, after steps of 1e-3"
    assert 0.5 < found["held"] < 0.52, "biases and norms are whole"


def test_torchrun_leaves_one_fine_tune(folder: Path):
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["report.html", "trained_model.tar"]
    _, mark, log = (folder / "log").read_text().partition(MARK)
    assert mark and log.count("Training a LoRA of rank 16") == 1
    assert log.count("Training tokens and UNet:   0%") == 1, "one process shows its progress"
