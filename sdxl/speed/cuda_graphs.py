"""Capture work on fixed tensors as CUDA graphs and replay it, so that the GPU never waits for launches by the CPU.

Knows streams and graphs; does not know training.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

WARM_UP_CALLS = 3
"""Calls of a piece of work before its capture. In these, libraries allocate workspaces and choose kernels."""

Result = TypeVar("Result")
"""A tensor, or a tuple of tensors."""


class GraphedWork:
    """Runs pieces of work, each under a key: the first calls eagerly, later calls as a CUDA graph. With `at_once`, all calls.

    Each call of a piece must do the same operations on the same tensors and must not wait for the GPU. Copy new inputs into
    its tensors before the call; its next call overwrites its result. Random numbers of `generator` are the same as without
    graphs. All graphs share one pool of memory.
    """

    def __init__(
        self,
        device: torch.device,
        generator: torch.Generator | None = None,
        *,
        enabled: bool = True,
        at_once: bool = False,
    ) -> None:
        """Create without graphs.

        generator: the source of all random numbers in the work; None if it draws none.
        enabled: False runs every call eagerly, as does a `device` other than CUDA.
        at_once: the first call runs the work several times to capture it. For work that changes nothing but its result.
            Kernels may be chosen otherwise during a capture, and round otherwise: so all results are of the graph.
        """
        self.enabled = enabled and device.type == "cuda"
        self.generator, self._at_once = generator, at_once
        self.forget()

    def forget(self, *, warm_up_calls: int = WARM_UP_CALLS) -> None:
        """Drop all graphs and their memory. Call this when the work itself changes.

        warm_up_calls: before each capture from now on. 1 suffices for work that was captured before and changes little.
        """
        self._warm_up_calls = warm_up_calls
        self._calls: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None
        self._stream = torch.cuda.Stream() if self.enabled else None

    def holds(self, key: Hashable) -> bool:
        """Whether the work of `key` is captured, so that calls replay it."""
        return key in self._graphs

    def __call__(self, key: Hashable, work: Callable[[], Result]) -> Result:
        """Run `work`, or replay the graph of `key`; return the result, a tensor or several."""
        if not self.enabled:
            return work()
        if self.holds(key):
            graph, result = self._graphs[key]
            graph.replay()
            return result
        if self._at_once:
            for _ in range(self._warm_up_calls):
                self._warm_up(work)
            return self._capture(key, work)
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if calls <= self._warm_up_calls:
            return self._warm_up(work)
        return self._capture(key, work)

    def _warm_up(self, work: Callable[[], Result]) -> Result:
        """Run `work` eagerly on the stream of the later capture.

        autograd accumulates a gradient on the stream where it first appeared; that must be the capturing stream.
        """
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _capture(self, key: Hashable, work: Callable[[], Result]) -> Result:
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        torch.cuda.synchronize()
        # "thread_local": other threads, such as a server's, may use CUDA during the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        self._graphs[key] = graph, result

        # A capture only records: replay the graph to compute this call's result.
        graph.replay()
        return result
