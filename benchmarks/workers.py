"""Work spread over processes and GPUs, as every bench of many small trainings needs it."""

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
    """(index of the call, result) of `work(*call)` for every call, as they are done.

    The calls are dealt out to the GPUs in turn, `workers` processes in all; each process sees one GPU only.
    """
    gpus = max(torch.cuda.device_count(), 1) if device == "cuda" else 1
    futures: dict[Future, int] = {}
    with contextlib.ExitStack() as pools:
        for gpu in range(gpus):
            with _visible(gpu if gpus > 1 else None):  # processes start while calls are handed in
                pool = pools.enter_context(_pool(max(workers // gpus, 1)))
                futures |= {pool.submit(work, *calls[i]): i for i in range(gpu, len(calls), gpus)}
        for future in tqdm(as_completed(futures), total=len(futures), desc=desc, unit="job"):
            yield futures[future], future.result()


@contextlib.contextmanager
def _visible(gpu: int | None) -> Iterator[None]:
    """Processes that are started inside see this one of the visible GPUs; None: all of them."""
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
