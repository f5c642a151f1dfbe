"""bf16 arithmetic for weights that are held in another precision.

Knows CUDA's autocast; does not know what is computed.
"""

import contextlib

import torch

from sdxl.gpu import capability_of, computes_bf16


def autocast(device: torch.device, enabled: bool = True) -> contextlib.AbstractContextManager:
    """bf16 autocast on CUDA if `enabled`. On a CPU or a GPU without bf16 a context that does nothing.

    Autocast's cache is off: it would keep a bf16 copy of all fp32 weights in memory.
    """
    if not enabled or not computes_bf16(capability_of(device)):
        return contextlib.nullcontext()
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
