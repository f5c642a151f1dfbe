"""A run that stops and goes on is the run that never stopped, to the last bit."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from dataset_and_utils import Example, ExampleDataset, TokenMap
from sdxl.model.components import Components, add_placeholder_tokens, load_components
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.training.recipe import StepReport, fine_tune
from sdxl.training.state_folders import RunFolder, state_at
from sdxl.training.states import RunStates
from tests.conftest import TINY_BASE
from tests.test_training import CONFIG

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
    narrow = {
        "block_out_channels": [16, 32],
        "norm_num_groups": 8,
        "attention_head_dim": [2, 4],
        "transformer_layers_per_block": [1, 1],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    }
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_config({**components.unet.config, **narrow})
    components.unet = unet.to(device).requires_grad_(False)
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
        saved = state_at(self.state) if go_on else None
        losses: list[float] = []

        def on_step(report: StepReport) -> None:
            losses.append(report.loss)
            torch.randn(report.step)  # as previews do
            if report.step == until:
                raise more.get("error", Stop())

        states = RunStates(RunFolder(self.state, "key", saved), {}, every=every, goes_on=saved)
        with states:
            model = fine_tune(components, data, config, prior=prior, states=states, on_step=on_step)
        states.wait()
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
