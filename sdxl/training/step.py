"""The machinery of one training step: gradients, then the update, each captured as a CUDA graph.

Knows graphs, precision, accumulation and clipping; does not know what the loss measures, schedules or when the pivot is.

A step is two pieces of work, so that the loss can be read between them, before a bad step reaches the weights. What
differs between steps (the chosen pictures, the learning rates) is written into fixed tensors first. So a captured graph
can repeat the step without the CPU, which would take longer than the GPU to launch its thousands of kernels.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sdxl.speed.autocast import autocast
from sdxl.speed.cuda_graphs import GraphedWork
from sdxl.training.batches import Batches
from sdxl.training.config import TrainingConfig
from sdxl.training.gradient_average import GradientAverage
from sdxl.training.loss import Part
from sdxl.training.optimizers import Optimizers
from sdxl.training.token_rows import NewTokens

MAX_GRAD_NORM = 1.0
"""Gradients are clipped to this norm."""

Loss = Callable[..., list[Tensor]]
"""Parts of a step → the loss of each, a scalar."""


class TrainingStep:
    """One optimizer step, run again and again: `gradients`, then `update`."""

    def __init__(
        self,
        loss: Loss,
        sources: Sequence[Batches],
        optimizers: Optimizers,
        tokens: NewTokens,
        config: TrainingConfig,
        generator: torch.Generator,
        *,
        mixed_precision: bool,
    ) -> None:
        """A step on one batch of each of `sources`.

        generator: draws everything random in `loss`; it is on the device that trains.
        mixed_precision: on CUDA, compute in bf16 whatever dtype the weights are held in.
        """
        self._loss, self._sources = loss, sources
        self._optimizers, self._tokens = optimizers, tokens
        self._device, self._mixed_precision = generator.device, mixed_precision
        # FSDP gathers shared weights by hooks that wait for each other, which a graph does not record.
        graphs = config.cuda_graph and optimizers.shards is None
        self._graphed = GraphedWork(self._device, generator, enabled=graphs)
        self._taught_in_batch = config.taught_in_batch
        self._one_graph = all(len(batches.buckets) == 1 for batches in sources)
        self._average = GradientAverage([] if optimizers.shards is not None else optimizers.held)

    def gradients(self, drawn: tuple[int, ...]) -> tuple[float, list[float]]:
        """Compute clipped gradients of the batches in the buckets `drawn`, one number for each source.

        Returns the loss, and the gradients' norms before clipping: of the weights, then of the token rows and the
        text encoders' matrices while they train.
        """
        # With one graph, gradients may start as None: the graph allocates them, and finds them at the same place in
        # every replay. Before it is captured, each step must allocate them anew.
        if self._one_graph and not self._graphed.holds(drawn):
            self._optimizers.zero_grad(set_to_none=True)
        loss, *norms = self._graphed(drawn, lambda: self._compute_gradients(drawn)).tolist()
        return loss, norms

    def update(self) -> None:
        """Let the optimizers apply the gradients."""
        if self._optimizers.capturable:
            self._graphed("update", self._compute_update)
        else:
            self._compute_update()

    def freeze_text(self) -> None:
        """Drop all graphs, because what trains is about to change; the next steps capture new ones."""
        self._graphed.forget(warm_up_calls=1)

    def _compute_gradients(self, drawn: tuple[int, ...]) -> Tensor:
        # With several buckets there is one graph for each, and all must add to the same gradients: fill these with
        # zeros inside the graph instead of allocating new ones.
        if not self._one_graph:
            self._optimizers.zero_grad(set_to_none=False)

        # Add up the loss and its gradients: over micro-batches (accumulation), and over the subject and the prior.
        total = torch.zeros((), device=self._device)
        groups = list(self._groups(drawn))
        for number, group in enumerate(groups, 1):
            with autocast(self._device, self._mixed_precision):
                losses = self._loss(*(part for part, _ in group))
                weighted = torch.stack(
                    [loss * weight for loss, (_, weight) in zip(losses, group, strict=True)]
                )
            with self._average.during(last=number == len(groups)):
                weighted.sum().backward()
            total += weighted.detach().sum()

        # Average over all processes. The loss too: if one process must stop, all must.
        received = self._average.receive()
        self._average.finish([*self._optimizers.to_average(), total], received=received)
        return torch.stack([total, *self._optimizers.clip(MAX_GRAD_NORM)])

    def _groups(self, drawn: tuple[int, ...]) -> Iterator[list[tuple[Part, float]]]:
        """The parts of a step with the weights of their losses: those in one list are computed at once.

        What the base teaches is a part of the subject's batch, if that has room. All else is computed on its own, so that
        memory holds the activations of one batch.
        """
        parts = [list(_parts(*source)) for source in zip(self._sources, drawn, strict=True)]
        taught = [source.taught_by_base and self._taught_in_batch for source in self._sources]
        with_subject = [parts[0], *itertools.compress(parts, taught)]
        alone = [one for one, is_taught in zip(parts[1:], taught[1:], strict=True) if not is_taught]
        yield from map(list, zip(*with_subject, strict=True))
        yield from ([part] for one in alone for part in one)

    def _compute_update(self) -> Tensor:
        self._optimizers.step()
        if self._optimizers.rows_train:
            self._tokens.pull_to_scale()
        return self._tokens.parameters[0]  # graphed work must return a tensor; nobody reads this one


def _parts(source: Batches, number: int) -> Iterator[tuple[Part, float]]:
    """What was drawn of a source's bucket, one part for each micro-batch, with the weight of its loss."""
    bucket = source.buckets[number]
    for batch, captions in bucket.micro_batches():
        yield Part(batch=batch, captions=captions), source.weight / len(bucket.chosen)
