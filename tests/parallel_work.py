"""What each process of `test_data_parallel` does under torchrun: a training of its own parts, then the whole train.py.

Arguments: the folder with the data set, then those of train.py.
"""

import dataclasses
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import torch

from dataset_and_utils import TokenMap
from sdxl.model.components import load_components
from sdxl.training import data_parallel
from sdxl.training.examples import cache_examples
from sdxl.training.recipe import fine_tune
from sdxl.training.state_files import STATE
from tests.conftest import REPOSITORY, TINY_BASE
from tests.test_resume import SMALL, Runs, assert_equal, narrow_components
from tests.test_training import CONFIG

MARK = "From here on train.py writes.\n"
"""Written to stderr when no process writes any more."""


def learn(folder: Path, name: str) -> None:
    """Train on the data set in `folder`; what was learned is in the file `name`.pt."""
    config = dataclasses.replace(CONFIG, is_lora=True, lora_lr=1e-3, max_train_steps=4)
    components = load_components(TINY_BASE, is_lora=True, device=torch.device("cpu"))
    data = cache_examples(folder / "dataset", components, TokenMap.parse(config.token_map), seed=0)
    losses: list[float] = []
    model = fine_tune(components, data, config, on_step=lambda report: losses.append(report.loss))
    torch.save({"weights": model.weights, "rows": model.token_rows, "losses": losses}, folder / f"{name}.pt")


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


def work(folder: Path) -> None:
    """Check the group of processes, and train in it."""
    rank = int(os.environ["RANK"])
    data_parallel.join()
    assert (data_parallel.rank(), data_parallel.world_size()) == (rank, 2)
    assert data_parallel.agreed(rank + 5) == 5
    mixed = [torch.full((2, 3), float(rank)), torch.full((4,), 2.0 * rank, dtype=torch.bfloat16)]
    data_parallel.average(mixed)
    assert mixed[0].tolist() == [[0.5] * 3] * 2 and mixed[1].tolist() == [1.0] * 4
    learn(folder, str(rank))
    go_on(folder)
    torch.distributed.barrier()
    if rank == 0:
        sys.stderr.write(MARK)
        sys.stderr.flush()
    torch.distributed.barrier()


if __name__ == "__main__":
    work(Path(sys.argv.pop(1)))
    runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
