"""Older and smaller GPUs: what they compute in, what is told, and what is refused."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sdxl.errors import NotEnoughMemoryError, UserInputError
from sdxl.gpu import computes_bf16, require_runnable, told_of_fp32
from sdxl.speed.triton_here import obstacle
from sdxl.training.memory_plan import activation_bytes, choose_plan
from sdxl.training.optimizers import Group, adamw_8bit
from tests.conftest import REPOSITORY

V100, T4, A100, RTX_3090, L4, H100 = (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0)
SDXL = 2_567_000_000
GIB = 2**30
WHEELS = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "bf16"),
    [(None, False), (V100, False), (T4, False), (A100, True), (RTX_3090, True), (L4, True), (H100, True)],
)
def test_bf16_starts_with_ampere_and_its_lack_is_told(capability: tuple[int, int] | None, bf16: bool):
    assert computes_bf16(capability) == bf16
    told = told_of_fp32(capability)
    assert (told is None) == (bf16 or capability is None)
    if told:
        assert f"compute capability {capability[0]}.{capability[1]}" in told  # type: ignore[index]
        assert len(told) <= 300


@pytest.mark.parametrize("capability", [T4, A100, RTX_3090, L4, H100, (12, 0), (12, 1), (13, 0)])
def test_gpus_that_the_installed_torch_knows_run(capability: tuple[int, int]):
    require_runnable(capability, WHEELS, "A GPU")
    require_runnable(capability, [], "A GPU")  # a torch that does not say


@pytest.mark.parametrize(
    ("capability", "architectures", "says"),
    [
        (V100, WHEELS, "Tesla V100 has compute capability 7.0, but .* starts at 7.5: install a PyTorch for"),
        ((6, 1), ["sm_70", "sm_80"], "starts at 7.0"),
        (H100, ["sm_80", "sm_86"], "has no kernels for it"),
        ((8, 0), ["sm_75", "sm_86"], "has no kernels for it"),
    ],
)
def test_other_gpus_are_refused(capability: tuple[int, int], architectures: list[str], says: str):
    with pytest.raises(UserInputError, match=says) as refused:
        require_runnable(capability, architectures, "Tesla V100")
    assert len(str(refused.value)) <= 300


def test_full_training_without_bf16_holds_all_in_fp32():
    common = {"parameters": SDXL, "batch": 1, "resolution": 1024, "checkpointing": None, "bf16": False}
    roomy = choose_plan(free_bytes=80 * GIB, optimizer="adamw", **common)  # type: ignore[arg-type]
    assert (roomy.weights, roomy.gradients) == (torch.float32, torch.float32)
    eight = choose_plan(free_bytes=31 * GIB, optimizer="adamw_8bit", **common)  # type: ignore[arg-type]
    assert (eight.gradients, eight.bytes_per_weight) == (torch.float32, 10)
    with pytest.raises(NotEnoughMemoryError, match="train a LoRA or use a larger GPU"):
        choose_plan(free_bytes=15 * GIB, optimizer="adamw", **common)  # type: ignore[arg-type]
    with pytest.raises(UserInputError, match="precision is bf16, which this GPU cannot compute"):
        choose_plan(free_bytes=80 * GIB, optimizer="adamw_8bit", precision="bf16", **common)  # type: ignore[arg-type]
    size = {"batch": 1, "resolution": 1024, "checkpointing": True}
    more = activation_bytes(SDXL, **size, bf16=False) - activation_bytes(SDXL, **size)  # type: ignore[arg-type]
    assert more == 2 * GIB


def failing(error: Exception):
    def attempt() -> None:
        raise error

    return attempt


@pytest.mark.parametrize(
    ("installed", "error", "why"),
    [
        (False, None, "Triton is not installed"),
        (
            True,
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
            "Triton finds no C compiler: install gcc",
        ),
        (
            True,
            ValueError("out of resource: shared memory, Required: 131072, Hardware limit: 65536.\nMore"),
            "Triton fails on this GPU (out of resource: shared memory, Required: 131072, Hardware limit: 65536.)",
        ),
        (True, AssertionError(), "Triton fails on this GPU (AssertionError)"),
        (True, None, None),
    ],
)
def test_what_triton_lacks_is_named_and_stops_nothing(
    installed: bool, error: Exception | None, why: str | None
):
    assert obstacle(installed, failing(error) if error else lambda: None) == why


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_triton_is_tried_with_gradients_whoever_asks(without_gradients: Callable[[], Any]):
    def attempt() -> None:
        torch.ones(1, requires_grad=True).sum().backward()

    with without_gradients():
        assert obstacle(True, attempt) is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory")])
def test_a_gpu_that_fails_itself_is_no_matter_of_triton(error: Exception):
    with pytest.raises(type(error)):
        obstacle(True, failing(error))


def test_8_bit_adamw_steps_where_nothing_compiles():
    weight = torch.nn.Parameter(torch.ones(64, 64))
    [group] = [Group(params=[weight], lr=0.1)]
    optimizer = adamw_8bit([group], torch.device("cpu"))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert type(optimizer).__name__ == "UncompiledEightBitAdamW"
    assert torch.allclose(weight, torch.full_like(weight, 0.9), atol=1e-3)


def test_windows_is_told_to_use_wsl():
    code = "import sys; sys.platform = 'win32'; import sdxl.workspace"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "This runs on Linux only, because it locks files as Linux does: on Windows, use WSL 2."
    ]
