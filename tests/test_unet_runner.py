"""Calls of the UNet by shape: eager, and as a GPU would capture them."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from dataset_and_utils import TokenMap
from sdxl.errors import UserInputError
from sdxl.serving.generation import generate
from sdxl.serving.pipeline import load_pipeline
from sdxl.serving.placement import choose_placement
from sdxl.serving.request import GenerationRequest
from sdxl.serving.tuned_pipeline import LoadedFineTune, ScaledFineTune, TunedPipeline
from sdxl.serving.unet_runner import MOST_SHAPES, Runners, UNetRunner, speed_here
from sdxl.speed.fp8 import Fp8Layers, quantise
from tests.conftest import TINY_BASE
from tests.tiny_helpers import narrow_unet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(TINY_BASE, CPU)


def inputs(unet: UNet2DConditionModel, rows: int, side: int, tokens: int = 77) -> dict:
    generator = torch.Generator().manual_seed(rows * side)
    width = unet.config["projection_class_embeddings_input_dim"] - 6 * unet.config["addition_time_embed_dim"]
    return {
        "sample": torch.randn(rows, 4, side, side, generator=generator),
        "encoder_hidden_states": torch.randn(
            rows, tokens, unet.config["cross_attention_dim"], generator=generator
        ),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(rows, width, generator=generator),
            "time_ids": torch.full((rows, 6), 64.0),
        },
    }


@torch.no_grad()
def test_a_runner_answers_as_the_unet_does_in_tensors_of_its_own(pipeline):
    unet, runner = pipeline.unet, UNetRunner(pipeline.unet, "graphs")
    for rows, side, tokens in ((1, 8, 77), (2, 8, 77), (1, 16, 77), (1, 8, 154), (1, 8, 77)):
        given = inputs(unet, rows, side, tokens)
        answers = [runner(timestep=torch.tensor(time), **given)[0] for time in (500, 20.0)]
        for time, answer in zip((500, 20.0), answers, strict=True):
            assert torch.equal(answer, unet(timestep=torch.tensor(time), **given, return_dict=False)[0])
    assert len(runner._inputs) == 4, "integer and float timesteps share a shape"


@torch.no_grad()
def test_what_is_made_of_a_prompt_is_kept_for_its_steps_alone(pipeline):
    unet, runner = pipeline.unet, UNetRunner(pipeline.unet, "graphs")
    given, when = inputs(unet, 1, 8), torch.tensor(500)
    plain = unet.state_dict().keys()

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        return runner(timestep=when, **given)[0], unet(timestep=when, **given, return_dict=False)[0]

    first, _ = both()
    given["encoder_hidden_states"] = torch.randn_like(given["encoder_hidden_states"])
    other, expected = both()
    assert torch.equal(other, expected) and not torch.equal(first, other)
    layer = next(module for name, module in unet.named_modules() if name.endswith("attn2.to_v"))
    before = layer.weight.detach().clone()
    try:
        layer.weight.mul_(2)
        assert torch.equal(runner(timestep=when, **given)[0], other), "computed once"
        runner.weights_changed()
        changed, expected = both()
        assert torch.equal(changed, expected) and not torch.equal(changed, other)
    finally:
        layer.weight.copy_(before)
    assert unet.state_dict().keys() == plain


@torch.no_grad()
def test_what_was_made_of_weights_is_made_anew_after_a_switch_that_failed(pipeline):
    tuned, runners = TunedPipeline(pipeline), Runners("graphs", torch.device("cpu"))
    given, when = inputs(pipeline.unet, 1, 8), torch.tensor(500)
    plain = pipeline.unet(timestep=when, **given, return_dict=False)[0]
    name = next(name for name in tuned._parameters if name.endswith("attn2.to_v.weight"))
    doubled = {name: tuned._parameters[name].detach() * 2}
    good = LoadedFineTune(name="good", whole=doubled, token_map=TokenMap({}))
    wrong = LoadedFineTune(name="wrong", whole={name: torch.zeros(3)}, token_map=TokenMap({}))
    tuned.apply((ScaledFineTune(fine_tune=good),))
    runners.follow(tuned.changes)
    assert not torch.equal(runners(pipeline.unet)(timestep=when, **given)[0], plain)
    with pytest.raises(RuntimeError):
        tuned.apply((ScaledFineTune(fine_tune=wrong),))
    tuned.apply(())
    runners.follow(tuned.changes)
    assert torch.equal(runners(pipeline.unet)(timestep=when, **given)[0], plain)


@torch.no_grad()
def test_shapes_do_not_pile_up(pipeline):
    runner = UNetRunner(pipeline.unet, "graphs")
    for rows in range(1, MOST_SHAPES + 4):
        runner(timestep=torch.tensor(1), **inputs(pipeline.unet, rows, 8))
    assert len(runner._inputs) <= MOST_SHAPES


@pytest.mark.parametrize("scheduler", ["K_EULER", "PNDM", "HeunDiscrete"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_pictures_are_those_of_the_unet_itself(pipeline, scheduler: str, guidance: float):
    request = GenerationRequest(
        prompt="a red house",
        width=64,
        height=64,
        num_inference_steps=4,
        seed=3,
        scheduler=scheduler,
        guidance_scale=guidance,
    )
    runners = Runners("graphs", torch.device("cpu"))
    plain, run = (
        generate(pipeline, request, TokenMap({}), **extra)[0] for extra in ({}, {"runner": runners})
    )
    assert np.array_equal(np.array(plain), np.array(run))
    assert runners(pipeline.unet) is runners(pipeline.unet)


def test_what_does_not_stay_on_a_gpu_runs_eagerly(monkeypatch: pytest.MonkeyPatch):
    assert speed_here(choose_placement(80)) == "compiled"
    assert speed_here(choose_placement(10)) == speed_here(choose_placement(None)) == "eager"
    monkeypatch.setenv("SDXL_SPEED", "graphs")
    assert speed_here(choose_placement(80)) == "graphs"
    monkeypatch.setenv("SDXL_SPEED", "fast")
    with pytest.raises(UserInputError, match="SDXL_SPEED is 'fast'"):
        speed_here(choose_placement(80))


@torch.no_grad()
def test_fp8_layers_are_near_and_follow_their_weights():
    unet = narrow_unet()  # CPUs multiply fp8 slowly
    given = inputs(unet, 1, 8)

    def answer() -> torch.Tensor:
        return unet(timestep=torch.tensor(300), **given, return_dict=False)[0]

    exact = answer()
    layers = Fp8Layers(unet)
    assert len(layers._layers) > 20
    near = answer()
    assert 1e-4 < float((near - exact).norm() / exact.norm()) < 0.1
    layer: Any = layers._layers[0]
    address = layer.fp8_weight.data_ptr()
    layer.weight.mul_(2)
    assert torch.equal(answer(), near), "fp8 weights are a copy"
    layers.refresh()
    assert not torch.equal(answer(), near) and layer.fp8_weight.data_ptr() == address
    assert not any("fp8" in name for name in unet.state_dict())


def test_a_weight_in_fp8_comes_back():
    weight = torch.randn(5, 32) * torch.tensor([[1e-2], [1.0], [50.0], [1e2], [0.0]])
    values, scale = quantise(weight)
    assert torch.allclose(values.float() * scale, weight, rtol=0.07, atol=1e-4 * float(weight.abs().max()))
