"""Examples that the base teaches: noisy latents with the base's predictions.

Knows examples; does not know how they are made or learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dataset_and_utils import Example, ExampleDataset


@dataclass(frozen=True, kw_only=True)
class TaughtExample(Example):
    """An example whose latents have noise. Stacked, all tensors have B in front."""

    timesteps: Tensor
    """How much noise []."""
    targets: Tensor
    """What the base predicts [4, h, w]."""

    def take(self, rows: Tensor) -> "TaughtExample":
        """Select the examples at `rows` [B], an integer tensor on their device, from stacked examples."""
        found = vars(super().take(rows))
        return TaughtExample(**found, timesteps=self.timesteps[rows], targets=self.targets[rows])


class TaughtDataset(ExampleDataset):
    """Such examples, in the form that torch's data loaders take."""

    def __init__(self, examples: Sequence[TaughtExample]) -> None:
        super().__init__(examples)
        self._taught = examples

    def collate(self, indices: Sequence[int]) -> TaughtExample:
        """Stack the B examples at `indices`, all of one shape."""
        chosen = [self._taught[index] for index in indices]
        return TaughtExample(
            **vars(super().collate(indices)),
            timesteps=torch.stack([one.timesteps for one in chosen]),
            targets=torch.stack([one.targets for one in chosen]),
        )
