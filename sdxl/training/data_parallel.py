"""One training on several GPUs of one machine: every process draws other pictures, and gradients are averaged.

Started by `torchrun --nproc-per-node 2 train.py …`; without it everything here does nothing. Knows processes; does not know
what trains.
"""

import gc
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partialmethod

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm


def join() -> None:
    """Meet the other processes that torchrun started, each on a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Part from the other processes, once all work with them is done."""
    if dist.is_initialized():
        gc.collect()  # graphs that hold exchanges between GPUs must be gone
        dist.destroy_process_group()


def run_in_each(run: Callable[[list[str]], int]) -> int:
    """Run a command line, as the arguments after the program's name, in this process and those beside it; of these only
    the first says and leaves anything. Returns the exit code."""
    join()
    if rank() == 0:
        code = run(sys.argv[1:])
    else:
        logging.disable(logging.WARNING)
        # Its own setting is asked on import alone.
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # type: ignore[assignment]
        with tempfile.TemporaryDirectory() as own:
            code = run([*sys.argv[1:], "-o", own])
    if code == 0:  # one that failed must end at once: parting waits for the others, who may wait for it
        leave()
    return code


def rank() -> int:
    """This process's number; 0 of one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def agreed(number: int) -> int:
    """The first process's `number`, in all of them."""
    if world_size() == 1:
        return number
    shared = [number]
    dist.broadcast_object_list(shared)
    return shared[0]


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace `tensors` by their means over all processes, in one message for each dtype."""
    if world_size() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # in one order everywhere
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        flat /= world_size()
        for tensor, mean in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(mean.view_as(tensor))
