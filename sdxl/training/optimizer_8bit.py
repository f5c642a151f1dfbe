"""AdamW with 8-bit state (arXiv:2110.02861): torchao's arithmetic with fewer compiled kernels, and state that may lie in the CPU's
memory.

Knows parameters and their state; does not know what they belong to.
"""

import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchao.optim import AdamW8bit
from torchao.optim.adam import single_param_adam
from torchao.optim.subclass_8bit import OptimState8bit

from sdxl.files.weight_files import pin
from sdxl.training.memory_order import ROW, as_rows

_MOMENTS = "exp_avg", "exp_avg_sq"


class EightBitAdamW(AdamW8bit):
    """torchao compiles its step for each shape, 44 of them in SDXL's UNet, again in every run. This class views every weight
    as rows of one block each, and small weights as one row, so that a few kernels serve all shapes.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, bf16_stochastic_round: bool, state_on_host: bool = False
    ) -> None:
        super().__init__(groups, bf16_stochastic_round=bf16_stochastic_round)
        self._state_on_host = state_on_host
        # torchao makes the state in the first step and counts steps on the CPU, where a captured graph would not see
        # the count grow. So make the state here, with the count on the device.
        for group in self.param_groups:
            for p in group["params"]:
                seen = self._seen(p, p)
                state = {"step": torch.zeros((), device=p.device)}
                for name, signed in zip(_MOMENTS, (True, False), strict=True):
                    moment = self._new_buffer(seen, signed)
                    if state_on_host and isinstance(moment, OptimState8bit):
                        moment = _on_host(moment)
                    state[name] = moment
                self.state[p] = state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all weights that have a gradient."""
        update: Callable[..., None] = torch.compile(single_param_adam, fullgraph=True, dynamic=True)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                moments = [self._visiting(state[name], p.device) for name in _MOMENTS]
                update(
                    self._seen(p.detach(), p),
                    self._seen(p.grad, p, written=False),
                    state["step"],
                    *moments,
                    None,
                    group["lr"],
                    *group["betas"],
                    group["weight_decay"],
                    group["eps"],
                    True,
                    p.dtype is torch.bfloat16,
                )
                for name, moment in zip(_MOMENTS, moments, strict=True):
                    if moment is not state[name]:
                        state[name].codes.copy_(moment.codes, non_blocking=True)
        if self._state_on_host and torch.cuda.is_available():
            torch.cuda.synchronize()  # who reads the state on the CPU must find it complete

    def _visiting(self, state: Tensor, device: torch.device) -> Any:
        """The state for an update on `device`: itself, or a copy of what is on the host."""
        if not (self._state_on_host and isinstance(state, OptimState8bit)):
            return state
        return _with_codes(state, state.codes.to(device, non_blocking=True, copy=True))

    def _seen(self, values: Tensor, p: nn.Parameter, *, written: bool = True) -> Tensor:
        """`values` of the weight `p` in its memory order: [blocks, 256], or [n] if it is not made of whole blocks."""
        assert self.block_size == ROW
        rows = as_rows(values, p, written=written)
        return rows if rows.numel() >= 4096 else rows.view(-1)


class UncompiledEightBitAdamW(EightBitAdamW):
    """The same, without compiling."""

    step = torch.compiler.set_stance("force_eager")(EightBitAdamW.step)


def _on_host(state: OptimState8bit) -> OptimState8bit:
    """The same state with its codes, a byte for each number, in pinned memory. What blocks are multiplied by stays on the GPU."""
    # Not torch's pinned memory: it takes powers of two.
    block = mmap.mmap(-1, state.codes.nbytes)
    codes = torch.frombuffer(block, dtype=torch.uint8).view(state.codes.shape)
    if state.codes.is_cuda:
        pin(codes, block)
    codes.copy_(state.codes)
    return _with_codes(state, codes)


def _with_codes(state: OptimState8bit, codes: Tensor) -> OptimState8bit:
    return OptimState8bit(codes, state.scale, state.qmap, state.signed, state.dtype)
