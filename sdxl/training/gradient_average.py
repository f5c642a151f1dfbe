"""The mean of gradients over all processes that train together, computed while the backward pass goes on.

Knows gradients and the group of processes; does not know what trains. In a single process nothing here does anything.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdxl.training.data_parallel import agreed, average, world_size
from sdxl.training.memory_plan import gradient_dtype

LARGE_BYTES = 2**19
"""Gradients of this size are sent while the backward pass goes on. Smaller ones share one message at the end."""
MESSAGE_BYTES = 2**26
"""Gradients are collected until a message has this size, because every message costs time."""


@dataclass(kw_only=True)
class _Message:
    """Gradients that are sent together."""

    parameters: list[nn.Parameter]
    missing: int = 0
    """How many of them the backward pass has not computed yet."""
    sent: list[nn.Parameter] = field(default_factory=list)
    """The parameters whose gradients are on their way."""
    flat: Tensor = field(default_factory=lambda: torch.empty(0))
    """Their gradients one after the other, in memory order. The gradients of the parameters are views of it."""
    work: dist.Work | None = None


class GradientAverage:
    """Averages the gradients of some parameters, again and again."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """All processes give the same parameters."""
        self._is_last, self._next = False, 0
        self._messages: list[_Message] = []
        """In the order in which they are sent."""
        self._message_of: dict[int, _Message] = {}
        """The id of a parameter → its message."""
        self._arrived: list[Tensor] = []
        """The parameters in the order of the first backward pass."""
        if world_size() == 1:
            return
        self._means = dist.get_backend() == "nccl"  # others only add
        self._parameters = [one for one in parameters if _bytes(one) >= LARGE_BYTES]
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._complete)

    @contextmanager
    def during(self, *, last: bool) -> Iterator[None]:
        """While the context lasts, a backward pass runs. It is the `last` one of a step if no other adds to its gradients."""
        self._is_last, self._next = last, 0
        for message in self._messages:
            message.missing = sum(one.requires_grad for one in message.parameters)
        try:
            yield
        finally:
            self._is_last = False

    @torch.no_grad()
    def receive(self) -> list[Tensor]:
        """After the backward pass: wait for what was sent. The parameters have the mean gradients then, which are returned."""
        if self._arrived and not self._messages:
            self._plan()
        # What was not sent on the way: all messages of the first step, and those that miss a gradient.
        for message in self._messages[self._next :]:
            self._send(message)
        received = []
        for message in self._messages:
            if message.work is None:
                continue
            message.work.wait()
            if not self._means:
                message.flat.div_(world_size())
            received += map(_gradient, message.sent)
            message.work = None
        return received

    @torch.no_grad()
    def finish(self, tensors: Sequence[Tensor], *, received: Sequence[Tensor]) -> None:
        """Replace `tensors` by their means, except those that were `received`."""
        done = {id(tensor) for tensor in received}
        average([tensor for tensor in tensors if id(tensor) not in done])

    def _plan(self) -> None:
        """Make the messages, in the order of the first process's first backward pass: others may compute in another order."""
        numbers = {id(parameter): number for number, parameter in enumerate(self._parameters)}
        order = agreed([numbers[id(parameter)] for parameter in self._arrived])
        self._messages = list(_messages([self._parameters[number] for number in order]))
        self._message_of = {id(one): message for message in self._messages for one in message.parameters}

    def _complete(self, parameter: Tensor) -> None:
        """The gradient of a parameter is complete: send the messages that are next, as far as they are complete."""
        if not self._messages:
            if self._is_last:
                self._arrived.append(parameter)
            return
        if id(parameter) in self._message_of:
            self._message_of[id(parameter)].missing -= 1
        while self._is_last and self._next < len(self._messages) and not self._messages[self._next].missing:
            self._send(self._messages[self._next])
            self._next += 1

    @torch.no_grad()
    def _send(self, message: _Message) -> None:
        message.sent = [
            one
            for one in message.parameters
            if one.requires_grad and one.grad is not None and _is_dense(one.grad)
        ]
        if not message.sent:
            return
        if not _holds(message):
            message.flat = torch.cat([_flat(_gradient(parameter)) for parameter in message.sent])
            for parameter, part in _parts(message):  # frees the gradients that were computed
                parameter.grad = part.as_strided(parameter.shape, _gradient(parameter).stride())
        operation = dist.ReduceOp.AVG if self._means else dist.ReduceOp.SUM
        message.work = dist.all_reduce(message.flat, operation, async_op=True)


def _holds(message: _Message) -> bool:
    """Whether the gradients still are views of the last message: then a backward pass has added to them in place."""
    return message.flat.numel() == sum(one.numel() for one in message.sent) and all(
        _gradient(one).data_ptr() == part.data_ptr() for one, part in _parts(message)
    )


def _parts(message: _Message) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter with its part [n] of the message."""
    parts = message.flat.split([parameter.numel() for parameter in message.sent])
    return zip(message.sent, parts, strict=True)


def _messages(parameters: Sequence[nn.Parameter]) -> Iterator[_Message]:
    """The parameters in messages of one dtype and about `MESSAGE_BYTES`."""
    some: list[nn.Parameter] = []
    for parameter in parameters:
        if some and (
            gradient_dtype(some[0]) is not gradient_dtype(parameter)
            or sum(map(_bytes, some)) >= MESSAGE_BYTES
        ):
            yield _Message(parameters=some)
            some = []
        some.append(parameter)
    if some:
        yield _Message(parameters=some)


def _bytes(parameter: nn.Parameter) -> int:
    """Of its gradient."""
    return parameter.numel() * gradient_dtype(parameter).itemsize


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
