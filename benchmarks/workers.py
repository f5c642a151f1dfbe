"""Spread many small jobs over processes and GPUs."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any

import torch
from tqdm import tqdm


def in_processes(
    work: Callable[..., Any], calls: Sequence[tuple], *, workers: int, device: str, desc: str
) -> Iterator[tuple[int, Any]]:
    """Run `work(*call)` for every call, and yield (index of the call, result) as each one finishes.

    `workers` processes share the calls. The GPUs get calls in turn, and each process sees one GPU only.
    """
    gpus = max(torch.cuda.device_count(), 1) if device == "cuda" else 1
    futures: dict[Future, int] = {}
    with contextlib.ExitStack() as pools:
        for gpu in range(gpus):
            with _visible(gpu if gpus > 1 else None):  # the pool starts its processes as calls are submitted
                pool = pools.enter_context(_pool(max(workers // gpus, 1)))
                futures |= {pool.submit(work, *calls[i]): i for i in range(gpu, len(calls), gpus)}
        for future in tqdm(as_completed(futures), total=len(futures), desc=desc, unit="job"):
            yield futures[future], future.result()


@contextlib.contextmanager
def _visible(gpu: int | None) -> Iterator[None]:
    """Let processes that start inside see only this one of the visible GPUs. None shows all of them."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = before.split(",")[gpu] if before else str(gpu)
    try:
        yield
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        os.environ |= {"CUDA_VISIBLE_DEVICES": before} if before is not None else {}


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(workers,))


def _start(workers: int) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // workers, 1))
