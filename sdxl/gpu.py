"""What a GPU can do: which precisions it computes in, and whether the installed PyTorch runs on it.

Knows compute capabilities; does not know models, memory or what is computed.
"""

import re
from collections.abc import Sequence

import torch

from sdxl.errors import UserInputError

Capability = tuple[int, int]
"""A GPU's compute capability, such as (7, 5) for a T4."""

_BF16 = (8, 0)
"""The first capability that multiplies bf16: Ampere, such as A100 and RTX 3090. V100, T4 and RTX 2080 do not."""


def capability_of(device: torch.device) -> Capability | None:
    """The compute capability of a GPU; None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def computes_bf16(capability: Capability | None) -> bool:
    """Whether a GPU multiplies in bf16. torch only imitates it on older ones, and a CPU is faster in fp32."""
    return capability is not None and capability >= _BF16


def activations_in_bf16(device: torch.device) -> bool:
    """Whether activations take the bytes of bf16 while training; a CPU's memory does not count."""
    return device.type != "cuda" or computes_bf16(capability_of(device))


def training_half(device: torch.device) -> torch.dtype:
    """The precision in which training holds and multiplies frozen weights: bf16, or fp32 where there is none.

    Not fp16: small gradients become 0 in it, unless the loss is scaled, which the step here does not do.
    """
    return torch.bfloat16 if computes_bf16(capability_of(device)) else torch.float32


def told_of_fp32(capability: Capability | None) -> str | None:
    """A sentence for the log if training falls back to fp32 on a GPU."""
    if capability is None or computes_bf16(capability):
        return None
    return (
        f"This GPU (compute capability {_text(capability)}) has no bf16, which starts at {_text(_BF16)}: training computes in "
        "fp32, which takes about twice the memory and several times as long."
    )


def require_runnable(capability: Capability, architectures: Sequence[str], name: str) -> None:
    """Refuse a GPU for which the installed PyTorch has no kernels.

    architectures: as `torch.cuda.get_arch_list()` gives them, such as "sm_75". name: the GPU's.

    Raises:
        UserInputError: says from where on it runs.
    """
    if not architectures or any(_runs(capability, one) for one in architectures):
        return
    lowest = min(filter(None, map(_parsed, architectures)), default=None)
    since = f" starts at {_text(lowest)}" if lowest and lowest > capability else " has no kernels for it"
    raise UserInputError(
        f"{name} has compute capability {_text(capability)}, but the installed PyTorch {torch.__version__}{since}: install "
        "a PyTorch for this GPU, or set CUDA_VISIBLE_DEVICES to -1 to use the CPU."
    )


def _runs(capability: Capability, architecture: str) -> bool:
    """Whether code for `architecture` runs: machine code (sm) on the same major version, PTX (compute) on all later
    capabilities."""
    built = _parsed(architecture)
    if built is None:
        return False
    if architecture.startswith("compute"):
        return built <= capability
    return built[0] == capability[0] and built[1] <= capability[1]


def _parsed(architecture: str) -> Capability | None:
    """ "sm_75" or "sm_90a" as a capability."""
    found = re.match(r"(?:sm|compute)_(\d+)(\d)", architecture)
    return (int(found[1]), int(found[2])) if found else None


def _text(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
