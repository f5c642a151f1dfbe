"""Whether Triton's kernels run on this machine. If not, models run without them.

Triton needs its package, a C compiler, a GPU that it knows, and enough shared memory. To try it once tells more than any
list of these. Knows this project's kernels; does not know models.
"""

import importlib.util
import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

log = logging.getLogger(__name__)


@cache
def triton_runs() -> bool:
    """Whether Triton's kernels run on the current GPU. If not, the log says why, once."""
    if not torch.cuda.is_available():
        return False
    found = obstacle(importlib.util.find_spec("triton") is not None, _attempt)
    if found is not None:
        log.warning("Blocks are neither fused nor compiled, which is slower, because %s.", found)
    return found is None


def obstacle(installed: bool, attempt: Callable[[], None]) -> str | None:
    """Why Triton's kernels do not run, as a clause; None if `attempt`, which runs one, succeeds.

    Raises:
        torch.AcceleratorError, torch.OutOfMemoryError: the GPU itself failed, so that nothing else would run either.
    """
    if not installed:
        return "Triton is not installed"
    try:
        with torch.inference_mode(False), torch.enable_grad():  # the caller may compute without gradients
            attempt()
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # Triton's errors have no common class
        if "C compiler" in str(error):
            return "Triton finds no C compiler: install gcc"
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"Triton fails on this GPU ({first[:120]})"
    return None


def _attempt() -> None:
    """Run this project's kernels, with their full tiles, forward and backward."""
    from sdxl.speed.group_norm import group_norm

    norm = nn.GroupNorm(2, 128).cuda()
    x = torch.randn(1, 128, 16, 16, device="cuda", requires_grad=True)
    group_norm(x, norm, silu=True).sum().backward()
    torch.cuda.synchronize()
