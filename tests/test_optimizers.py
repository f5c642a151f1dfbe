"""Optimizers and precisions: small updates add up, two groups stay two, state comes back, memory decides."""

import copy
import io
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.nn import functional as F

from sdxl.errors import NotEnoughMemoryError, UserInputError
from sdxl.speed.memory import NO_LIMIT
from sdxl.training.memory_plan import (
    BF16_ADAMW_8BIT,
    FP32_ADAFACTOR,
    FP32_ADAMW,
    FP32_ADAMW_8BIT,
    FP32_PRODIGY,
    MemoryPlan,
    choose_plan,
)
from sdxl.training.optimizers import CAPTURABLE, OPTIMIZERS, Group, make_optimizers
from tests.tiny_helpers import narrow_unet

CPU = torch.device("cpu")
SMALL_RATE, STEPS = 1e-6, 200
WEIGHT_RATES = {"adamw": 3e-4, "adamw_8bit": 3e-4, "adafactor": 3e-4, "prodigy": 1.0}
SDXL_WEIGHTS = 2_567_463_684
PATHS = [FP32_ADAMW, FP32_ADAMW_8BIT, BF16_ADAMW_8BIT, FP32_ADAFACTOR, FP32_PRODIGY]
"""Where the state lies makes no difference."""


def path_name(path: MemoryPlan) -> str:
    return f"{str(path.weights).removeprefix('torch.')}-{path.optimizer}"


def gradients() -> tuple[Tensor, list[Tensor]]:
    """Weights drawn as a UNet's are (on bf16's grid, so that all start alike), and a gradient for every step: a steady
    direction of half the size of the noise."""
    generator = torch.Generator().manual_seed(0)
    start = (0.02 * torch.randn(128, 128, generator=generator)).bfloat16().float()
    steady = 0.5 * torch.randn(128, 128, generator=generator)
    return start, [1e-4 * (steady + torch.randn(128, 128, generator=generator)) for _ in range(STEPS)]


def accumulated(optimizer_name: str | None, weights: torch.dtype, grads: torch.dtype) -> Tensor:
    """The sum of all updates of `gradients()`; no name stands for torch's own AdamW, whatever the dtype."""
    torch.manual_seed(0)
    start, each = gradients()
    parameter = nn.Parameter(start.to(weights, copy=True))
    parameter.grad_dtype = grads
    optimizer = (
        torch.optim.AdamW([parameter], lr=SMALL_RATE, weight_decay=0.0)
        if optimizer_name is None
        else make_optimizers(
            optimizer_name,
            Group(params=[parameter], lr=SMALL_RATE),
            Group(params=[], lr=0),
            device=CPU,
        )[0]
    )
    for gradient in each:
        parameter.grad = gradient.to(grads)
        optimizer.step()
    return parameter.detach().float() - start


def distance(update: Tensor, reference: Tensor) -> float:
    """‖update − reference‖ / ‖reference‖."""
    return float((update - reference).norm() / reference.norm())


def projection(update: Tensor, reference: Tensor) -> float:
    """How much of `reference` is in `update`: 1 for itself, and for itself plus unbiased noise."""
    return float((update * reference).sum() / reference.square().sum())


@pytest.fixture(scope="module")
def exact() -> Tensor:
    """What AdamW adds up to in fp32."""
    return accumulated(None, torch.float32, torch.float32)


@pytest.mark.parametrize("path", [FP32_ADAMW, FP32_ADAMW_8BIT], ids=path_name)
def test_fp32_weights_move_as_they_should_at_a_small_rate(path: MemoryPlan, exact: Tensor):
    assert distance(accumulated(path.optimizer, path.weights, path.gradients), exact) <= 0.05


def test_adafactor_loses_nothing_to_bf16_gradients():
    full = accumulated("adafactor", torch.float32, torch.float32)
    assert distance(accumulated("adafactor", torch.float32, torch.bfloat16), full) <= 0.05


@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (8, 4, 3, 3)], ids=["8-bit state", "plain state"])
def test_8_bit_adamw_gives_weights_of_any_layout_the_same_steps(shape: tuple[int, ...]):
    torch.manual_seed(0)
    start, gradient = torch.randn(2, *shape)
    ways = [torch.contiguous_format, torch.channels_last]
    weights = [nn.Parameter(start.clone(memory_format=way)) for way in ways]
    last = start.permute(0, 2, 3, 1).reshape(-1)  # what channels last lies in memory as
    weights.append(nn.Parameter(last.clone()))
    optimizer = make_optimizers(
        "adamw_8bit", Group(params=weights, lr=1e-2), Group(params=[], lr=0), device=CPU
    )[0]
    for step in range(3):
        for weight in weights[:2]:
            weight.grad = gradient * (step + 1)
        weights[2].grad = gradient.permute(0, 2, 3, 1).reshape(-1) * (step + 1)
        optimizer.step()
    assert torch.equal(weights[1].permute(0, 2, 3, 1).reshape(-1), weights[2])
    assert (weights[0] - weights[1]).abs().mean() < 3e-4  # blocks of other neighbours are rounded otherwise
    assert (weights[0] - start).abs().min() > 5e-3


def test_8_bit_state_on_the_host_gives_the_same_weights():
    """Large weights' state visits the device in each update; small weights' state stays there."""
    found = []
    for on_host in (False, True):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape)) for shape in ((64, 64), (64, 32, 3, 3), (8, 3))]
        group = Group(params=weights, lr=1e-3, state_on_host=on_host)
        [optimizer] = make_optimizers("adamw_8bit", group, device=CPU)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        found.append((weights, [optimizer.state[weight]["exp_avg_sq"] for weight in weights]))
    (plain, states), (ours, on_host_states) = found
    assert all(map(torch.equal, plain, ours))
    for one, other in zip(states[:2], on_host_states[:2], strict=True):
        assert torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)
        assert one.codes.any()
    assert torch.equal(states[2], on_host_states[2])


def test_plain_bf16_loses_nearly_all_updates(exact: Tensor):
    update = accumulated(None, torch.bfloat16, torch.bfloat16)
    assert distance(update, exact) > 0.9
    assert projection(update, exact) < 0.05
    assert (update == 0).float().mean() > 0.9


def test_stochastic_rounding_is_right_on_average_and_as_noisy_as_theory_says(exact: Tensor):
    """Rounding a step u to a grid of width g adds variance |u|·(g − |u|): unbiased, but not small beside the way."""
    update = accumulated("adamw_8bit", torch.bfloat16, torch.bfloat16)
    assert projection(update, exact) == pytest.approx(1, abs=0.05)

    start, each = gradients()
    exponent = torch.frexp(start).exponent
    grid = torch.ldexp(torch.ones_like(start), exponent - 8)  # 8 significant bits
    parameter = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([parameter], lr=SMALL_RATE, weight_decay=0.0)
    variance = torch.zeros_like(start)
    for gradient in each:
        before = parameter.detach().clone()
        parameter.grad = gradient
        optimizer.step()
        step = (parameter.detach() - before).abs()
        variance += step * (grid - step).clamp(min=0)
    expected = float(variance.sum().sqrt() / exact.norm())
    assert distance(update, exact) == pytest.approx(expected, rel=0.1)
    assert expected > 0.5  # so the 5 % that fp32 weights keep is out of reach


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return narrow_unet().train()


def denoising_loss(model: UNet2DConditionModel, row: Tensor) -> Tensor:
    """Of one latent at one noise and time, under a prompt that is `row` in all 77 places."""
    generator = torch.Generator().manual_seed(3)
    noisy, noise = torch.randn(2, 1, 4, 16, 16, generator=generator)
    pooled = torch.zeros(
        1, model.config.projection_class_embeddings_input_dim - 6 * model.config.addition_time_embed_dim
    )
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        prediction = model(
            noisy,
            torch.tensor([600]),
            encoder_hidden_states=row.expand(1, 77, -1),
            added_cond_kwargs={
                "text_embeds": pooled,
                "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]]),
            },
        ).sample
    return F.mse_loss(prediction.float(), noise)


@pytest.mark.parametrize("path", PATHS, ids=path_name)
def test_every_path_trains_a_unet(path: MemoryPlan, unet: UNet2DConditionModel):
    torch.manual_seed(0)
    model = copy.deepcopy(unet)
    path.apply(model)
    row = nn.Parameter(torch.randn(model.config.cross_attention_dim))
    first_row = row.detach().clone()
    weights = Group(params=list(model.parameters()), lr=WEIGHT_RATES[path.optimizer])
    optimizers = make_optimizers(path.optimizer, weights, Group(params=[row], lr=1e-3), device=CPU)

    steps = 50 if path.optimizer == "prodigy" else 6  # Prodigy feels its way
    losses = []
    for _ in range(steps):
        loss = denoising_loss(model, row)
        losses.append(loss.item())
        loss.backward()
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {path.gradients}
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert {p.dtype for p in model.parameters()} == {path.weights}
    moved = (row.detach() - first_row).abs().max().item()
    assert 0.5e-3 < moved < 1.5e-3 * steps  # AdamW at 1e-3, whatever the weights train with


def problem(name: str) -> tuple[nn.Parameter, nn.Parameter, list[torch.optim.Optimizer]]:
    """A matrix large enough for 8-bit state, a token row, and their optimizers."""
    generator = torch.Generator().manual_seed(0)
    matrix = nn.Parameter(0.02 * torch.randn(64, 128, generator=generator))
    row = nn.Parameter(torch.randn(2, 64, generator=generator))
    return (
        matrix,
        row,
        make_optimizers(
            name,
            Group(params=[matrix], lr=WEIGHT_RATES[name], weight_decay=1e-2),
            Group(params=[row], lr=1e-2),
            device=CPU,
        ),
    )


def step(matrix: nn.Parameter, row: nn.Parameter, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
    """One step towards a random target."""
    target = torch.randn(2, 128, generator=torch.Generator().manual_seed(seed))
    for optimizer in optimizers:
        optimizer.zero_grad()
    F.mse_loss(row @ matrix, target).backward()
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_have_rates_of_their_own(name: str):
    for still in (0, -1):  # the weights are the first group of all, the rows the last
        matrix, row, optimizers = problem(name)
        before = [matrix.detach().clone(), row.detach().clone()]
        group = optimizers[still].param_groups[still]
        group["lr"] = torch.zeros(()) if isinstance(group["lr"], Tensor) else 0.0
        for seed in range(3):
            step(matrix, row, optimizers, seed)
        unmoved = [torch.equal(matrix, before[0]), torch.equal(row, before[1])]
        assert unmoved == [still == 0, still == -1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_schedules_act_on_every_group(name: str):
    _, _, optimizers = problem(name)
    schedules = [
        get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=4)
        for optimizer in optimizers
    ]
    full = [float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    for optimizer, schedule in zip(optimizers, schedules, strict=True):
        optimizer.step()
        schedule.step()
    rates = [float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    assert full == pytest.approx([WEIGHT_RATES[name], 1e-2])
    assert rates == pytest.approx([0.75 * rate for rate in full])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_goes_round(name: str):
    matrix, row, optimizers = problem(name)
    for seed in range(3):
        step(matrix, row, optimizers, seed)
    buffer = io.BytesIO()  # 8-bit state can be saved but not copied
    torch.save([optimizer.state_dict() for optimizer in optimizers], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)

    other_matrix, other_row, others = problem(name)
    with torch.no_grad():
        other_matrix.copy_(matrix)
        other_row.copy_(row)
    for other, state in zip(others, states, strict=True):
        other.load_state_dict(state)
    step(matrix, row, optimizers, 9)
    step(other_matrix, other_row, others, 9)
    assert torch.equal(matrix, other_matrix)
    assert torch.equal(row, other_row)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_empty_group_makes_no_optimizer(name: str):
    parameter = nn.Parameter(torch.ones(4))
    (only,) = make_optimizers(name, Group(params=[], lr=1.0), Group(params=[parameter], lr=1e-3), device=CPU)
    assert only.param_groups[0]["params"] == [parameter]


def test_what_would_lose_updates_is_refused():
    weights = [nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]
    for name in OPTIMIZERS.keys() - {"adamw_8bit"}:
        with pytest.raises(UserInputError, match=r"use adamw_8bit"):
            make_optimizers(name, Group(params=weights, lr=1.0), Group(params=[], lr=0), device=CPU)
    with pytest.raises(UserInputError, match="must be one of adamw, adamw_8bit, adafactor, prodigy"):
        make_optimizers("sgd", Group(params=[], lr=1), Group(params=[], lr=1), device=CPU)
    with pytest.raises(UserInputError, match="use 1"):
        make_optimizers(
            "prodigy",
            Group(params=[nn.Parameter(torch.ones(4))], lr=1e-4),
            Group(params=[], lr=1),
            device=CPU,
        )


@pytest.mark.parametrize(
    ("gib", "optimizer", "precision", "expected", "tight"),
    [
        (77, "adamw", "auto", FP32_ADAMW, False),
        (38, "adamw", "auto", FP32_ADAMW_8BIT, False),
        (22, "adamw", "auto", BF16_ADAMW_8BIT, False),
        (77, "adamw_8bit", "auto", FP32_ADAMW_8BIT, False),
        (22, "adamw_8bit", "auto", BF16_ADAMW_8BIT, False),
        (77, "adamw", "bf16", BF16_ADAMW_8BIT, False),
        (22, "adamw", "fp32", FP32_ADAMW_8BIT, True),
        (22, "adafactor", "auto", FP32_ADAFACTOR, False),
        (77, "prodigy", "fp32", FP32_PRODIGY, False),
        (17, "adafactor", "auto", FP32_ADAFACTOR, True),
    ],
)
def test_memory_decides(gib: int, optimizer: str, precision: str, expected: MemoryPlan, tight: bool):
    chosen = choose_plan(
        free_bytes=gib * 2**30,
        parameters=SDXL_WEIGHTS,
        optimizer=optimizer,
        batch=1,
        resolution=1024,
        precision=precision,
    )
    for field in ("weights", "gradients", "optimizer"):
        assert getattr(chosen, field) == getattr(expected, field)
    assert chosen.tight == tight
    assert f"{gib}.0 GiB free" in chosen.reason
    assert ("should it run out" in chosen.reason) == tight


@pytest.mark.parametrize(
    ("gib", "host_gib", "precision", "shared_by", "on_host"),
    [
        (14, 16, "auto", (1,), True),
        (14, 16, "bf16", (1,), True),
        (22, 16, "auto", (1,), False),  # all fits on the GPU
        (14, 4, "auto", (1,), False),  # the host has no room
        (14, 16, "auto", (1, 4), False),  # processes rather share
    ],
)
def test_state_lies_on_the_host_where_nothing_else_fits(
    gib: int, host_gib: int, precision: str, shared_by: tuple[int, ...], on_host: bool
):
    try:
        chosen = choose_plan(
            free_bytes=gib * 2**30,
            host_bytes=host_gib * 2**30,
            parameters=SDXL_WEIGHTS,
            optimizer="adamw",
            batch=1,
            resolution=1024,
            precision=precision,
            shared_by=shared_by,
        )
    except NotEnoughMemoryError:
        assert host_gib == 4
        return
    assert chosen.state_on_host == on_host == ("whose state lies in the CPU's memory" in chosen.reason)
    assert not chosen.tight


def test_without_a_known_limit_no_free_memory_is_told():
    size = 1000
    chosen = choose_plan(
        free_bytes=NO_LIMIT + size, parameters=size, optimizer="adamw", batch=1, resolution=64
    )
    assert "needed" in chosen.reason and "free" not in chosen.reason


@pytest.mark.parametrize(
    ("gib", "shared_by", "optimizer", "expected", "count"),
    [
        (77, (1, 4), "adamw", FP32_ADAMW, 1),
        (38, (1, 4), "adamw", FP32_ADAMW, 4),  # rather than less precise state
        (38, (1,), "adamw", FP32_ADAMW_8BIT, 1),
        (77, (8,), "adamw", FP32_ADAMW, 8),
        (17, (1, 2), "adamw", BF16_ADAMW_8BIT, 2),
        (22, (1, 4), "adamw_8bit", FP32_ADAMW_8BIT, 4),
    ],
)
def test_processes_share_where_a_copy_does_not_fit(
    gib: int, shared_by: tuple[int, ...], optimizer: str, expected: MemoryPlan, count: int
):
    common: dict[str, Any] = {
        "parameters": SDXL_WEIGHTS,
        "batch": 1,
        "resolution": 1024,
        "optimizer": optimizer,
    }
    chosen = choose_plan(free_bytes=gib * 2**30, shared_by=shared_by, **common)
    assert (chosen.weights, chosen.optimizer) == (expected.weights, expected.optimizer)
    assert chosen.shared_by == count and not chosen.tight
    assert (f"shared by {count} processes" in chosen.reason) == (count > 1)
    # The base as teacher is shared too, which frees most of it.
    least = next(g for g in range(80) if not _tight(g, shared_by=(4,), **common))
    assert _tight(least - 2, shared_by=(4,), **common)
    assert not _tight(least - 2, shared_by=(4,), also_shared=5 * 2**30, **common)


def _tight(gib: int, **common: Any) -> bool:
    try:
        return choose_plan(free_bytes=gib * 2**30, **common).tight
    except NotEnoughMemoryError:
        return True


def test_batch_resolution_and_checkpointing_count():
    def chosen(**changes: int) -> str:
        settings = {"batch": 1, "resolution": 1024, "checkpointing": True, **changes}
        return choose_plan(
            free_bytes=46 * 2**30, parameters=SDXL_WEIGHTS, optimizer="adamw", **settings
        ).optimizer

    assert chosen() == chosen(batch=3, resolution=512) == "adamw"
    assert chosen(batch=8) == chosen(checkpointing=False) == "adamw_8bit"


def test_a_narrow_unet_needs_less_for_its_activations():
    chosen = choose_plan(
        free_bytes=10 * 2**30,
        parameters=7_400_000,
        optimizer="adamw",
        batch=32,
        resolution=256,
        checkpointing=False,
    )
    assert chosen.weights is torch.float32 and not chosen.tight


def test_what_cannot_fit_is_said_before_it_starts():
    common = {"parameters": SDXL_WEIGHTS, "batch": 1, "resolution": 1024}
    with pytest.raises(NotEnoughMemoryError, match=r"14\.3 GiB .* 12\.0 GiB are free: train a LoRA"):
        choose_plan(free_bytes=12 * 2**30, optimizer="adamw", **common)
    with pytest.raises(NotEnoughMemoryError, match=r"mask_base_target=false, which frees 4\.8 GiB"):
        choose_plan(free_bytes=9 * 2**30, optimizer="adamw", also_shared=2 * SDXL_WEIGHTS, **common)
    with pytest.raises(UserInputError, match="precision is 'fp16'"):
        choose_plan(free_bytes=2**40, optimizer="adamw", precision="fp16", **common)
    for optimizer in ("adafactor", "prodigy"):
        with pytest.raises(UserInputError, match="would lose small updates"):
            choose_plan(free_bytes=2**40, optimizer=optimizer, precision="bf16", **common)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", sorted(CAPTURABLE))
def test_a_captured_step_counts_on_and_sees_new_rates(name: str):
    """The graph's steps equal those of the same optimizer outside of a graph, over a change of the rate."""
    device = torch.device("cuda")
    each = [torch.randn(64, 128, device=device) for _ in range(8)]

    def run(captured: bool) -> Tensor:
        parameter = nn.Parameter(torch.full((64, 128), 0.02, device=device))
        (optimizer,) = make_optimizers(
            name, Group(params=[parameter], lr=1e-3), Group(params=[], lr=0), device=device
        )
        parameter.grad = torch.zeros_like(parameter)
        graph = torch.cuda.CUDAGraph()
        for index, gradient in enumerate(each):
            parameter.grad.copy_(gradient)
            if index == 5:
                optimizer.param_groups[0]["lr"].fill_(1e-2)
            if captured and index == 3:
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    optimizer.step()
            if captured and index >= 3:
                graph.replay()
            else:
                optimizer.step()
        return parameter.detach().clone()

    torch.testing.assert_close(run(captured=True), run(captured=False), rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_8_bit_state_on_the_host_gives_the_same_weights_on_cuda():
    found = []
    for on_host in (False, True):
        generator = torch.Generator("cuda").manual_seed(0)  # compiling may draw from torch's own
        weights = [
            nn.Parameter(torch.randn(shape, device="cuda", generator=generator))
            for shape in ((640, 640), (320, 320, 3, 3))
        ]
        group = Group(params=weights, lr=1e-3, state_on_host=on_host)
        [optimizer] = make_optimizers("adamw_8bit", group, device=torch.device("cuda"))
        for _ in range(5):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, device="cuda", generator=generator)
            optimizer.step()
        codes = [optimizer.state[weight]["exp_avg"].codes for weight in weights]
        assert all(code.is_cuda != on_host and code.is_pinned() == on_host for code in codes)
        found.append([*weights, *(code.cpu() for code in codes)])
    assert all(map(torch.equal, *found))
