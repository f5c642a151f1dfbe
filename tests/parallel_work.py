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

import pytest
import torch
from torch import nn

from benchmarks.many_gpus import KINDS, compared, largest_difference, losses_together
from dataset_and_utils import TokenMap
from sdxl.errors import UserInputError
from sdxl.model.components import load_components
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.training import data_parallel, gradient_average
from sdxl.training.config import TrainingConfig
from sdxl.training.examples import cache_examples
from sdxl.training.gradient_average import GradientAverage
from sdxl.training.recipe import fine_tune
from sdxl.training.resuming import digest, require_one_run
from sdxl.training.sharding import set_whole, whole
from sdxl.training.state_files import STATE
from sdxl.training.trainable import full_unet
from tests.conftest import REPOSITORY
from tests.test_resume import FULL, SMALL, Runs, assert_equal, examples, narrow_components
from tests.test_training import CONFIG

MARK = "From here on train.py writes.\n"
"""Written to stderr when no process writes any more."""


def learn(folder: Path, name: str, base: Path) -> None:
    """Train `base` on the data set in `folder`; what was learned is in the file `name`.pt."""
    config = dataclasses.replace(CONFIG, is_lora=True, lora_lr=1e-3, max_train_steps=4)
    components = load_components(base, is_lora=True, device=torch.device("cpu"))
    data = cache_examples(folder / "dataset", components, TokenMap.parse(config.token_map), seed=0, views=2)
    losses: list[float] = []
    model = fine_tune(components, data, config, on_step=lambda report: losses.append(report.loss))
    learned = {"weights": model.weights, "rows": model.token_rows, "losses": losses}
    torch.save({**learned, "pictures": digest((data,)), "count": len(data)}, folder / f"{name}.pt")


def go_on(state: Path, config: TrainingConfig, *, masks: bool = False) -> tuple[TrainedFineTune, list[float]]:
    """Train, go back to the state amid the run, and end at the same weights. Returns them and the losses."""
    runs = Runs(narrow_components(torch.device("cpu")), state)
    whole, losses = runs.train(config, every=2, masks=masks)
    if data_parallel.agreed(data_parallel.rank()) == data_parallel.rank():  # the states are complete
        [last] = runs.state.glob("*/step-000004")
        orders = json.loads((last / STATE).read_text())["orders"]
        first, second = (order["generators"]["recipe"] for order in orders)
        assert first != second, "each draws its own noise"
        shutil.rmtree(last)
    data_parallel.agreed(0)
    resumed, after = runs.train(config, go_on=True, masks=masks)
    assert after == losses[2:]
    assert_equal(whole, resumed)
    return whole, losses


def share(folder: Path) -> dict[str, float]:
    """Full training with a UNet that the processes share, next to one with copies. Returns the largest differences."""
    # With the base as teacher: before training, and outside masks.
    config = dataclasses.replace(FULL, preservation=1.0, shard=True)
    copied = Runs(narrow_components(torch.device("cpu")), folder / "none")
    plain, losses = copied.train(dataclasses.replace(config, shard=False), masks=True)
    shared, of_shared = go_on(folder / "shared", config, masks=True)
    assert bool(shared.weights) == (data_parallel.rank() == 0), "the first process alone gets the weights"
    moved = [
        (value.float() - plain.weights[name].float()).abs().max() for name, value in shared.weights.items()
    ]
    found = {
        "shared_losses": largest_difference(of_shared, losses),
        "shared_weights": float(max(moved, default=0)),
    }
    parts = narrow_components(torch.device("cpu"))
    trained = full_unet(parts.unet, dataclasses.replace(config, optimizer="adamw_8bit"))
    assert trained.weights.shards is not None
    held = sum(p.numel() for p in trained.weights.params)
    found["held"] = held / sum(p.numel() for p in parts.unet.parameters())
    for weight in parts.unet.parameters():
        before = whole(weight.detach()).clone()
        set_whole(weight, 2 * before)
        assert torch.equal(whole(weight.detach()), 2 * before)
    return found


def average_on_the_way(rank: int) -> None:
    """Gradients are averaged while the backward pass goes on, in any layout and dtype, in messages of several."""
    for anew in (False, True):
        weights = [nn.Parameter(torch.full((8, 4, 3, 3), 1.0)) for _ in range(3)]
        weights[1].data = weights[1].data.to(memory_format=torch.channels_last)
        weights.append(nn.Parameter(torch.ones(8, 4, 3, 3, dtype=torch.bfloat16)))
        weights.append(nn.Parameter(torch.ones(2)))  # too small for a message on the way
        scale = torch.arange(288.0).view(8, 4, 3, 3)
        averaged = GradientAverage(weights)
        for step in range(2):
            before = [weight.grad for weight in weights]
            for weight in weights:
                if anew or weight.grad is None:
                    weight.grad = None
                else:
                    weight.grad.zero_()
            for last in (False, True):  # two backward passes add up, and only the second is sent
                with averaged.during(last=last):
                    sum((weight.float() * scale * rank).sum() for weight in weights[:-1]).add(
                        weights[-1].sum() * rank
                    ).backward()
            received = averaged.receive()
            assert len(received) == 4
            rest = [weight.grad for weight in weights if weight.grad is not None]
            averaged.finish(rest, received=received)
            for weight in weights[:-1]:  # the mean of 0 and 2 · scale
                assert weight.grad is not None and weight.grad.stride() == weight.stride()
                torch.testing.assert_close(weight.grad.float(), scale, rtol=1e-2, atol=0)
            assert rest[-1].tolist() == [1.0, 1.0]
            if step and not anew:
                assert [id(weight.grad) for weight in weights] == [id(gradient) for gradient in before]
        # A frozen parameter is left out, whatever gradient it still has.
        weights[0].requires_grad_(False)
        with averaged.during(last=True):
            weights[1].sum().backward()
        assert len(averaged.receive()) == 3


def compared_runs() -> dict[str, TrainingConfig]:
    """Kind of training → a short one, whose losses are compared with those of one process."""
    return {
        kind: dataclasses.replace(compared(SMALL), **changes, max_train_steps=3, unet_learning_rate=1e-3)
        for kind, changes in KINDS.items()
    }


def losses_of_each() -> dict[str, list[float]]:
    """The losses of two processes in each kind of training."""
    found = {}
    for kind, config in compared_runs().items():
        parts = narrow_components(torch.device("cpu"))
        found[kind] = losses_together(parts, examples(parts), config)
    return found


def work(folder: Path) -> None:
    """Check the group of processes, and train in it."""
    rank = int(os.environ["RANK"])
    data_parallel.join()
    assert (data_parallel.rank(), data_parallel.world_size()) == (rank, 2)
    assert data_parallel.agreed(rank + 5) == 5
    mixed = [torch.full((2, 3), float(rank)), torch.full((4,), 2.0 * rank, dtype=torch.bfloat16)]
    data_parallel.average(mixed)
    assert mixed[0].tolist() == [[0.5] * 3] * 2 and mixed[1].tolist() == [1.0] * 4
    own = {"settings": {"lora_rank": 4 + rank}}
    for record, captions, what in (
        (own, [], "inputs"),
        ({"settings": {}}, [f"{rank}"], "pictures or captions"),
    ):
        with pytest.raises(UserInputError, match=f"was given other {what} than"):
            require_one_run(record, captions)
    require_one_run({"settings": {}}, ["equal"])
    gradient_average.LARGE_BYTES, gradient_average.MESSAGE_BYTES = 256, 2048  # as small as the weights here
    average_on_the_way(rank)
    learn(folder, str(rank), Path(os.environ["SDXL_BASE"]))
    go_on(folder / "state", SMALL)
    measured = {"shared": share(folder), "losses": losses_of_each()}
    (folder / f"{rank}.json").write_text(json.dumps(measured))
    torch.distributed.barrier()
    if rank == 0:
        sys.stderr.write(MARK)
        sys.stderr.flush()
    torch.distributed.barrier()


if __name__ == "__main__":
    work(Path(sys.argv.pop(1)))
    runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
