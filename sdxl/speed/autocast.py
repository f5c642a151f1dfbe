"""bf16 arithmetic for weights that are held in another precision.

Knows CUDA's autocast; does not know what is computed.
"""

import contextlib

import torch


def autocast(device: torch.device, enabled: bool = True) -> contextlib.AbstractContextManager:
    """bf16 autocast on CUDA if `enabled`. On a CPU a context that does nothing, since bf16 is slower there.

    Autocast's cache is off: it would keep a bf16 copy of all fp32 weights in memory.
    """
    if device.type != "cuda" or not enabled:
        return contextlib.nullcontext()
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
