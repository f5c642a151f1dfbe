"""The mean of gradients over all processes that train together, computed while the backward pass goes on.

Knows gradients and the group of processes; does not know what trains. In a single process nothing here does anything.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdxl.training.data_parallel import agreed, average, world_size

LARGE_BYTES = 2**19
"""Gradients of this size are sent while the backward pass goes on. Smaller ones share one message at the end."""
MESSAGE_BYTES = 2**26
"""A message is sent when it has this size: each takes some time, however short it is."""


@dataclass(kw_only=True)
class _Message:
    """Gradients that are sent together."""

    parameters: list[nn.Parameter]
    missing: int = 0
    """How many of them the backward pass has not computed yet."""
    sent: list[Tensor] = field(default_factory=list)
    """The parameters whose gradients are on their way."""
    flat: Tensor | None = None
    """Their gradients one after the other, in memory order; the means, once `work` is done."""
    work: dist.Work | None = None


class GradientAverage:
    """Averages the gradients of some parameters, again and again."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, in_place: bool) -> None:
        """All processes give the same parameters.

        in_place: gradients keep their place in memory. Otherwise they become parts of messages, which saves a copy.
        """
        self._is_last, self._in_place, self._next = False, in_place, 0
        self._messages: list[_Message] = []
        """In the order in which they are sent."""
        self._message_of: dict[int, _Message] = {}
        """The number of a parameter → its message."""
        self._arrived: list[int] = []
        """The numbers of the parameters in the order of the first backward pass."""
        if world_size() == 1:
            return
        self._means = dist.get_backend() == "nccl"  # others only add
        self._parameters = [one for one in parameters if one.nbytes >= LARGE_BYTES]
        for number, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._complete, number))

    @contextmanager
    def during(self, *, last: bool) -> Iterator[None]:
        """While the context lasts, a backward pass runs. It is the `last` one of a step if no other adds to its gradients."""
        self._is_last, self._next = last, 0
        for message in self._messages:
            message.missing = len(message.parameters)
        try:
            yield
        finally:
            self._is_last = False

    @torch.no_grad()
    def receive(self) -> list[Tensor]:
        """After the backward pass: wait for what was sent. The parameters have the mean gradients then, which are returned."""
        if self._arrived and not self._messages:
            self._plan()
        for message in self._messages[self._next :]:  # not complete: some parameters have no gradient
            self._send(message)
        received = []
        for message in self._messages:
            if message.work is None or message.flat is None:
                continue
            message.work.wait()
            if not self._means:
                message.flat.div_(world_size())
            parts = message.flat.split([parameter.numel() for parameter in message.sent])
            for parameter, part in zip(message.sent, parts, strict=True):
                mean = part.as_strided(parameter.shape, _gradient(parameter).stride())
                if self._in_place:
                    _gradient(parameter).copy_(mean)
                else:
                    parameter.grad = mean
                received.append(_gradient(parameter))
            message.flat = message.work = None
        return received

    @torch.no_grad()
    def finish(self, tensors: Sequence[Tensor], *, received: Sequence[Tensor]) -> None:
        """Replace `tensors` by their means, except those that were `received`."""
        done = {id(tensor) for tensor in received}
        average([tensor for tensor in tensors if id(tensor) not in done])

    def _plan(self) -> None:
        """Make the messages, in the order of the first process's first backward pass: others may compute in another order."""
        order = agreed(self._arrived)
        self._messages = list(_messages([self._parameters[number] for number in order]))
        numbers = {id(parameter): number for number, parameter in enumerate(self._parameters)}
        self._message_of = {
            numbers[id(one)]: message for message in self._messages for one in message.parameters
        }

    def _complete(self, number: int, _: Tensor) -> None:
        """The gradient of a parameter is complete: send the messages that are next, as far as they are complete."""
        if not self._messages:
            if self._is_last:
                self._arrived.append(number)
            return
        if number in self._message_of:
            self._message_of[number].missing -= 1
        while self._is_last and self._next < len(self._messages) and not self._messages[self._next].missing:
            self._send(self._messages[self._next])
            self._next += 1

    @torch.no_grad()
    def _send(self, message: _Message) -> None:
        message.sent = [one for one in message.parameters if one.grad is not None and _is_dense(one.grad)]
        if not message.sent:
            return
        message.flat = torch.cat([_flat(_gradient(parameter)) for parameter in message.sent])
        operation = dist.ReduceOp.AVG if self._means else dist.ReduceOp.SUM
        message.work = dist.all_reduce(message.flat, operation, async_op=True)


def _messages(parameters: Sequence[nn.Parameter]) -> Iterator[_Message]:
    """The parameters in messages of one dtype and about `MESSAGE_BYTES`."""
    some: list[nn.Parameter] = []
    for parameter in parameters:
        if some and (
            _dtype(some[0]) is not _dtype(parameter) or sum(one.nbytes for one in some) >= MESSAGE_BYTES
        ):
            yield _Message(parameters=some)
            some = []
        some.append(parameter)
    if some:
        yield _Message(parameters=some)


def _dtype(parameter: nn.Parameter) -> torch.dtype:
    """Of its gradient."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _is_dense(tensor: Tensor) -> bool:
    """Whether messages can hold the tensor as it lies in memory."""
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor [n] in memory order."""
    return tensor.as_strided((tensor.numel(),), (1,))
