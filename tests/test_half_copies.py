"""bf16 copies of fp32 weights: a step is what it is under autocast, and who sets weights sets both."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn import functional as F

from sdxl.training.half_copies import HalfCopies, exact, set_exactly
from sdxl.training.loss import DenoisingLoss
from sdxl.training.memory_plan import FP32_ADAMW
from sdxl.training.optimizers import Group, Optimizers
from tests.test_resume import SMALL as TINY
from tests.test_resume import narrow_components
from tests.tiny_helpers import narrow_unet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return narrow_unet()


def trained(
    unet: UNet2DConditionModel, device: torch.device, *, copies: bool, steps: int = 4, max_norm: float = 0.1
) -> tuple[list[float], list[float], Optimizers, Any]:
    """Losses, norms, the optimizers and the UNet after some steps under autocast."""
    unet = copy.deepcopy(unet).to(device)
    FP32_ADAMW.apply(unet)
    if device.type == "cuda":
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    held = HalfCopies(unet) if copies else None
    params = list(unet.parameters()) if held is None else held.parameters
    weights = Group(params=params, lr=1e-3, weight_decay=0.1, copies=held)
    rows = Group(params=[nn.Parameter(torch.ones(2, 8, device=device))], lr=1e-3)
    optimizers = Optimizers("adamw", weights=weights, rows=rows, device=device)
    generator = torch.Generator().manual_seed(1)
    losses, norms = [], []
    for _ in range(steps):
        noisy, noise = torch.randn(2, 2, 4, 16, 16, generator=generator).to(device)
        hidden = torch.randn(2, 77, unet.config["cross_attention_dim"], generator=generator).to(device)
        size = (
            unet.config["projection_class_embeddings_input_dim"] - 6 * unet.config["addition_time_embed_dim"]
        )
        added = {
            "text_embeds": torch.ones(2, size, device=device),
            "time_ids": torch.ones(2, 6, device=device),
        }
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            found = unet(
                noisy, torch.tensor([300, 600], device=device), hidden, added_cond_kwargs=added
            ).sample
            loss = F.mse_loss(found.float(), noise)
        optimizers.zero_grad(set_to_none=True)
        loss.backward()
        assert all(p.grad is not None for p in optimizers.held[:-1])
        optimizers.to_average()
        norms.append(float(optimizers.clip(max_norm)[0]))
        optimizers.step()
        losses.append(loss.item())
    return losses, norms, optimizers, unet


def assert_as_under_autocast(unet: UNet2DConditionModel, device: torch.device) -> None:
    [plain], [plain_norm], without, _ = trained(unet, device, copies=False, steps=1)
    [loss], [norm], optimizers, computing = trained(unet, device, copies=True, steps=1)
    assert loss == plain and norm == pytest.approx(plain_norm, rel=1e-6) and norm > 0.1  # it is clipped
    for ours, theirs, start in zip(
        optimizers.parameters, without.parameters, unet.parameters(), strict=False
    ):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-6, atol=2e-6)
        assert float((ours.detach().cpu() - start.detach()).abs().max()) > 5e-4
        state, other = optimizers.all[0].state[ours], without.all[0].state[theirs]
        torch.testing.assert_close(state, other, rtol=1e-5, atol=1e-12)
    kinds = {(parameter.dim() > 1, parameter.dtype) for parameter in computing.parameters()}
    assert kinds >= {(True, torch.bfloat16), (False, torch.float32)}
    for held in computing.parameters():
        assert torch.equal(held, exact(held).to(held.dtype))
    # Later steps add up what is rounded otherwise.
    longer = [trained(unet, device, copies=copies)[0] for copies in (False, True)]
    assert longer[1] == pytest.approx(longer[0], rel=1e-3) and longer[1][-1] < longer[1][0]


def test_a_step_is_as_under_autocast(unet: UNet2DConditionModel):
    assert_as_under_autocast(unet, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_is_as_under_autocast_on_cuda(unet: UNet2DConditionModel):
    assert_as_under_autocast(unet, torch.device("cuda"))


def test_gradients_are_forgotten_or_filled_with_zeros(unet: UNet2DConditionModel):
    _, _, optimizers, computing = trained(unet, CPU, copies=True, steps=1)
    copies = [p for p in computing.parameters() if p.dtype is torch.bfloat16]
    optimizers.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in copies)
    optimizers.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in (*copies, *optimizers.parameters))


def test_who_sets_a_weight_sets_its_copy():
    layer = nn.Linear(64, 64)
    start = layer.weight.detach().clone()
    copies = HalfCopies(layer)
    assert layer.weight.dtype is torch.bfloat16 and layer.bias is copies.parameters[1]
    assert torch.equal(exact(layer.weight), start)
    set_exactly(layer.weight, start + 0.001)
    assert torch.equal(exact(layer.weight), start + 0.001)
    assert torch.equal(layer.weight, (start + 0.001).bfloat16())
    set_exactly(layer.bias, torch.ones(64))
    assert layer.bias.tolist() == [1.0] * 64
    with torch.no_grad():
        copies.parameters[0].zero_()
    copies.renew()
    assert not layer.weight.any()


def test_gradients_of_captions_add_up_in_fp32():
    """Every attention layer adds to them, so the captions go to the UNet in fp32, whatever its copies are."""
    config = {**narrow_unet().config, "block_out_channels": [64, 64]}
    unet: Any = UNet2DConditionModel.from_config(config)
    HalfCopies(unet)
    assert unet.dtype is torch.bfloat16
    parts = dataclasses.replace(narrow_components(CPU), unet=unet)
    loss = DenoisingLoss(parts, TINY, torch.Generator(), None)
    assert loss._dtype is torch.float32
