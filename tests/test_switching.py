"""Fine-tunes come and go as transactions: whatever fails or is cancelled, the base stays what it was."""

import itertools
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dataset_and_utils import TokenMap
from sdxl.errors import WeightsError
from sdxl.model import fine_tune_files
from sdxl.serving.generation import generate
from sdxl.serving.request import GenerationRequest
from sdxl.serving.tuned_pipeline import LoadedFineTune, ScaledFineTune, TunedPipeline
from tests.conftest import TINY_BASE, quiet_pipeline


class Cancelled(BaseException):
    """As Cog's cancelling: raised in the working thread at any moment."""


@pytest.fixture(scope="module")
def tuned() -> TunedPipeline:
    return quiet_pipeline(TINY_BASE)


@pytest.fixture(scope="module")
def fine_tunes(
    tuned: TunedPipeline, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[ScaledFineTune, ...]]:
    """The base, a whole UNet, a LoRA, both."""
    folder = tmp_path_factory.mktemp("fine_tunes")
    torch.manual_seed(0)
    whole = {
        name: value + 0.02 * torch.randn_like(value)
        for name, value in tuned.pipeline.unet.state_dict().items()
    }
    save_file(whole, folder / "unet.safetensors")
    lora = {}
    for name, module in tuned.pipeline.unet.named_modules():
        if name.endswith("to_q"):
            lora[f"unet.{name}.lora_A.weight"] = torch.randn(2, module.in_features)  # type: ignore[arg-type]
            lora[f"unet.{name}.lora_B.weight"] = 0.1 * torch.randn(module.out_features, 2)  # type: ignore[arg-type]
    save_file(lora, folder / "lora.safetensors")

    def load(name: str) -> LoadedFineTune:
        return tuned.load(fine_tune_files.read(folder / name, folder))

    full, small = load("unet.safetensors"), load("lora.safetensors")
    rows = tuple(
        torch.randn(2, encoder.get_input_embeddings().weight.shape[1]) for encoder in tuned._encoders
    )
    words = LoadedFineTune(
        name="words", rows=rows, pooled_at_eos=False, token_map=TokenMap({"TOK": "<s0><s1>"})
    )
    return {
        "base": (),
        "full": (ScaledFineTune(fine_tune=full), ScaledFineTune(fine_tune=words)),
        "lora": (ScaledFineTune(fine_tune=small, scale=0.8),),
        "both": (ScaledFineTune(fine_tune=full), ScaledFineTune(fine_tune=small)),
    }


def draw(tuned: TunedPipeline) -> np.ndarray:
    request = GenerationRequest(
        prompt="a TOK", width=64, height=64, num_inference_steps=1, guidance_scale=4.0, seed=0
    )
    return np.array(generate(tuned.pipeline, request, tuned.token_map)[0])


def test_any_order_with_failures_and_cancels_in_between(
    tuned: TunedPipeline, fine_tunes: dict[str, tuple[ScaledFineTune, ...]]
):
    first: dict[str, np.ndarray] = {}
    parameters = {name: value.detach().clone() for name, value in tuned._parameters.items()}
    addresses = {name: value.data_ptr() for name, value in tuned._parameters.items()}
    dice = random.Random(0)
    events = {name: events_of_a_switch(tuned, chosen) for name, chosen in fine_tunes.items()}
    cancelled = 0
    for _ in range(40):
        name = dice.choice(list(fine_tunes))
        match dice.choice(["whole", "refused", "cancelled"]):
            case "refused":
                with pytest.raises(WeightsError, match="only LoRAs as extra_lora"):
                    tuned.apply((*fine_tunes["lora"], fine_tunes["full"][0]))
            case "cancelled":
                cancelled += switch_and_cancel(tuned, fine_tunes[name], at=dice.randrange(events[name]))
        tuned.apply(fine_tunes[name])
        drawn = draw(tuned)
        assert np.array_equal(first.setdefault(name, drawn), drawn), name
        if name == "base":
            assert all(torch.equal(parameters[key], value) for key, value in tuned._parameters.items())
    assert cancelled > 2, "the cancels must hit"
    assert len({drawn.tobytes() for drawn in first.values()}) == len(fine_tunes)
    tuned.apply(())
    assert all(torch.equal(parameters[key], value) for key, value in tuned._parameters.items())
    assert addresses == {name: value.data_ptr() for name, value in tuned._parameters.items()}


def switch(tuned: TunedPipeline, fine_tunes: tuple[ScaledFineTune, ...]) -> None:
    """From `fine_tunes` to the base and back."""
    tuned.apply(())
    tuned.apply(fine_tunes)


def events_of_a_switch(tuned: TunedPipeline, fine_tunes: tuple[ScaledFineTune, ...]) -> int:
    """How often functions are called in a switch, or return."""
    seen: list[str] = []
    tuned.apply(fine_tunes)
    sys.setprofile(lambda frame, event, argument: seen.append(event))
    switch(tuned, fine_tunes)
    sys.setprofile(None)
    return len(seen)


def switch_and_cancel(tuned: TunedPipeline, fine_tunes: tuple[ScaledFineTune, ...], *, at: int) -> bool:
    """Raise `Cancelled` in a switch, at the event number `at`; returns whether it hit."""
    number = itertools.count()

    def cancel(frame: object, event: str, argument: object) -> None:
        if next(number) == at:
            raise Cancelled

    tuned.apply(fine_tunes)
    try:
        sys.setprofile(cancel)
        switch(tuned, fine_tunes)
        sys.setprofile(None)
    except Cancelled:
        return True
    finally:
        sys.setprofile(None)
        torch.set_grad_enabled(True)  # a cancel can hit the very line that would have done it
    return False


def test_an_unfit_file_is_refused_before_anything_changes(tuned: TunedPipeline, tmp_path: Path):
    before = {name: value.detach().clone() for name, value in tuned._parameters.items()}
    good = tuned.pipeline.unet.state_dict()
    save_file(
        {"conv_in.bias": good["conv_in.bias"] + 1, "conv_in.weight": torch.zeros(3, 3)},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(WeightsError, match="does not fit this base"):
        tuned.activate(fine_tune_files.read(tmp_path / "x.safetensors", tmp_path))
    assert all(torch.equal(before[key], value) for key, value in tuned._parameters.items())
