"""Which pictures a step sees: cached examples of one shape each, stacked on the device.

Knows shapes and the order of pictures; does not know what is done with them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dataset_and_utils import Example, ExampleDataset
from sdxl.training.taught import TaughtExample
from sdxl.training.text_conditioning import TextConditioning


@dataclass(kw_only=True)
class Bucket:
    """All examples of one shape, and which of them the next step uses."""

    examples: Example
    """Stacked: latents [n, 4, h, w], mask [n, 1, h, w], ids 2×[n, 77·chunks], time ids [n, 6]."""
    chosen: Tensor
    """Rows of `examples` [micro-batches, b]. Every step overwrites them in place, where a captured step reads them."""
    shares: Tensor
    """How often each example is drawn, compared with all others [n], on the CPU."""
    captions: TextConditioning | None = None
    """Text conditioning of every distinct caption, once it no longer changes."""
    caption_of: Tensor | None = None
    """Which of them each example has [n]."""

    def __len__(self) -> int:
        return len(self.examples.latents)

    def micro_batches(self) -> Iterator[tuple[Example, TextConditioning | None]]:
        """The chosen examples, with their text conditioning once it no longer changes."""
        for rows in self.chosen:
            text = None
            if self.captions is not None and self.caption_of is not None:
                text = self.captions.take(self.caption_of[rows])
            yield self.examples.take(rows), text


class Batches:
    """Endless batches of one dataset.

    Each draw picks a bucket in proportion to the shares of its examples, then takes the next ones of a shuffled pass
    through that bucket. So every example is seen as often as its share says.
    """

    def __init__(
        self,
        dataset: ExampleDataset,
        size: int,
        *,
        micro_batches: int = 1,
        seed: int,
        weight: float = 1.0,
    ) -> None:
        """Batches of `micro_batches` × `size` examples of one shape.

        weight: factor of their loss, for steps that add the losses of several datasets.
        """
        self.weight = weight
        self.generator = torch.Generator().manual_seed(seed)
        self.buckets: list[Bucket] = []
        for indices in by_shape(dataset):
            examples = dataset.collate(indices)
            chosen = torch.zeros(micro_batches, size, dtype=torch.long, device=examples.latents.device)
            shares = torch.tensor([dataset.examples[index].share for index in indices], dtype=torch.float64)
            self.buckets.append(Bucket(examples=examples, chosen=chosen, shares=shares))
        self._queues = [torch.empty(0, dtype=torch.long) for _ in self.buckets]
        self._shares = torch.stack([bucket.shares.sum() for bucket in self.buckets])

    @property
    def taught_by_base(self) -> bool:
        """Whether the base teaches them."""
        return isinstance(self.buckets[0].examples, TaughtExample)

    @property
    def queues(self) -> list[Tensor]:
        """For each bucket the rows [n] that come next, of passes that were shuffled already."""
        return list(self._queues)

    @queues.setter
    def queues(self, queues: list[Tensor]) -> None:
        self._queues = queues

    def draw(self) -> int:
        """Choose the next batch. Returns the number of its bucket, which then holds the choice."""
        number = 0
        if len(self.buckets) > 1:
            number = int(torch.multinomial(self._shares, 1, generator=self.generator))
        bucket, queue = self.buckets[number], self._queues[number]
        wanted = bucket.chosen.numel()
        while len(queue) < wanted:
            queue = torch.cat([queue, self._shuffled_pass(bucket.shares)])
        bucket.chosen.copy_(queue[:wanted].view_as(bucket.chosen))
        self._queues[number] = queue[wanted:]
        return number

    def _shuffled_pass(self, shares: Tensor) -> Tensor:
        """As many rows as there are examples, in random order.

        An example that should occur 1.3 times in a pass occurs once or twice. Source: systematic sampling, Madow, "On
        the theory of systematic sampling" (Annals of Mathematical Statistics, 1949).
        """
        ends = (shares / shares.mean()).cumsum(0) + torch.rand((), generator=self.generator)
        times = ends.floor().diff(prepend=torch.zeros(1, dtype=ends.dtype)).long()
        rows = torch.arange(len(shares)).repeat_interleave(times)
        return rows[torch.randperm(len(rows), generator=self.generator)]


def by_shape(dataset: ExampleDataset) -> list[list[int]]:
    """The indices of the examples of each shape of latents."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, example in enumerate(dataset.examples):
        groups.setdefault(tuple(example.latents.shape), []).append(index)
    return list(groups.values())
