"""Work on fixed tensors, replayed as CUDA graphs so that the CPU's launches are off the critical path.

Knows streams and graphs; does not know training.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

WARM_UP_CALLS = 3
"""Calls of a piece of work that run as they are before it is captured: libraries allocate and choose kernels in them."""


class GraphedWork:
    """Runs pieces of work by key: as they are at first, then as one CUDA graph each, in one pool of memory.

    A piece must do the same operations on the same tensors in every call, and must not wait for the GPU. What differs
    between calls is copied into its tensors beforehand; what it returns is overwritten by its next call. Random numbers
    of `generator` go on from call to call as they would without graphs.
    """

    def __init__(
        self, device: torch.device, generator: torch.Generator | None = None, *, enabled: bool = True
    ) -> None:
        """Without `enabled`, or without CUDA, every call runs as it is; work that draws no random numbers needs no
        `generator`."""
        self.enabled = enabled and device.type == "cuda"
        self.generator = generator
        self.forget()

    def forget(self) -> None:
        """Drop all graphs and their memory: the work is about to change."""
        self._calls: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None
        self._stream = torch.cuda.Stream() if self.enabled else None

    def holds(self, key: Hashable) -> bool:
        """Whether the work of `key` is captured: from now on it is replayed."""
        return key in self._graphs

    def __call__(self, key: Hashable, work: Callable[[], Tensor]) -> Tensor:
        """Do `work`, or what was captured for `key`; returns its result."""
        if not self.enabled:
            return work()
        if self.holds(key):
            graph, result = self._graphs[key]
            graph.replay()
            return result
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if calls <= WARM_UP_CALLS:
            return self._aside(work)
        return self._capture(key, work)

    def _aside(self, work: Callable[[], Tensor]) -> Tensor:
        """Do `work` on the stream that captures: gradients belong to the stream on which they first appear."""
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _capture(self, key: Hashable, work: Callable[[], Tensor]) -> Tensor:
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        torch.cuda.synchronize()
        # Other threads, such as a server's, may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        self._graphs[key] = graph, result
        graph.replay()
        return result
