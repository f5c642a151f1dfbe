"""v-prediction and zero terminal SNR: training, drawing, and what does not go together."""

import json
import tarfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline

import train
from dataset_and_utils import TokenMap
from sdxl.errors import UserInputError
from sdxl.model import fine_tune_files
from sdxl.model.noise_schedule import predicting, read_schedule
from sdxl.serving.denoising import Conditioning, begin, course, denoise, rescaled
from sdxl.serving.generation import generate
from sdxl.serving.painter import Painter
from sdxl.serving.pipeline import load_pipeline
from sdxl.serving.request import FineTuneOptions, GenerationRequest
from sdxl.serving.samplers import SCHEDULERS, make_scheduler, require_known
from sdxl.serving.tuned_pipeline import TunedPipeline
from sdxl.serving.unet_runner import Runners
from sdxl.settings import Prediction
from sdxl.training.loss import min_snr_weights
from tests.conftest import QUICK, TINY_BASE, call

CPU = torch.device("cpu")
V: Prediction = "v_prediction_ztsnr"
KNOWN = [name for name in SCHEDULERS if name not in ("HeunDiscrete", "PNDM")]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    """The miniature, as if it predicted v and had zero terminal SNR."""
    made = load_pipeline(TINY_BASE, CPU, prediction=V)
    made.set_progress_bar_config(disable=True)
    return made


def request(**given: Any) -> GenerationRequest:
    common = {"prompt": "a red fish", "width": 64, "height": 64, "seed": 7, "num_inference_steps": 5}
    return GenerationRequest(**{**common, "guidance_scale": 4.0, **given})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sampler", KNOWN)
def test_samplers_go_from_complete_noise_to_the_picture(pipeline, sampler: str, dtype: torch.dtype):
    """With the true v of a single picture, every sampler must end at that picture. Latents begin 4096 times as large."""
    scheduler: Any = make_scheduler(sampler, pipeline)
    scheduler.set_timesteps(10)
    alphas = DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod
    picture, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []

    def perfect(noisy, timestep, **condition):
        below = int(timestep)
        alpha = torch.lerp(alphas[below], alphas[min(below + 1, 999)], float(timestep) - below)
        noisy = noisy.float()
        seen.append(noisy)
        eps = (noisy - alpha.sqrt() * picture) / (1 - alpha).sqrt()
        return ((alpha.sqrt() * eps - (1 - alpha).sqrt() * picture).to(dtype),)

    planned = course(scheduler, 0, 10)
    none = torch.zeros(1)
    drawn = denoise(
        perfect,
        scheduler,
        planned,
        begin(scheduler, planned, None, noise.to(dtype)),
        Conditioning(embeds=none, pooled=none, time_ids=none, guidance_scale=1),
        generators=[torch.Generator().manual_seed(0)],
    )
    assert float(planned.timesteps[0]) == 999
    assert torch.allclose(seen[0], noise, atol=1e-2), "the UNet is first shown nothing but noise"
    # DDIM ends with the least noise that the base knows, instead of none.
    end = alphas[0].sqrt() * picture + (1 - alphas[0]).sqrt() * noise if sampler == "DDIM" else picture
    if sampler == "TCD":  # so does TCD, but it has mixed in new noise on the way
        left = (drawn.float() - alphas[0].sqrt() * picture) / (1 - alphas[0]).sqrt()
        assert abs(float(left.mean())) < 0.3 and 0.7 < float(left.std()) < 1.3
        return
    assert torch.allclose(drawn.float(), end, atol=1e-3 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("sampler", "share"), [("K_EULER", 0.0), *((name, 0.7) for name in KNOWN)])
def test_pictures_are_those_of_diffusers(pipeline, sampler: str, share: float):
    theirs = StableDiffusionXLPipeline(**pipeline.components, add_watermarker=False)
    theirs.scheduler = make_scheduler(sampler, pipeline)
    theirs.set_progress_bar_config(disable=True)
    drawn: Any = theirs(
        prompt=request().prompt,
        width=64,
        height=64,
        num_inference_steps=5,
        guidance_scale=4.0,
        guidance_rescale=share,
        **({"eta": 0.3} if sampler == "TCD" else {}),
        generator=[torch.Generator().manual_seed(7)],
        output_type="np",
    ).images[0]
    [ours] = generate(pipeline, request(scheduler=sampler, guidance_rescale=share), TokenMap({}))
    assert np.abs(np.array(ours) - np.round(drawn * 255)).max() <= 1


def test_the_runner_draws_the_same(pipeline):
    asked = request(num_outputs=2, guidance_rescale=0.7)
    plain = generate(pipeline, asked, TokenMap({}))
    for one, other in zip(
        generate(pipeline, asked, TokenMap({}), runner=Runners("graphs", torch.device("cpu"))),
        plain,
        strict=True,
    ):
        assert np.abs(np.array(one).astype(int) - np.array(other)).max() <= 1


def test_rescaled_guidance_has_the_spread_of_the_prompts_prediction():
    guided, positive = torch.randn(2, 3, 4, 8, 8) * torch.tensor([5.0, 1.0])[:, None, None, None, None]
    spread = lambda value: value.std((1, 2, 3))  # noqa: E731
    assert torch.allclose(spread(rescaled(guided, positive, 1.0)), spread(positive))
    assert rescaled(guided, positive, 0.0) is guided
    between = spread(rescaled(guided, positive, 0.5))
    assert torch.allclose(between, (spread(guided) + spread(positive)) / 2)
    assert rescaled(guided.half() * 100, positive.half(), 0.7).isfinite().all()


@pytest.mark.parametrize(
    ("prediction", "refused"),
    [("epsilon", []), ("v_prediction", []), (V, ["HeunDiscrete", "PNDM"])],
)
def test_samplers_that_ignore_zero_snr_are_refused(prediction: Prediction, refused: list[str]):
    config = read_schedule(TINY_BASE, prediction)
    for name in SCHEDULERS:
        if name not in refused:
            require_known(name, config)
            continue
        with pytest.raises(UserInputError, match=f"scheduler is {name}, .*: use one of DDIM, DPMSolverM"):
            require_known(name, config)
    with pytest.raises(UserInputError, match=r"scheduler is DDIM, .*: use one of DPMSolverMultistep"):
        require_known("DDIM", config | {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"})


def test_diffusers_still_ignores_zero_snr_where_we_say_so():
    zero = EulerDiscreteScheduler.from_config(read_schedule(TINY_BASE, V)).config
    for sampler in SCHEDULERS.values():
        made = getattr(diffusers, sampler.kind).from_config(zero, **sampler.settings)
        assert (float(made.alphas_cumprod[-1]) < 1e-6) == bool(sampler.zero_snr)


@pytest.mark.parametrize("prediction", ["epsilon", V])
def test_weights_of_the_loss_are_numbers_at_zero_snr(prediction: Prediction):
    config = predicting(read_schedule(TINY_BASE), V) | {"prediction_type": prediction.removesuffix("_ztsnr")}
    scheduler: Any = DDPMScheduler.from_config(config)
    weights = min_snr_weights(scheduler, torch.arange(1000), 5.0)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    assert snr[-1] == 0
    extra = 0 if prediction == "epsilon" else 1
    assert torch.allclose(weights[:-1], (snr.clamp(max=5) / (snr + extra))[:-1])
    assert float(weights[-1]) == 1 - extra


def test_a_fine_tune_and_its_base_predict_the_same(
    captioned_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SDXL_PREDICTION", V)
    tar = call(train.train, input_images=captioned_zip, **QUICK)
    with tarfile.open(tar) as opened:
        record = json.loads(opened.extractfile("training.json").read())  # type: ignore[union-attr]
    assert record["prediction_type"] == "v_prediction" and record["zero_terminal_snr"] is True
    files = fine_tune_files.read(Path(tar), tmp_path / "read")
    assert files.prediction_type == "v_prediction"
    TunedPipeline(load_pipeline(TINY_BASE, CPU, prediction="v_prediction")).activate(files)
    with pytest.raises(
        UserInputError, match="was trained on a base with v_prediction, but this base has epsi"
    ):
        TunedPipeline(load_pipeline(TINY_BASE, CPU)).activate(files)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"prediction_type": []}', '{"prediction_type": "x"}', " " * 2**21]
)
def test_a_record_that_says_nothing_refuses_nothing(
    fine_tunes: dict[str, Path], tmp_path: Path, content: str
):
    with tarfile.open(fine_tunes["lora"]) as opened:
        opened.extractall(tmp_path, filter="data")
    assert fine_tune_files.read(tmp_path, tmp_path).prediction_type == "epsilon"
    (tmp_path / "training.json").write_text(content)
    assert fine_tune_files.read(tmp_path, tmp_path).prediction_type is None


def test_what_a_painter_refuses_on_such_a_base(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SDXL_PREDICTION", V)
    painter = Painter()
    with pytest.raises(UserInputError, match="scheduler is PNDM"):
        painter.draw(request(scheduler="PNDM"), FineTuneOptions())
    for refine in ("base_image_refiner", "expert_ensemble_refiner"):
        with pytest.raises(UserInputError, match="set refine to no_refiner"):
            painter.draw(request(refine=refine), FineTuneOptions())
    assert len(list(painter.draw(request(), FineTuneOptions()))) == 1
