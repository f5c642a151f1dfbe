"""The distillation of an LCM LoRA: what it learns, and the way of its file into a request."""

from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from benchmarks.distil_lcm import Batch, Distillation, distil, grain, load_teacher, scenes, sharpness
from predict import Predictor
from tests.conftest import REPOSITORY, call
from tiny_world.base import Latents
from tiny_world.captions import held_out_prompts

LORA = REPOSITORY / "base_models" / "tiny-sdxl-lcm.safetensors"


@pytest.fixture(scope="module")
def pipeline():
    return load_teacher("cpu")


@pytest.fixture(scope="module")
def bank(pipeline) -> Latents:
    """A few scenes; only their middles, because a quarter of the latents takes a quarter of the time."""
    made = scenes(pipeline, 8)
    assert made.z.shape == (8, 4, 32, 32) and 0.7 < float(made.z.std()) < 1.3
    return made._replace(z=made.z[..., 8:24, 8:24])


@pytest.fixture
def work(pipeline):
    yield Distillation(pipeline, rank=4, guidance=5.0)
    pipeline.unet.delete_adapters("default")


@pytest.fixture
def batch(work: Distillation, bank: Latents) -> Batch:
    torch.manual_seed(1)
    return work.batch(bank, 4)


def test_a_distilled_lora_draws_in_few_steps(
    work: Distillation, batch: Batch, predictor: Predictor, tmp_path: Path
):
    losses = list(distil(work, repeat(batch), steps=8, rate=1e-3))
    assert len(losses) == 8 and losses[-1] < 0.7 * losses[0]
    work.save(tmp_path / "lcm.safetensors")
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["lcm.safetensors"]

    few = {"prompt": "a red fish", "width": 64, "height": 64, "seed": 0}
    few |= {"scheduler": "LCM", "guidance_scale": 1.0, "num_inference_steps": 4}
    drawn = [
        np.array(Image.open(call(predictor.run, **few, **loras)[0]), float)
        for loras in ({}, {"extra_lora": [str(tmp_path / "lcm.safetensors")]})
    ]
    assert np.abs(drawn[0] - drawn[1]).mean() > 1


@torch.no_grad()
def test_the_teacher_goes_a_step_of_ddim_with_guidance(pipeline, work: Distillation, batch: Batch):
    nearer, earlier = work._teacher_step(batch)
    assert set((batch.times % 20).tolist()) == {19} and set((batch.times - earlier).tolist()) <= {19, 20}
    ddim: Any = DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )
    ddim.set_timesteps(50)
    pipeline.unet.disable_adapters()
    hidden, pooled, time_ids = batch.prompt
    prompt, none = (
        pipeline.unet(
            batch.noisy,
            batch.times,
            hidden * share,
            added_cond_kwargs={"text_embeds": pooled * share, "time_ids": time_ids},
        ).sample
        for share in (1, 0)
    )
    pipeline.unet.enable_adapters()
    for i, time in enumerate(batch.times):
        expected = ddim.step(none[i] + 5.0 * (prompt[i] - none[i]), int(time), batch.noisy[i]).prev_sample
        assert torch.allclose(nearer[i], expected, atol=1e-4)
    # At the end of the schedule the student's prediction is what it is given.
    assert torch.allclose(work._consistent(nearer, torch.zeros_like(earlier), batch.prompt), nearer)


def test_the_lora_of_the_miniature_draws_sharp_pictures_in_four_steps(predictor: Predictor):
    prompts = [text for text, _ in held_out_prompts(4, seed=1)]

    def drawn(**settings: Any) -> list[Image.Image]:
        shape = {"width": 256, "height": 256}
        return [
            Image.open(call(predictor.run, prompt=prompt, seed=seed, **shape, **settings)[0])
            for seed, prompt in enumerate(prompts)
        ]

    few = {"scheduler": "LCM", "guidance_scale": 1.0, "num_inference_steps": 4}
    without, with_it = drawn(**few), drawn(**few, extra_lora=[str(LORA)])
    assert sharpness(with_it) > 1.15 * sharpness(without)
    assert grain(with_it) < 1


def test_grain_and_sharpness_are_measured_in_levels():
    plain = Image.new("RGB", (32, 32), (100, 100, 100))
    checkered = np.full((32, 32, 3), 100, np.uint8)
    checkered[::4, ::4] = 116  # one pixel of 16
    noisy = Image.fromarray(checkered)
    assert grain([plain]) == 0 and grain([noisy]) == pytest.approx(1)
    edge = np.full((32, 32, 3), 100, np.uint8)
    edge[:, 16:, 1] = 140
    assert sharpness([plain]) == 0 and sharpness([Image.fromarray(edge)]) == 40
