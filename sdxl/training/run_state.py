"""Everything in a run that changes from step to step: with it, and with the same settings and pictures, a run goes on as if
it had never stopped.

That is what trains, what the optimizers remember, the order of the pictures, and where each random generator is. Knows
these objects; does not know files, or when a state is saved.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from sdxl.errors import WeightsError
from sdxl.training.batches import Batches
from sdxl.training.data_parallel import world_size
from sdxl.training.memory_plan import gradient_dtype
from sdxl.training.optimizers import Optimizers
from sdxl.training.sharding import joined, part_of
from sdxl.training.watch import Watch

Scalars = dict[str, float | int]
"""Name → a number that an optimizer keeps beside its tensors."""
_WEIGHT = "weight."
"""What the names begin with of what trains; its number follows."""
_OPTIMIZER = "optimizer."
"""What the names begin with of what an optimizer remembers; its number and that of the weight follow."""
_BEST = "best."
"""The same for what the watch keeps: the fine-tune of the best moment, and previews."""
_LONGEST_QUEUE = 1 << 20
"""Rows. A bucket's queue has at most as many as a batch and a pass through the bucket have."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """Where the random generators of one process are, and which pictures come next."""

    generators: Mapping[str, Tensor]
    """Name → state, as `torch.Generator.get_state` returns it: bytes on the CPU."""
    queues: Sequence[Sequence[Tensor]]
    """For each source, `Batches.queues`."""

    def as_json(self) -> dict[str, Any]:
        """The same in texts and numbers."""
        return {
            "generators": {name: state.numpy().tobytes().hex() for name, state in self.generators.items()},
            "queues": [[queue.tolist() for queue in queues] for queues in self.queues],
        }


class RunState:
    """The changing parts of a run, to be copied and to be set."""

    def __init__(
        self, optimizers: Optimizers, sources: Sequence[Batches], generator: torch.Generator, watch: Watch
    ) -> None:
        """generator: draws all that is random in a step, on the device that trains."""
        self.device = generator.device
        self._optimizers, self._sources, self._generator = optimizers, sources, generator
        self._watch = watch

    def tensors(self) -> dict[str, Tensor]:
        """What trains, what the optimizers remember and what the watch keeps: name → the tensor itself, on its own device."""
        found = {f"{_WEIGHT}{i}": p.detach() for i, p in enumerate(self._optimizers.parameters)}
        found |= {f"{_BEST}{name}": tensor for name, tensor in self._watch.tensors().items()}
        for state, key, name in self._entries():
            if isinstance(state[key], Tensor):
                found |= {f"{name}{inner}": part for inner, part in _parts(state[key])}
        return found

    @property
    def is_shared(self) -> bool:
        """Whether `tensors` are only this process's parts of what several processes share."""
        return self._optimizers.shards is not None

    def like(self) -> dict[str, Tensor]:
        """Name → a tensor without memory, of the type and shape of the whole one."""
        return {name: self._like(name, tensor) for name, tensor in self.tensors().items()}

    def whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """`tensors`, whole. Processes that share them must ask together."""
        for name, tensor in self.tensors().items():
            yield name, joined(tensor) if self._is_part(name, tensor) else tensor

    def _like(self, name: str, tensor: Tensor) -> Tensor:
        rows = world_size() if self._is_part(name, tensor) else 1
        shape = [tensor.shape[0] * rows, *tensor.shape[1:]] if tensor.dim() else []
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    def _is_part(self, name: str, tensor: Tensor) -> bool:
        shards, number = self._optimizers.shards, _weight_of(name)
        return (
            shards is not None
            and tensor.dim() > 0
            and 0 <= number < len(shards.is_part)
            and shards.is_part[number]
        )

    def watched(self) -> dict[str, Any]:
        """What the watch has seen."""
        return self._watch.as_json()

    def scalars(self) -> Scalars:
        """The numbers that optimizers keep: of each weight, and of each group of weights."""
        numbers = [*self._entries(), *self._of_groups()]
        return {name: where[key] for where, key, name in numbers if _is_number(where[key])}

    def order(self) -> Order:
        """The order of this process. Nothing changes what it returns."""
        return Order(
            generators={name: one.get_state() for name, one in self._generators().items()},
            queues=[batches.queues for batches in self._sources],
        )

    def restore(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        scalars: Scalars,
        order: Mapping[str, Any],
        watched: Mapping[str, Any],
    ) -> None:
        """Set everything. Call `differs` first: it checks `tensors`, which come one by one with their names.

        Raises:
            WeightsError: `order` or `watched` is not that of such a run.
        """
        best, own = {}, self.tensors()
        with torch.no_grad():
            for name, tensor in tensors:
                if name.startswith(_BEST):
                    best[name.removeprefix(_BEST)] = tensor.cpu()
                elif name in own:
                    own[name].copy_(part_of(tensor) if self._is_part(name, own[name]) else tensor)
        if self._optimizers.copies is not None:
            self._optimizers.copies.renew()
        numbers = [*self._entries(), *self._of_groups()]
        for where, key, name in numbers:
            if name in scalars and _is_number(where[key]):
                where[key] = type(where[key])(scalars[name])
        try:
            self._set_order(order)
            self._watch.restore(watched, best)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
            raise WeightsError(
                "The order of pictures or the checks in the state are damaged: take another state."
            ) from error

    def differs(self, saved: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str | None:
        """The first name for which a saved tensor, of this type and shape, is not as in this run; None if all fit.

        What an optimizer remembers of token rows may be missing: if they never trained, there is nothing.

        Optimizers make what they remember in their first step. So let them do one that changes nothing, as
        torch.distributed.checkpoint does.
        """
        self._optimizers.set_rates(weights=0.0, rows=0.0)
        for optimizer in self._optimizers.all:
            if not optimizer.state:
                _step_for_nothing(optimizer)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the gradients are no longer needed
        own = self.like()
        for name in sorted(own.keys() | saved.keys()):
            if name.startswith(_BEST):  # the watch checks these
                continue
            of_text = name.startswith(_OPTIMIZER) and _weight_of(name) >= self._optimizers.count_of_weights
            if of_text and name in own and name not in saved:
                continue
            if name not in own or saved.get(name) != (own[name].dtype, tuple(own[name].shape)):
                return name
        return None

    def _set_order(self, order: Mapping[str, Any]) -> None:
        queues, generators = order["queues"], self._generators()
        if len(queues) != len(self._sources) or order["generators"].keys() != generators.keys():
            raise ValueError("other sources or generators")
        for batches, found in zip(self._sources, queues, strict=True):
            batches.queues = [
                _queue(rows, len(bucket)) for rows, bucket in zip(found, batches.buckets, strict=True)
            ]
        for name, generator in generators.items():
            state = torch.tensor(list(bytes.fromhex(order["generators"][name])), dtype=torch.uint8)
            if state.shape != generator.get_state().shape:
                raise ValueError("a generator of another kind")
            generator.set_state(state)

    def _generators(self) -> dict[str, torch.Generator]:
        """All random generators that a step uses. Stochastic rounding uses torch's own."""
        found = {"recipe": self._generator, "torch": torch.default_generator}
        if self.device.type == "cuda":
            found["cuda"] = torch.cuda.default_generators[self.device.index or 0]
        return found | {f"batches.{i}": batches.generator for i, batches in enumerate(self._sources)}

    def _entries(self) -> Iterator[tuple[dict[str, Any], str, str]]:
        """What optimizers remember of each weight: the dictionary, the key, and a name for both."""
        numbers = {id(p): i for i, p in enumerate(self._optimizers.parameters)}
        for which, optimizer in enumerate(self._optimizers.all):
            for p, state in optimizer.state.items():
                for key in state:
                    yield state, key, f"{_OPTIMIZER}{which}.{numbers[id(p)]}.{key}"

    def _of_groups(self) -> Iterator[tuple[dict[str, Any], str, str]]:
        """The numbers of groups, such as Prodigy's estimate of the rate: the group, the key, and a name for both. Rates are
        set anew in each step."""
        for which, optimizer in enumerate(self._optimizers.all):
            for number, group in enumerate(optimizer.param_groups):
                for key in optimizer.defaults:
                    if key != "lr" and _is_number(group[key]):
                        yield group, key, f"group.{which}.{number}.{key}"


def undisturbed(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn in this context from torch's own generators is not missing afterwards: stochastic rounding uses them."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _weight_of(name: str) -> int:
    """The number of the weight in a name that begins with `_WEIGHT` or `_OPTIMIZER`; -1 if it has none."""
    parts = name.split(".")
    place = {_WEIGHT: 1, _OPTIMIZER: 2}.get(f"{parts[0]}.", len(parts))
    return int(parts[place]) if len(parts) > place and parts[place].isdecimal() else -1


def _step_for_nothing(optimizer: Optimizer) -> None:
    """A step with rates and gradients of 0."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p, dtype=gradient_dtype(p))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _parts(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors of which `value` consists: itself, or those of torchao's 8-bit state."""
    if type(value) in (Tensor, torch.nn.Parameter):
        yield "", value.detach()
        return
    names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
    for name in names:
        if name != "qmap":  # the table of what codes mean, always the same
            yield f".{name}", getattr(value, name)


def _queue(rows: Any, count: int) -> Tensor:
    """Rows of a bucket with `count` examples."""
    if len(rows) > _LONGEST_QUEUE or not all(type(row) is int and 0 <= row < count for row in rows):
        raise ValueError("no rows of this bucket")
    return torch.tensor(rows, dtype=torch.long)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(cast(float, value))
