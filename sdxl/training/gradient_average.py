"""The mean of gradients over all processes that train together, computed while the backward pass goes on.

Knows gradients and the group of processes; does not know what trains. In a single process nothing here does anything.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdxl.training.data_parallel import average, world_size

LARGE_BYTES = 2**20
"""A gradient of this size has a message of its own, sent as soon as it is known. Smaller ones share one at the end: each
message takes some time, however short it is."""


class GradientAverage:
    """Averages the gradients of some parameters, again and again."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """All processes give the same parameters, and their backward passes have the same order."""
        self._is_last = False
        self._sent: list[tuple[Tensor, dist.Work]] = []
        if world_size() == 1:
            return
        self._means = dist.get_backend() == "nccl"  # others only add
        for parameter in parameters:
            if parameter.nbytes >= LARGE_BYTES:
                parameter.register_post_accumulate_grad_hook(self._send)

    @contextmanager
    def during(self, *, last: bool) -> Iterator[None]:
        """While the context lasts, a backward pass runs. It is the `last` one of a step if no other adds to its gradients."""
        self._is_last = last
        try:
            yield
        finally:
            self._is_last = False

    @torch.no_grad()
    def finish(self, tensors: Sequence[Tensor]) -> None:
        """Replace `tensors` by their means: the gradients, most of which are sent already, and other numbers."""
        sent = {id(gradient) for gradient, _ in self._sent}
        average([tensor for tensor in tensors if id(tensor) not in sent])
        for gradient, work in self._sent:
            work.wait()
            if not self._means:
                gradient.div_(world_size())
        self._sent.clear()

    def _send(self, parameter: Tensor) -> None:
        """Send the gradient of `parameter`, which is complete."""
        gradient = parameter.grad
        if self._is_last and gradient is not None and _is_dense(gradient):
            operation = dist.ReduceOp.AVG if self._means else dist.ReduceOp.SUM
            work = dist.all_reduce(gradient, operation, async_op=True)
            assert work is not None
            self._sent.append((gradient, work))


def _is_dense(tensor: Tensor) -> bool:
    """Whether messages can hold the tensor as it lies in memory."""
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )
