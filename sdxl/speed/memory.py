"""How much memory a GPU has left.

Knows CUDA's allocator; does not know what the memory is for.
"""

import torch


def free_bytes(device: torch.device) -> int:
    """Memory in bytes that this process can still allocate on a GPU. On a CPU, assume no limit."""
    if device.type != "cuda":
        return 2**62
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    unused = reserved - torch.cuda.memory_allocated(device)  # the allocator reuses this without asking CUDA
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
    return min(free, allowed) + unused
