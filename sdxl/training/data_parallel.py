"""One training on several GPUs of one machine: each process draws other pictures, and gradients are averaged.

Knows the group of processes; does not know what trains. In a single process nothing here does anything.
"""

import gc
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sdxl.training import torchrun

T = TypeVar("T")


def join() -> None:
    """Connect to the other processes that torchrun started, each on its own GPU."""
    if torchrun.process_count() < 2 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(torchrun.local_rank())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Disconnect from the other processes, once all work with them is done."""
    if dist.is_initialized():
        gc.collect()  # frees CUDA graphs that contain exchanges between GPUs, which must not outlive the group
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def agreed(value: T) -> T:
    """The first process's `value`, in all of them."""
    if world_size() == 1:
        return value
    shared = [value]
    dist.broadcast_object_list(shared)
    return shared[0]


def gathered(value: T) -> list[T]:
    """The `value` of each process, in all of them."""
    found = [value] * world_size()
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace `tensors` by their means over all processes, in one message for each dtype."""
    if world_size() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # keeps one order in all processes
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        flat /= world_size()
        for tensor, mean in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(mean.view_as(tensor))
