"""A run that stops and goes on is the run that never stopped, to the last bit."""

import copy
import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dataset_and_utils import Example, ExampleDataset, TokenMap
from sdxl import settings, shutdown
from sdxl.errors import TrainingDivergedError, UserInputError, WeightsError
from sdxl.files.sources import allowed_state
from sdxl.model.components import Components, add_placeholder_tokens, load_components
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.training.batches import Batches
from sdxl.training.data_parallel import agreed, rank
from sdxl.training.optimizers import Group, Optimizers
from sdxl.training.recipe import StepReport, fine_tune
from sdxl.training.resuming import chosen
from sdxl.training.run_state import RunState
from sdxl.training.state_files import RECORD, STATE, TENSORS, read_state, software
from sdxl.training.state_folders import RunFolder, state_at, sweep
from sdxl.training.states import RunStates
from sdxl.training.step import TrainingStep
from sdxl.training.watch import Watch
from tests.conftest import TINY_BASE
from tests.test_faults import full_disk
from tests.test_training import CONFIG
from tests.tiny_helpers import narrow_unet

FULL = dataclasses.replace(CONFIG, train_batch_size=1, max_train_steps=4)
SMALL = dataclasses.replace(FULL, is_lora=True)


class Stop(BaseException):
    """As Cog's cancelling."""


@pytest.fixture(scope="module")
def base() -> Components:
    """The miniature with a far narrower UNet with random weights."""
    return narrow_components(torch.device("cpu"))


def narrow_components(device: torch.device) -> Components:
    components = load_components(TINY_BASE, is_lora=True, device=device)
    components.unet = narrow_unet().to(device).requires_grad_(False)
    return components


@dataclasses.dataclass
class Runs:
    """Runs with one data set, each in components of its own."""

    base: Components
    state: Path

    def train(
        self, config: Any, *, until: int | None = None, every: int = 0, go_on: bool = False, **more: Any
    ) -> tuple[TrainedFineTune, list[float]]:
        """Train with `config`, stopped after the step `until`; the result and the losses."""
        components = copy.deepcopy(self.base)
        data = examples(components, masks=more.pop("masks", False))
        prior = examples(components) if more.pop("prior", False) else None
        saved = agreed(state_at(self.state) if go_on and rank() == 0 else None)
        if saved and rank() > 0:
            saved = dataclasses.replace(saved, folder=Path("of another host"))
        losses: list[float] = []

        def on_step(report: StepReport) -> None:
            losses.append(report.loss)
            torch.randn(report.step)  # as previews do
            if report.step == until:
                raise more.get("error", Stop())

        folder = RunFolder(self.state, "key", saved if rank() == 0 else None)
        with RunStates(folder, {}, every=every, goes_on=saved) as states:
            model = fine_tune(components, data, config, prior=prior, states=states, on_step=on_step)
        states.wait()
        folder.close()
        return model, losses


def examples(components: Components, *, masks: bool = False) -> ExampleDataset:
    """Five random pictures of two shapes."""
    add_placeholder_tokens(components, TokenMap.parse("TOK:2"))
    draw = torch.Generator().manual_seed(1)
    ids = [
        tokenizer("a photo of <s0><s1>", padding="max_length", return_tensors="pt").input_ids[0]
        for tokenizer in components.tokenizers
    ]
    made = []
    for width in (8, 8, 8, 4, 4):
        mask = torch.ones(1, 8, width)
        mask[..., : width // 2] = 0 if masks else 1
        tensors = (
            torch.randn(4, 8, width, generator=draw),
            mask,
            *ids,
            torch.tensor([64.0, 64, 0, 0, 64, 64]),
        )
        latents, mask, first, second, times = (tensor.to(components.device) for tensor in tensors)
        made.append(Example(latents=latents, mask=mask, token_ids=(first, second), time_ids=times))
    return ExampleDataset(made)


@pytest.fixture
def runs(base: Components, tmp_path: Path) -> Runs:
    return Runs(base, tmp_path / "state")


def assert_equal(one: TrainedFineTune, other: TrainedFineTune) -> None:
    assert one.weights.keys() == other.weights.keys()
    assert [name for name, value in one.weights.items() if not torch.equal(value, other.weights[name])] == []
    assert all(torch.equal(a, b) for a, b in zip(one.token_rows, other.token_rows, strict=True))


CASES: dict[str, tuple[dict[str, Any], int, dict[str, bool]]] = {
    "lora before the pivot": ({"is_lora": True}, 1, {}),
    "lora at the pivot": ({"is_lora": True, "lr_scheduler": "cosine"}, 2, {}),
    "dora": ({"is_lora": True, "use_dora": True, "caption_dropout": 0.5, "noise_offset": 0.1}, 3, {}),
    "8-bit lora with all sources": (
        {
            "is_lora": True,
            "optimizer": "adamw_8bit",
            "lora_rank": 128,
            "preservation": 1.0,
            "gradient_accumulation_steps": 2,
            "max_train_steps": 2,
        },
        1,
        {"masks": True, "prior": True},
    ),
    "prodigy": ({"is_lora": True, "optimizer": "prodigy", "lora_lr": 1.0}, 2, {}),
    "no token rows": ({"is_lora": True, "pivot_fraction": 0.0}, 2, {}),
    "full": ({}, 3, {}),
    "full, 8-bit, rounded at random": ({"optimizer": "adamw_8bit", "precision": "bf16"}, 1, {}),
    "full, adafactor": ({"optimizer": "adafactor"}, 3, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_goes_on_to_the_last_bit(runs: Runs, case: str):
    changes, at, more = CASES[case]
    config = dataclasses.replace(FULL, **changes)
    whole, losses = runs.train(config, **more)
    with pytest.raises(Stop):
        runs.train(config, until=at, every=1000, **more)
    [state] = runs.state.glob("key-*/step-*")
    assert state.name == f"step-{at:06d}"
    resumed, after = runs.train(config, every=1000, go_on=True, **more)
    assert after == losses[at:]
    assert_equal(whole, resumed)


# ---------------------------------------------------------------------------------------------------------------------
# When states are saved


@pytest.fixture(scope="module")
def whole(base: Components, tmp_path_factory: pytest.TempPathFactory) -> TrainedFineTune:
    """The result of a LoRA that nothing stops."""
    return Runs(base, tmp_path_factory.mktemp("whole")).train(SMALL)[0]


def test_the_last_two_states_stay_and_a_finished_run_leaves_none(runs: Runs, whole: TrainedFineTune):
    runs.train(SMALL, every=1)
    [folder] = runs.state.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["step-000003", "step-000004"]
    (folder / "step-000004" / STATE).write_text("{}")
    resumed, losses = runs.train(SMALL, go_on=True)
    assert len(losses) == 1, "the damaged state is passed over"
    assert_equal(whole, resumed)
    states = RunStates(RunFolder(runs.state, "key", state_at(folder / "step-000003")))
    states.discard()
    assert not runs.state.exists()


def test_a_state_after_the_last_step_only_needs_packing(runs: Runs, whole: TrainedFineTune):
    runs.train(SMALL, every=2)
    resumed, losses = runs.train(SMALL, go_on=True)
    assert losses == []
    assert_equal(whole, resumed)


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 3),
        (OSError(28, "No space left on device"), 3),
        (KeyboardInterrupt(), 3),
    ],
)
def test_what_ends_a_run_leaves_its_last_step(runs: Runs, error: BaseException, kept: int):
    with pytest.raises(type(error)):
        runs.train(SMALL, until=3, every=2, error=error)
    [folder] = runs.state.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", f"step-{kept:06d}"]


def test_a_loss_that_is_no_number_leaves_the_step_before_it(runs: Runs):
    with pytest.raises(TrainingDivergedError, match="in step 3"):
        runs.train(dataclasses.replace(FULL, unet_learning_rate=1e30, lr_warmup_steps=1), every=2)
    assert state_at(runs.state).notes.step == 2


@pytest.mark.parametrize("how", ["a signal", "an exception"])
def test_a_stop_amid_an_update(runs: Runs, whole: TrainedFineTune, monkeypatch: pytest.MonkeyPatch, how: str):
    """A signal waits for the end of the update. An exception, as Cog raises it, cannot wait: then the state before stays."""
    update, calls = TrainingStep.update, []

    def stopped(step: TrainingStep) -> None:
        calls.append(0)
        if len(calls) == 3 and how == "a signal":
            signal.raise_signal(signal.SIGINT)
        update(step)
        if len(calls) == 3 and how == "an exception":
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt if how == "a signal" else Stop):
        patch.setattr(TrainingStep, "update", stopped)
        runs.train(SMALL, every=2)
    assert state_at(runs.state).notes.step == (3 if how == "a signal" else 2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_equal(whole, runs.train(SMALL, go_on=True)[0])


def test_the_end_of_the_server_waits_for_an_update(
    runs: Runs, whole: TrainedFineTune, monkeypatch: pytest.MonkeyPatch
):
    update, gradients, is_open = TrainingStep.update, TrainingStep.gradients, shutdown._Listener.is_open
    server, noticed, calls = socket.create_server(("127.0.0.1", 0)), threading.Event(), []

    def looked(listener: shutdown._Listener) -> bool:
        found = is_open(listener)
        if not found:
            noticed.set()
        return found

    def stopped(step: TrainingStep) -> None:
        calls.append(0)
        if len(calls) == 3:
            server.close()
            noticed.wait()
        update(step)

    def waited(step: TrainingStep, *given: Any) -> Any:
        if len(calls) == 3 and (watch := shutdown._here.watch) is not None:
            watch.join()
        return gradients(step, *given)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(shutdown._Listener, "is_open", looked)
        patch.setattr(TrainingStep, "update", stopped)
        patch.setattr(TrainingStep, "gradients", waited)
        patch.setattr(settings, "behind_server", lambda: True)
        with shutdown.stops_with_server(Stop, server=os.getpid()):
            runs.train(SMALL, every=2)
    assert state_at(runs.state).notes.step == 3
    assert_equal(whole, runs.train(SMALL, go_on=True)[0])


def test_a_full_disk_stops_saving_and_not_the_training(
    runs: Runs, whole: TrainedFineTune, caplog: pytest.LogCaptureFixture
):
    with full_disk(40):
        result, _ = runs.train(SMALL, every=1)
    assert_equal(whole, result)
    [told] = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert told.startswith("No more states are saved, and the training goes on: [Errno 27] File too large")
    assert list(runs.state.rglob("*.*")) == []


@pytest.mark.parametrize(
    ("room", "told"),
    [
        ("free_host_bytes", "this machine has too little free memory to copy 0.0 GB"),
        ("shutil.disk_usage", "the disk has only 0.0 GB left for states of 0.0 GB"),
    ],
)
def test_states_are_not_saved_where_there_is_no_room(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, room: str, told: str
):
    none = {"free_host_bytes": lambda: 1000, "shutil.disk_usage": lambda path: SimpleNamespace(free=1000)}
    monkeypatch.setattr(f"sdxl.training.states.{room}", none[room])
    runs.train(SMALL, every=1)
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        f"No more states are saved, and the training goes on: {told}."
    ]


def test_a_run_may_save_nothing(runs: Runs):
    with pytest.raises(Stop):
        runs.train(SMALL, until=1, every=0)
    assert not runs.state.exists()


def test_a_large_state_is_not_written_when_a_run_is_cancelled(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sdxl.training.states._AT_ONCE", 1000)
    with pytest.raises(Stop):
        runs.train(SMALL, until=1, every=1000)
    assert not runs.state.exists()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.fixture(scope="module")
def kept(base: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a LoRA after step 2."""
    runs = Runs(base, tmp_path_factory.mktemp("kept"))
    with pytest.raises(Stop):
        runs.train(SMALL, until=2, every=1000)
    return state_at(runs.state).folder


@pytest.fixture
def state(kept: Path, runs: Runs) -> Path:
    """A copy of `kept`, from which `runs` goes on."""
    return Path(shutil.copytree(kept, runs.state / "key-x" / "step-000002"))


def test_old_states_go_from_a_server_only(state: Path, monkeypatch: pytest.MonkeyPatch):
    folder = state.parent
    (folder / ".step-000002.partial").mkdir()
    (folder.parent / f".{folder.name}.partial").mkdir()
    os.utime(folder, (0, 0))
    sweep(folder.parent)
    assert state.exists()
    assert list(folder.parent.rglob("*.partial")) == []
    monkeypatch.setattr(settings, "behind_server", lambda: True)
    with pytest.raises(
        UserInputError, match=r"resume is .*, but this server takes no paths: give auto, an http"
    ):
        allowed_state(str(folder), "resume")
    assert allowed_state("auto", "resume") == "auto"
    os.utime(folder, (time.time(), time.time() - 3600))
    monkeypatch.setenv("SDXL_STATE", str(folder.parent))
    sweep(settings.state_folder())
    assert state.exists(), "for a week"
    monkeypatch.delenv("SDXL_STATE")
    sweep(folder.parent)
    assert not folder.exists(), "for SDXL_KEEP_MINUTES"


def change(state: Path, **changes: Any) -> None:
    about = json.loads((state / STATE).read_text())
    (state / STATE).write_text(json.dumps(about | changes))


def truncate(state: Path) -> None:
    content = (state / TENSORS).read_bytes()
    (state / TENSORS).write_bytes(content[:-100])


def flip_a_bit(state: Path) -> None:
    content = bytearray((state / TENSORS).read_bytes())
    content[-1] ^= 1
    (state / TENSORS).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "step-000002 is no state of a training, or is damaged: take another state."),
        (flip_a_bit, "is damaged"),
        (lambda state: (state / TENSORS).unlink(), "is damaged"),
        (lambda state: (state / RECORD).write_text("[]"), "is damaged"),
        (lambda state: (state / STATE).write_text("[" * 100_000), "is damaged"),
        (lambda state: change(state, step="2"), "is damaged"),
        (lambda state: change(state, seed=-1), "is damaged"),
        (lambda state: change(state, scalars={"group.0.0.k": float("nan")}), "is damaged"),
        (lambda state: change(state, orders=[]), "is damaged"),
        (lambda state: change(state, format="sdxl-training-state/0"), "another version of this project"),
    ],
)
def test_a_damaged_state_is_refused(state: Path, damage: Callable[[Path], object], message: str):
    damage(state)
    with pytest.raises(WeightsError, match=re.escape(message)):
        state_at(state.parent)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda order: order["queues"][0].append([]),
        lambda order: order["queues"][0][0].append(10_000),
        lambda order: order["queues"][0][0].append(-1),
        lambda order: order["queues"][0].__setitem__(0, "abc"),
        lambda order: order["generators"].__setitem__("recipe", "00"),
        lambda order: order["generators"].__setitem__("torch", "ff" * 5056),
        lambda order: order["generators"].pop("batches.0"),
        lambda order: order.clear(),
    ],
)
def test_a_strangers_order_is_refused(base: Components, spoil: Callable[[Any], object]):
    weights, rows = (Group(params=[torch.nn.Parameter(torch.ones(2))], lr=1.0) for _ in range(2))
    optimizers = Optimizers("adamw", weights=weights, rows=rows, device=base.device)
    batches = Batches(examples(base), 2, seed=0)
    run = RunState(optimizers, [batches], torch.Generator(), Watch())
    order = run.order().as_json()
    run.restore((), {}, order, run.watched())
    with pytest.raises(WeightsError, match="checks in the state are damaged"):
        run.restore({}, {}, order, {"checks": [{"step": "x"}]})
    spoil(order)
    with pytest.raises(WeightsError, match="The order of pictures or the checks in the state are damaged"):
        run.restore({}, {}, order, run.watched())


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_rank": 8},
        {"optimizer": "adafactor"},
        {"is_lora": False, "optimizer": "adamw_8bit", "precision": "bf16"},
    ],
)
def test_a_state_of_other_weights_is_refused_whatever_its_record_says(
    runs: Runs, state: Path, changes: dict[str, Any]
):
    with pytest.raises(WeightsError, match="another precision, optimizer or shape than this run"):
        runs.train(dataclasses.replace(SMALL, **changes), go_on=True)


RECORD_OF_RUN: dict[str, Any] = {
    "settings": dataclasses.asdict(SMALL),
    "base_sha256": "b",
    "dataset_sha256": "d",
    "device": "x86_64 CPU",
}


@pytest.mark.parametrize(
    ("differs", "message"),
    [
        ({"base_sha256": "other"}, "is a state of another base"),
        ({"dataset_sha256": "other"}, "is a state of another data set"),
        ({"init_from": "other"}, "began with another init_from"),
        ({"device": "NVIDIA H100"}, "was written on x86_64 CPU, but this is NVIDIA H100"),
        ({"lora_lr": 7.0}, "of a run with lora_lr 0.001, but here it is 7.0: give the same"),
        ({"precision": "bf16"}, "of a run with precision auto, but here it is bf16"),
        ({"seed": 5}, "of a run with seed 0, but here it is 5"),
        ({"software": {**software(), "torch": "1.0"}}, "was written with torch 1.0, but here is"),
        ({"processes": 2}, "is a state of 2 processes, but here are 1"),
    ],
)
def test_a_state_of_another_run_is_refused(state: Path, differs: dict[str, Any], message: str):
    (state / RECORD).write_text(json.dumps(RECORD_OF_RUN))
    about = json.loads((state / STATE).read_text())
    if "software" in differs:
        change(state, software=differs["software"])
    if "processes" in differs:
        change(state, orders=about["orders"] * 2)
    settings = RECORD_OF_RUN["settings"]
    settings = settings | {name: value for name, value in differs.items() if name in settings}
    ours = RECORD_OF_RUN | {"settings": settings} | {n: v for n, v in differs.items() if n not in settings}
    with pytest.raises(WeightsError, match=re.escape(message)) as caught:
        chosen(read_state(state), str(state), ours, seed=differs.get("seed"))
    assert len(str(caught.value)) <= 300


def test_what_only_changes_the_last_digits_is_told(state: Path, caplog: pytest.LogCaptureFixture):
    (state / RECORD).write_text(json.dumps(RECORD_OF_RUN))
    may_differ = {"save_every": 7, "checkpointing_steps": 3, "base": "elsewhere", "seed": 9}
    ours = RECORD_OF_RUN | {"settings": RECORD_OF_RUN["settings"] | may_differ}
    assert chosen(read_state(state), "x", ours, seed=None) is not None
    assert not caplog.messages
    ours = RECORD_OF_RUN | {"settings": RECORD_OF_RUN["settings"] | {"cuda_graph": False}}
    assert chosen(read_state(state), "x", ours, seed=0) is not None
    assert caplog.messages == [
        "The state was written with another cuda_graph: the result will differ in its last digits."
    ]
