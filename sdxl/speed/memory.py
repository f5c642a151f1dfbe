"""How much memory a GPU and the machine have left, and how much was used.

Knows CUDA's allocator and Linux; does not know what the memory is for.
"""

import contextlib
import re
from pathlib import Path

import torch

NO_LIMIT = 2**62
"""Bytes that are free where nobody knows a limit."""


def peak_gib() -> float:
    """The most memory in GiB that this process has held on its GPU so far; 0 without one."""
    return torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0


def free_bytes(device: torch.device) -> int:
    """Memory in bytes that this process can still allocate on a GPU. On a CPU, assume no limit."""
    if device.type != "cuda":
        return NO_LIMIT
    if device.index is None:  # the allocator's limit is asked for by number
        device = torch.device("cuda", torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    unused = reserved - torch.cuda.memory_allocated(device)  # the allocator reuses this without asking CUDA
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
    return min(free, allowed) + unused


def free_host_bytes() -> int:
    """Memory in bytes that this machine can still give, in a container with a limit at most what that leaves."""
    free = NO_LIMIT
    with contextlib.suppress(OSError, ValueError):
        free = _number_after("MemAvailable:", Path("/proc/meminfo")) * 1024
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # "max" if there is none
        # The cache of files counts as used, but gives way.
        cached = _number_after("inactive_file", group / "memory.stat")
        free = min(free, limit - int((group / "memory.current").read_text()) + cached)
    return free


def _number_after(name: str, path: Path) -> int:
    found = re.search(rf"^{re.escape(name)}\s+(\d+)", path.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{path} does not say {name}")
    return int(found[1])
