"""Run the text encoders for drawing without waiting for launches by the CPU: 44 layers are some 600 small kernels.

Knows text encoders and graphs; does not know prompts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdxl.model.prompt_chunks import states_of
from sdxl.speed.cuda_graphs import GraphedWork

MOST_GRAPHS = 8
"""Most graphs to keep. One more drops them all."""


class EncoderRunner:
    """Called like `states_of`. On a GPU, each number of chunks is captured once as a CUDA graph and then replayed.

    Fine-tunes change weights in place. They exchange tables of token rows, so a graph belongs to the tables it reads.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._graphs = GraphedWork(device, enabled=enabled, at_once=True)
        self._inputs: dict[tuple, tuple[tuple[Tensor, Tensor], list[Tensor]]] = {}
        """The ids that a graph reads, and its tables, which must live as long as the graph."""

    def forget(self) -> None:
        """Drop all graphs and their memory."""
        self._inputs.clear()
        self._graphs.forget()

    def __call__(
        self, text_encoders: Sequence[Any], chunks: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `states_of`, in new tensors."""
        if not self._graphs.enabled:
            return states_of(text_encoders, chunks)
        tables = [encoder.get_input_embeddings().weight for encoder in text_encoders]
        ends = [encoder.config.eos_token_id for encoder in text_encoders]  # where the graph pools
        key = (*(table.data_ptr() for table in tables), *ends, tuple(chunks[0].shape))
        if key not in self._inputs:
            if len(self._inputs) >= MOST_GRAPHS:
                self.forget()
            self._inputs[key] = (chunks[0].clone(), chunks[1].clone()), tables
        ids, _ = self._inputs[key]
        for own, given in zip(ids, chunks, strict=True):
            own.copy_(given)
        first, second, pooled = self._graphs(key, lambda: states_of(text_encoders, ids))
        return first.clone(), second.clone(), pooled.clone()
