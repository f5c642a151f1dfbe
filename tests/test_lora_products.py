"""What LoRA layers compute on a GPU, and a base in 8 bits, tried on a CPU."""

import dataclasses

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from benchmarks import full_size
from sdxl import gpu
from sdxl.speed import fp8_products, lora_products
from sdxl.speed.int8_weights import hold_in_int8, restored, rounded
from sdxl.training.trainable import LORA_TARGETS, add_lora
from tests.test_training import CONFIG, run  # noqa: F401 - a fixture
from tests.test_unet_runner import inputs as unet_inputs
from tests.tiny_helpers import narrow_unet

SHAPES = (24, 16), (4, 16), (24, 4)
"""Of a layer's weight and its LoRA's two matrices."""


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("biased", [True, False])
def test_the_operator_of_lora_products_has_torchs_results_and_gradients(layers: int, biased: bool):
    """CUDA runs it; a CPU can too."""
    torch.manual_seed(0)
    x, down = torch.randn(2, 5, 16, requires_grad=True), torch.randn(4 * layers, 16, requires_grad=True)
    weights = [torch.randn(24, 16) for _ in range(layers)]
    biases = [torch.randn(24) for _ in range(layers)] if biased else [None] * layers
    ups = [torch.randn(24, 4, requires_grad=True) for _ in range(layers)]
    given = x, weights, [], [], [bias for bias in biases if bias is not None], down, ups
    torch.library.opcheck(lora_products._products, given)
    results = []
    for outputs in (
        lora_products._products(*given)[:-1],
        lora_products.lora_products(x, weights, biases, down, ups),
    ):
        loss = torch.stack([output.square().sum() for output in outputs]).sum()
        results.append([*outputs, *torch.autograd.grad(loss, [x, down, *ups])])
    for ours, plain in zip(*results, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-3)

    frozen = lora_products._products(x.detach(), *given[1:])[:-1]
    loss = torch.stack([output.square().sum() for output in frozen]).sum()
    for ours, plain in zip(torch.autograd.grad(loss, [down, *ups]), results[1][-1 - layers :], strict=True):
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-3)


def test_lora_products_of_fp32_are_in_the_dtype_of_the_matrices():
    """Under autocast a norm's result is fp32."""
    x, (weight, down, up) = torch.randn(2, 5, 16), (torch.randn(s, dtype=torch.bfloat16) for s in SHAPES)
    [found] = lora_products.lora_products(x, [weight], [None], down, [up])
    [expected] = lora_products.lora_products(x.bfloat16(), [weight], [None], down, [up])
    assert torch.equal(found, expected)


def test_a_weight_in_int8_is_near_and_keeps_the_mean_of_each_row():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        weight = (torch.randn(64, 512) * torch.logspace(-6, 2, 64)[:, None]).to(dtype)
        values, scale = rounded(weight)
        assert values.dtype == torch.int8 and scale.dtype == dtype
        error = (restored(values.double(), scale.double()) - weight.double()).norm(dim=1)
        assert (error / weight.double().norm(dim=1)).max() < 0.012
    values, scale = rounded(torch.zeros(2, 4))
    assert not restored(values, scale).any()


def test_lora_products_of_int8_weights_are_those_of_the_restored_ones():
    torch.manual_seed(0)
    x, down, up = (torch.randn(s, requires_grad=True) for s in ((2, 5, 16), (4, 16), (24, 4)))
    values, scale = rounded(torch.randn(24, 16))
    given = x, [values], [scale], [], [], down, [up]
    torch.library.opcheck(lora_products._products, given)
    results = []
    for weight, scales in ((values, [scale]), (restored(values, scale), [])):
        [output] = lora_products.lora_products(x, [weight], [None], down, [up], scales)
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, down, up])])
    for ours, plain in zip(*results, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("layers", [1, 3])
def test_lora_products_in_fp8_are_near_those_of_the_weights(layers: int):
    """CUDA computes them; a CPU can too. Gradients are near whatever their size."""
    torch.manual_seed(0)
    x, down = torch.randn(2, 64, 128), torch.randn(16 * layers, 128) / 12
    ups, modules = [torch.randn(96, 16) / 4 for _ in range(layers)], nn.ModuleList()
    for _ in range(layers):
        layer = nn.Linear(128, 96).requires_grad_(False)
        fp8_products.give_copies(layer)
        modules.append(layer)
    x, down, *ups = (tensor.bfloat16().requires_grad_() for tensor in (x, down, *ups))
    weights = [layer.weight.bfloat16() for layer in modules]
    biases = [layer.bias.bfloat16() for layer in modules]
    copies = [copy for layer in modules for copy in fp8_products.copies_of(layer)]
    given = x, weights, [], copies, biases, down, ups
    # Its check of schemas cannot compare tensors in fp8.
    checks = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    torch.library.opcheck(lora_products._products, given, test_utils=checks)
    for size in (1.0, 1e-6):
        results = []
        for held in ([], copies):
            outputs = lora_products.lora_products(x, weights, biases, down, ups, (), held)
            loss = torch.stack([output.float().square().sum() for output in outputs]).sum() * size
            results.append([*outputs, *torch.autograd.grad(loss, [x, down, *ups])])
        for plain, ours in zip(*results, strict=True):
            error = (ours.float() - plain.float()).norm() / plain.float().norm()
            assert 0 < error < 0.05


def test_linear_layers_in_fp8_are_near_and_have_a_gradient():
    """Layers without LoRA matrices. The copies are no part of the model on disk."""
    unet = narrow_unet().requires_grad_(False)
    given = unet_inputs(unet, 1, 8) | {"timestep": torch.tensor(500)}
    names = list(unet.state_dict())
    found = []
    for fp8 in (False, True):
        if fp8:
            fp8_products.multiply_in_fp8(unet)
        sample = given["sample"].clone().requires_grad_()
        output = unet(**(given | {"sample": sample})).sample
        [gradient] = torch.autograd.grad(output.square().sum(), [sample])
        found.append((output, gradient))
    for plain, ours in zip(*found, strict=True):
        assert 0 < (plain - ours).norm() / plain.norm() < 0.05
    assert list(unet.state_dict()) == names


def test_a_lora_learns_nearly_the_same_on_a_base_in_int8(run):  # noqa: F811
    """And the base that teaches is in int8 too, without the LoRA."""
    found = {}
    for precision in ("auto", "int8"):
        losses: list[float] = []
        components, _, model = run(
            is_lora=True,
            precision=precision,
            lora_targets="attention",  # so that layers without a LoRA are in int8 too
            preservation=1.0,
            max_train_steps=6,
            on_step=lambda report, losses=losses: losses.append(report.loss),
        )
        held = [layer.weight.dtype for layer in components.unet.modules() if hasattr(layer, "int8_scale")]
        assert bool(held) == (precision == "int8") and set(held) <= {torch.int8}
        found[precision] = (losses, model.weights)
    assert found["int8"][0] == pytest.approx(found["auto"][0], rel=0.02)
    assert found["int8"][0] != found["auto"][0]
    shapes = [{name: value.shape for name, value in weights.items()} for _, weights in found.values()]
    assert shapes[0] == shapes[1]


def test_memory_decides_whether_a_base_is_in_int8(monkeypatch: pytest.MonkeyPatch):
    from sdxl.training import lora_memory

    with torch.device("meta"):
        unet = UNet2DConditionModel(**full_size.UNET).bfloat16().requires_grad_(False)
    config = dataclasses.replace(CONFIG, is_lora=True, resolution=1024, train_batch_size=1)
    card = torch.device("cuda")
    monkeypatch.setattr(gpu, "capability_of", lambda _: (8, 9))
    for gib, waits, eight in (
        (7.4, True, True),
        (9.5, True, False),
        (14.5, False, False),
        (24, False, False),
    ):
        monkeypatch.setattr(lora_memory, "free_bytes", lambda _, gib=gib: int(gib * 2**30))
        assert lora_memory.waits_on_cpu(config, card) == waits
        full = dataclasses.replace(config, is_lora=False)  # its UNet is twice as large
        assert lora_memory.waits_on_cpu(full, card) == (gib < 16)
        assert lora_memory.in_int8(unet, config, card) == eight
        assert not lora_memory.in_int8(unet, dataclasses.replace(config, use_dora=True), card)
    assert lora_memory.in_int8(unet, dataclasses.replace(config, precision="int8"), card)


def test_memory_decides_whether_a_base_gets_copies_in_fp8(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from sdxl.training import lora_memory

    with torch.device("meta"):
        unet = UNet2DConditionModel(**full_size.UNET).bfloat16().requires_grad_(False)
    config = dataclasses.replace(CONFIG, is_lora=True, resolution=1024, train_batch_size=1, fp8=True)
    card = torch.device("cuda")
    assert 3.5e9 < fp8_products.copies_bytes(unet) < 5.1e9
    monkeypatch.setattr(gpu, "capability_of", lambda _: (8, 9))
    for able, gib, fits in ((True, 24, True), (True, 10, False), (False, 24, False)):
        monkeypatch.setattr(lora_memory, "is_supported", lambda _, able=able: able)
        monkeypatch.setattr(lora_memory, "free_bytes", lambda _, gib=gib: gib * 2**30)
        caplog.clear()
        assert lora_memory.in_fp8(unet, config, card) == fits
        assert ("stay in bf16" in caplog.text) == (able and not fits)
    assert not lora_memory.in_fp8(unet, dataclasses.replace(config, fp8=False), card)


@pytest.mark.parametrize("precision", ["as it is", "int8", "fp8"])
def test_blocks_with_a_lora_are_traced_as_one_graph(precision: str):
    """As training compiles them. What torch.compile can trace depends on the version of Python too."""
    unet = narrow_unet().requires_grad_(False)
    if precision == "int8":
        hold_in_int8(unet)
    if precision == "fp8":
        fp8_products.multiply_in_fp8(unet)
    add_lora(unet, dataclasses.replace(CONFIG, is_lora=True), LORA_TARGETS["transformer"])
    inputs = unet_inputs(unet, 1, 8) | {"timestep": torch.tensor(500)}
    plain = unet(**inputs).sample
    unet.compile_repeated_blocks(fullgraph=True, dynamic=False, backend="eager")
    compiled = unet(**inputs).sample
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
