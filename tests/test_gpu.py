"""What needs CUDA: training and serving at full size and in half precision."""

import contextlib
import dataclasses
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import train
from benchmarks.full_size import components as components_of_full_size
from benchmarks.full_size import examples
from dataset_and_utils import TokenMap
from predict import Predictor
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.model.components import load_components
from sdxl.serving.generation import generate
from sdxl.serving.pipeline import load_pipeline
from sdxl.serving.request import GenerationRequest
from sdxl.serving.unet_runner import Runners
from sdxl.speed.compiled_blocks import fuse_blocks
from sdxl.training.examples import cache_examples
from sdxl.training.half_copies import exact
from sdxl.training.recipe import StepReport, fine_tune
from tests.conftest import FULL, QUICK, TINY_BASE, call
from tests.test_training import CONFIG
from tests.tiny_helpers import write_checker

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("is_lora", [True, False])
def test_full_size_trains_at_1024(is_lora: bool):
    torch.cuda.reset_peak_memory_stats()
    components = components_of_full_size(is_lora=is_lora)
    reports: list[StepReport] = []
    config = dataclasses.replace(
        CONFIG,
        resolution=1024,
        train_batch_size=4,
        max_train_steps=6,
        is_lora=is_lora,
        unet_learning_rate=1e-5,
    )
    before = components.unet.conv_in.weight.detach().clone()
    model = fine_tune(components, examples(components, 4, 1024), config, on_step=reports.append)
    assert all(np.isfinite(report.loss) for report in reports)
    assert torch.equal(before, exact(components.unet.conv_in.weight)) == is_lora
    assert all(torch.isfinite(value).all() for value in model.weights.values())
    assert torch.cuda.max_memory_allocated() / 2**30 < (40 if is_lora else 75)


@pytest.mark.parametrize("is_lora", [True, False])
def test_the_embedded_base_trains_and_draws_on_cuda(
    captioned_zip: Path, is_lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SDXL_SAFETY_CHECKER", str(write_checker(tmp_path)))
    tar = call(train.train, input_images=captioned_zip, **QUICK | {"checks": 2}, **({} if is_lora else FULL))
    with tarfile.open(tar) as packed:
        assert any(name.startswith("previews/step-000004") for name in packed.getnames())
    predictor = Predictor()
    predictor.setup()
    assert predictor.painter.tuned.pipeline.unet.dtype == torch.float16

    def draw(**inputs) -> np.ndarray:
        small = {"prompt": "a photo of TOK", "width": 128, "height": 128, "num_inference_steps": 5, "seed": 0}
        return np.array(Image.open(call(predictor.run, **small, **inputs)[0]))

    base, tuned, again = draw(), draw(replicate_weights=str(tar)), draw()
    assert not np.array_equal(base, tuned)
    assert np.array_equal(base, again)
    assert tuned.std() > 1


@pytest.mark.parametrize("speed", ["graphs", "compiled"])
def test_pictures_are_the_eager_ones_whatever_was_drawn_before(
    captioned_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speed: str
):
    """Graphs outlive fine-tunes: weights change under them."""
    monkeypatch.setenv("SDXL_SAFETY_CHECKER", str(write_checker(tmp_path)))
    tar = call(train.train, input_images=captioned_zip, **QUICK, **FULL)
    drawn = {}
    for name in ("eager", speed):
        monkeypatch.setenv("SDXL_SPEED", name)
        predictor = Predictor()
        predictor.setup()

        def draw(predictor: Predictor = predictor, **inputs) -> list[np.ndarray]:
            small = {
                "prompt": "a photo of TOK",
                "width": 128,
                "height": 128,
                "num_inference_steps": 6,
                "seed": 0,
            }
            files = call(predictor.run, **(small | inputs), disable_safety_checker=True)
            return [np.array(Image.open(file)) for file in files]

        base, tuned = draw(), draw(replicate_weights=str(tar))
        more, long = draw(num_outputs=3), draw(prompt="a photo of " + "a red house " * 30)
        fast = draw(speed="fast", num_inference_steps=36)
        tuned_fast = draw(speed="fast", num_inference_steps=36, replicate_weights=str(tar))
        assert np.array_equal(fast, draw(speed="fast", num_inference_steps=36))
        assert np.array_equal(base, draw()) and np.array_equal(tuned, draw(replicate_weights=str(tar)))
        drawn[name] = [*base, *tuned, *more, *long, *fast, *tuned_fast]
    for one, other in zip(drawn["eager"], drawn[speed], strict=True):  # half precision rounds differently
        assert np.abs(one.astype(int) - other.astype(int)).mean() < 3


@pytest.mark.parametrize("memory", ["12gb", "8gb"])
def test_pictures_of_parts_that_take_turns_on_the_gpu_are_those_of_all_on_it(
    captioned_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str
):
    monkeypatch.setenv("SDXL_SAFETY_CHECKER", str(write_checker(tmp_path)))
    monkeypatch.setenv("SDXL_SPEED", "eager")
    tars = [str(call(train.train, input_images=captioned_zip, **QUICK, **kind)) for kind in ({}, FULL)]
    drawn = {}
    for name in ("whole", memory):
        monkeypatch.setenv("SDXL_MEMORY", name)
        predictor = Predictor()
        predictor.setup()

        def draw(predictor: Predictor = predictor, **inputs) -> list[np.ndarray]:
            small = {
                "prompt": "a photo of TOK",
                "width": 128,
                "height": 128,
                "num_inference_steps": 6,
                "seed": 0,
            }
            files = call(predictor.run, num_outputs=2, **(small | inputs))
            return [np.array(Image.open(file)) for file in files]

        base = draw()
        tuned = [picture for tar in tars for picture in draw(replicate_weights=tar)]
        refined = draw(refine="expert_ensemble_refiner")
        fast = draw(refine="expert_ensemble_refiner", speed="fast", num_inference_steps=25)
        assert np.array_equal(base, draw())
        drawn[name] = [*base, *tuned, *refined, *fast]
        where = {
            part.device.type
            for part in (predictor.painter.tuned.pipeline.unet, predictor.painter.tuned.pipeline.vae)
        }
        assert where == {"cuda" if name == "whole" else "cpu"}  # between requests
    for one, other in zip(
        *drawn.values(), strict=True
    ):  # two pictures at once are rounded otherwise than one by one
        assert np.abs(one.astype(int) - other.astype(int)).mean() < 3


@pytest.mark.parametrize(
    ("changes", "rounded"),
    [
        ({"is_lora": True, "lora_targets": "all"}, True),
        ({"is_lora": True, "lora_targets": "all", "use_dora": True}, True),
        ({"is_lora": True, "text_encoder_lora": True, "text_encoder_lr": 1e-3, "preservation": 1.0}, True),
        ({"unet_learning_rate": 1e-5}, True),
        ({}, False),
        ({"gradient_accumulation_steps": 2}, False),
    ],
)
def test_a_captured_step_is_the_eager_step(
    captioned_zip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    rounded: bool,
):
    """Same seeds, same losses, before the pivot and after it, whether kernels are fused and replayed or launched.

    All weights of a miniature, at its rates, part by percents in bf16 from rounding alone: they are compared in fp32.
    """
    if not rounded:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr("sdxl.training.trainable.takes_copies", lambda *_: False)
        for module in ("step", "caption_encoding"):
            monkeypatch.setattr(
                f"sdxl.training.{module}.autocast", lambda device, enabled=True: contextlib.nullcontext()
            )
    curves = []
    for graph in (True, False):
        config = dataclasses.replace(
            CONFIG, max_train_steps=20, cuda_graph=graph, caption_dropout=0.2, noise_offset=0.1, **changes
        )
        folder = prepare_dataset(
            captioned_zip, tmp_path / f"dataset-{graph}", config=PreprocessConfig(target_size=64)
        )
        components = load_components(TINY_BASE, is_lora=config.is_lora, device=torch.device("cuda"))
        data = cache_examples(folder, components, TokenMap.parse("TOK:2"), seed=0, views=2)
        reports: list[StepReport] = []
        fine_tune(components, data, config, prior=data, on_step=reports.append)
        curves.append([report.loss for report in reports])
    assert curves[0] == pytest.approx(curves[1], rel=1e-2)
    assert len(set(curves[0])) == 20


@pytest.mark.parametrize("shape", [(2, 96, 9, 11), (1, 320, 32, 32), (3, 1920, 5, 7)])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_group_norm_is_torchs(shape: tuple[int, ...], silu: bool, dtype: torch.dtype):
    from sdxl.speed.group_norm import group_norm

    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(32, shape[1], eps=1e-5).cuda()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (torch.randn(shape, device="cuda") * 3 + 5).to(dtype)
    grad = torch.randn(shape, device="cuda").to(dtype)
    found = []
    for fused in (True, False):
        given = (x if fused else x.double()).clone().requires_grad_()
        norm.to(given.dtype if not fused else torch.float32)
        y = group_norm(given, norm, silu=silu) if fused else norm(given)
        y = y if fused or not silu else torch.nn.functional.silu(y)
        found.append((y, *torch.autograd.grad(y, (given, norm.weight, norm.bias), grad.to(y.dtype))))
    for one, other in zip(*found, strict=True):
        distance = (one.double() - other.double()).norm() / other.double().norm()
        assert distance < (1e-5 if one.dtype == torch.float32 and dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_residual_sum_is_torchs(dtype: torch.dtype):
    from sdxl.speed.residual_sum import residual_sum

    one, other = (torch.randn(2, 96, 9, 11, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    bias = torch.randn(96, device="cuda", requires_grad=True)
    grad = torch.randn(2, 96, 9, 11, device="cuda").to(dtype)
    fused = residual_sum(one, other, bias)
    expected = (one.float() + other.float() + bias[:, None, None]).to(dtype)
    assert torch.equal(fused, expected)
    found, wanted = (torch.autograd.grad(y, (one, other, bias), grad) for y in (fused, expected))
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4 if dtype == torch.float32 else 0.1)


def test_lora_products_on_cuda_are_those_on_a_cpu():
    """On CUDA they are added in place, and the compiled blocks that hold them are found again."""
    from sdxl.speed.lora_products import lora_products

    torch.manual_seed(0)
    x, weights = torch.randn(2, 5, 16), [torch.randn(24, 16) for _ in range(3)]
    down, ups = torch.randn(12, 16), [torch.randn(24, 4) for _ in range(3)]
    grads = [torch.randn(2, 5, 24) for _ in range(3)]

    def compiled(x: torch.Tensor, *rest: torch.Tensor) -> list[torch.Tensor]:
        return lora_products(2 * x, rest[:3], [None] * 3, rest[3], rest[4:])

    found = []
    for device in ("cpu", "cuda", "cuda"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        given = [one.to(device) for one in (x, *weights, down, *ups)]
        trained = [given[0], *given[4:]]
        for one in trained:
            one.requires_grad_()
        run = compiled if device == "cpu" else torch.compile(compiled, fullgraph=True)
        outputs = run(*given)
        gradients = torch.autograd.grad(outputs, trained, [one.to(device) for one in grads])
        found.append([one.detach().cpu() for one in (*outputs, *gradients)])
    assert torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"] == 1
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("columns", [64, 320, 10240])
def test_rows_are_rounded_to_fp8_as_on_a_cpu(columns: int):
    """Rows of any size, and a row of zeros."""
    from sdxl.speed.fp8_products import rounded

    torch.manual_seed(0)
    matrix = torch.randn(48, columns) * torch.logspace(-9, 4, 48)[:, None]
    matrix[7] = 0
    ours, plain = rounded(matrix.cuda().bfloat16()), rounded(matrix.bfloat16())
    assert torch.allclose(ours.scales.cpu(), plain.scales)
    one, other = (found.values.cpu().float() for found in (ours, plain))
    assert torch.allclose(one, other, rtol=0.13)  # a last bit, where a quotient is halfway
    assert (one != other).float().mean() < 1e-3


def test_a_lora_in_fp8_on_cuda_computes_nearly_what_it_does_in_bf16():
    """A layer with and one without LoRA matrices: results, and gradients of any size."""
    from sdxl.speed import fp8_products
    from sdxl.speed.fp8_products import give_copies
    from sdxl.speed.lora_products import lora_products

    torch.manual_seed(0)
    layer = torch.nn.Linear(1280, 640).cuda().bfloat16().requires_grad_(False)
    give_copies(layer)
    sizes = ((4, 1024, 1280), 1), ((16, 1280), 36), ((640, 16), 4)
    x, down, up = given = [
        (torch.randn(size, device="cuda") / by).bfloat16().requires_grad_() for size, by in sizes
    ]
    copies = fp8_products.copies_of(layer)
    for scale in (1.0, 1e-7):
        found = []
        for held in ([], copies):
            [with_lora] = lora_products(x, [layer.weight], [layer.bias], down, [up], (), held)
            without: Any = fp8_products._product(x, copies, layer.bias) if held else layer(x)
            loss = scale * (with_lora.float().square().sum() + without.float().square().sum())
            found.append([with_lora, without, *torch.autograd.grad(loss, given)])
        for plain, ours in zip(*found, strict=True):
            assert 0 < (plain.float() - ours.float()).norm() / plain.float().norm() < 0.05


def test_fused_geglu_has_torchs_gradient():
    from sdxl.speed.geglu import geglu

    x = torch.randn(3, 30_000, 2 * 40, device="cuda", requires_grad=True)
    plain, gate = x.chunk(2, -1)
    expected = plain * torch.nn.functional.gelu(gate)
    grad = torch.randn_like(expected)
    one, other = (torch.autograd.grad(y, x, grad)[0] for y in (geglu(x), expected))
    assert torch.allclose(one, other, atol=1e-5)


def test_compiled_geglu_is_found_again():
    """With all of its gradient: else every start of a training would trace its blocks again."""
    from sdxl.speed.geglu import geglu

    x = torch.randn(4, 2 * 40, device="cuda", requires_grad=True)
    expected = torch.autograd.grad(geglu(x * 2).sum(), x)[0]
    for run in ("first", "again"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(lambda x: geglu(x * 2).sum())
        assert torch.allclose(torch.autograd.grad(compiled(x), x)[0], expected, atol=1e-5)
        counted = torch._dynamo.utils.counters["aot_autograd"]
        assert not counted["autograd_cache_bypass"]
        assert run == "first" or counted["autograd_cache_hit"] == 1


def test_8_bit_adamw_compiles_for_kinds_of_shapes_and_steps_as_uncompiled():
    from sdxl.training.optimizers import Group, make_optimizers

    torch.manual_seed(0)
    start = [torch.randn(n, 64) for n in (64, 128, 320, 3, 5, 7)]
    found = []
    for device in ("cuda", "cpu"):
        weights = [torch.nn.Parameter(one.to(device, copy=True)) for one in start]
        group, none = Group(params=weights, lr=1e-2), Group(params=[], lr=0)
        optimizer = make_optimizers("adamw_8bit", group, none, device=torch.device(device))[0]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for step in range(3):
            for weight, like in zip(weights, start, strict=True):
                weight.grad = (like.roll(step) * (step + 1)).to(device)
            optimizer.step()
        if device == "cuda":
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
        found.append([weight.detach().cpu() for weight in weights])
    for one, other, first in zip(*found, start, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
        assert (one - first).abs().mean() > 5e-3


def test_an_autoencoder_with_fused_norms_decodes_the_same():
    vae = load_pipeline(TINY_BASE, torch.device("cuda")).vae.float()
    latents = torch.randn(2, 4, 16, 16, device="cuda")
    with torch.no_grad():
        before = vae.decode(latents).sample
        fuse_blocks(vae)
        after = vae.decode(latents).sample
    assert (before - after).norm() / before.norm() < 1e-3


def test_text_encoders_leave_the_gpu_at_the_pivot(captioned_zip: Path):
    components = components_of_full_size(is_lora=True)
    where = []
    config = dataclasses.replace(CONFIG, resolution=256, is_lora=True, max_train_steps=4)
    fine_tune(
        components,
        examples(components, 2, 256),
        config,
        on_step=lambda report: where.append(components.text_encoders[1].device.type),
    )
    assert where == ["cuda", "cuda", "cpu", "cpu"]


@pytest.mark.parametrize("scheduler", ["K_EULER", "KarrasDPM", "DDIM"])
def test_a_base_with_zero_terminal_snr_draws_in_half_precision(scheduler: str):
    """The first sigma is 4096: near the end of fp16's range, and captured graphs must give the same picture."""
    pipeline = load_pipeline(TINY_BASE, torch.device("cuda"), prediction="v_prediction_ztsnr")
    pipeline.set_progress_bar_config(disable=True)
    asked = GenerationRequest(
        prompt="a red fish",
        width=256,
        height=256,
        num_inference_steps=10,
        guidance_scale=5.0,
        guidance_rescale=0.7,
        scheduler=scheduler,
        seed=0,
    )
    [plain] = generate(pipeline, asked, TokenMap({}))
    runners = Runners("compiled", torch.device("cuda"))
    with runners.warming(pipeline.unet):
        [warmed] = generate(pipeline, asked, TokenMap({}), runner=runners)
    [replayed] = generate(pipeline, asked, TokenMap({}), runner=runners)
    for other in (warmed, replayed):
        assert np.abs(np.array(plain).astype(int) - np.array(other)).mean() < 2


def test_pictures_are_encoded_on_cuda_as_on_a_cpu(tmp_path: Path):
    """In fp32: bf16 is off by 0.3 %. TF32 rounds as fp16 does."""
    (tmp_path / "raw").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).resize(
        (128, 128)
    ).save(tmp_path / "raw" / "a.png")
    config = PreprocessConfig(target_size=128, global_caption="TOK")
    folder = prepare_dataset(tmp_path / "raw", tmp_path / "dataset", config=config)
    found = []
    for device in ("cuda", "cpu"):
        components = load_components(TINY_BASE, is_lora=True, device=torch.device(device))
        cache_examples(folder, components, TokenMap.parse("TOK:2"), seed=0)  # fuses its blocks
        pixels = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
        with torch.no_grad():
            found.append(components.vae.encode(pixels).latent_dist.mode().cpu())  # type: ignore[union-attr]
    assert (found[0] - found[1]).norm() / found[1].norm() < 1e-3


def test_an_autoencoder_that_overflows_in_fp16_draws_on_cuda(tmp_path: Path):
    import json
    import shutil

    shutil.copytree(TINY_BASE / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text()) | {"force_upcast": True}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    request = GenerationRequest(
        prompt="a red fish", width=128, height=128, num_inference_steps=4, guidance_scale=3.0, seed=0
    )
    drawn = []
    for vae in (tmp_path / "vae", None):
        pipeline = load_pipeline(TINY_BASE, torch.device("cuda"), vae=vae)
        assert pipeline.vae.dtype == (torch.float32 if vae else torch.float16)
        pipeline.set_progress_bar_config(disable=True)
        drawn.append(np.asarray(generate(pipeline, request, TokenMap({}))[0], dtype=float))
    assert np.abs(drawn[0] - drawn[1]).mean() < 1
