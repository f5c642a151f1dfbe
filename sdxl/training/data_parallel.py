"""One training on several GPUs, of one host or of several: each process draws other pictures, and gradients are averaged.

Knows the group of processes; does not know what trains. In a single process nothing here does anything.
"""

import gc
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sdxl.errors import UserInputError
from sdxl.training import torchrun

P = ParamSpec("P")
T = TypeVar("T")

_PATIENCE = timedelta(hours=2)
"""How long a process waits for the others. One host may have to download what another has."""


def join() -> None:
    """Connect to the other processes that torchrun started, each on its own GPU of its host.

    Raises:
        UserInputError: this host has fewer GPUs than processes.
    """
    if torchrun.process_count() < 2 or dist.is_initialized():
        return
    cuda, own = torch.cuda.is_available(), torchrun.local_rank()
    if cuda and own >= torch.cuda.device_count():
        raise UserInputError(
            f"{socket.gethostname()} has {torch.cuda.device_count()} GPUs, but torchrun started more processes: give it "
            f"--nproc-per-node {torch.cuda.device_count()}."
        )
    if cuda:
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)


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


def by_first(action: Callable[P, None]) -> Callable[P, None]:
    """`action` in the first process, and what does nothing in the others."""

    def nothing(*_: P.args, **__: P.kwargs) -> None:
        pass

    return action if rank() == 0 else nothing


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


def shared_out(count: int) -> range:
    """Which of `count` pieces of work are this process's: every n-th of n processes."""
    return range(rank(), count, world_size())


def of_all(own: Sequence[T]) -> list[T]:
    """The results of all pieces, in their order and in all processes; `own` are those of `shared_out`."""
    shares = gathered(own)
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]


def sent(value: Tensor | None, dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> Tensor:
    """The first process's `value`, of this type and shape, on each process's `device`. The others give None."""
    if world_size() == 1:
        assert value is not None
        return value
    found = torch.empty(tuple(shape), dtype=dtype, device=device) if value is None else value.to(device)
    found = found.contiguous()
    dist.broadcast(found.view(-1).view(torch.uint8), 0)  # bytes, because backends do not send all types
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
