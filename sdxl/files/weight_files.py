"""safetensors, in files of their own or where they lie in a plain tar, read as fast as memory takes them.

A file's tensors become views of one block of memory, filled by several threads; on a machine with CUDA the block can be
pinned, so that it is copied to the GPU without another pass. The library's own reader maps files, and every page that is
touched for the first time costs. Knows the format (https://huggingface.co/docs/safetensors); does not know fine-tunes.
"""

import contextlib
import json
import math
import mmap
import os
import struct
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl.errors import WeightsError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LARGEST_HEADER = 16 << 20
"""Bytes; that of SDXL's UNet has 0.2 million."""
_MOST_SIDES, _LARGEST_SIDE = 8, 2**40
_PIECE = 32 << 20
"""Bytes that a thread reads at a time."""
_THREADS = 8


@dataclass(frozen=True)
class WeightFile:
    """A stranger's safetensors file; everything that its header claims is checked against its size."""

    path: Path
    name: str
    """What messages call it."""
    start: int = 0
    """Where it begins in `path`, in bytes."""
    size: int | None = None
    """Its bytes; None for all from `start`."""

    @cached_property
    def _header(self) -> tuple[int, dict[str, tuple[torch.dtype, list[int], int, int]], dict[str, str]]:
        """Where the data begins in `path`; name → (dtype, shape, first byte, byte after the last); what else is told.

        Raises:
            WeightsError: not of the format, or damaged.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                there = os.fstat(file.fileno()).st_size - self.start
                size = there if self.size is None else min(self.size, there)
                (length,) = struct.unpack("<Q", file.read(8))
                if length > min(_LARGEST_HEADER, size - 8):
                    raise ValueError("its header is too long")
                header = json.loads(file.read(length))
            told = header.pop("__metadata__", {})
            entries = {name: _entry(entry) for name, entry in header.items()}
            # As the format demands it: no holes, nothing twice, so that memory is bounded by the file.
            end = 0
            for *_, start, stop in sorted(entries.values(), key=lambda entry: entry[2:]):
                if start != end:
                    raise ValueError("its tensors overlap, or leave holes")
                end = stop
            if end != size - 8 - length:
                raise ValueError("its tensors do not fill it")
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            struct.error,
            RecursionError,
        ) as error:
            raise WeightsError(
                f"{self.name} is damaged or no safetensors file: download it again."
            ) from error
        told = told if isinstance(told, dict) else {}
        told = {name: text for name, text in told.items() if isinstance(text, str)}
        return self.start + 8 + length, entries, told

    @property
    def keys(self) -> set[str]:
        """The tensors' names.

        Raises:
            WeightsError: not of the format, or damaged.
        """
        return set(self._header[1])

    @property
    def metadata(self) -> dict[str, str]:
        """What else the header tells."""
        return self._header[2]

    def read(self, *, pinned: bool = False) -> dict[str, Tensor]:
        """All tensors, in memory of their own, which is pinned if asked for and there is CUDA.

        Raises:
            WeightsError: damaged.
        """
        begin, entries, _ = self._header
        length = max((stop for *_, stop in entries.values()), default=0)
        if not length:
            return {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape, *_) in entries.items()}
        block = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # a five-hundredth of the pages to touch
            with contextlib.suppress(OSError):
                block.madvise(mmap.MADV_HUGEPAGE)
        self._fill(block, begin, length)
        whole = torch.frombuffer(block, dtype=torch.uint8)
        if pinned and torch.cuda.is_available():
            _pin(whole, block)
        return {
            name: _view(whole[start:stop], dtype, shape)
            for name, (dtype, shape, start, stop) in entries.items()
        }

    def _fill(self, block: mmap.mmap, begin: int, length: int) -> None:
        file = os.open(self.path, os.O_RDONLY)
        target = memoryview(block)

        def piece(start: int) -> None:
            stop = min(start + _PIECE, length)
            while start < stop:
                count = os.preadv(file, [target[start:stop]], begin + start)
                if not count:
                    raise WeightsError(f"{self.name} is damaged: download it again.")
                start += count

        try:
            with ThreadPoolExecutor(_THREADS) as threads:
                list(threads.map(piece, range(0, length, _PIECE)))
        finally:
            os.close(file)
            target.release()


def _entry(entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    """One tensor of a header."""
    dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > _MOST_SIDES:
        raise ValueError("a shape is none")
    if not all(type(number) is int and 0 <= number <= _LARGEST_SIDE for number in (*shape, start, stop)):
        raise ValueError("a size is no whole number")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor's place does not fit its shape")
    return dtype, shape, start, stop


def _view(part: Tensor, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if part.storage_offset() % dtype.itemsize:  # where tensors of several sizes are oddly ordered
        part = part.clone()
    return part.view(dtype).view(shape)


def _pin(whole: Tensor, block: mmap.mmap) -> None:
    """Lock the block's pages for the GPU as long as tensors of it live."""
    cudart: Any = torch.cuda.cudart()
    address, length = whole.data_ptr(), whole.nbytes
    if int(cudart.cudaHostRegister(address, length, 0)) != 0:
        # Too much is locked already: copies only take longer. CUDA remembers the error for whoever launches next.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        return

    def release(kept: mmap.mmap = block) -> None:  # the memory must outlast the lock
        torch.cuda.synchronize()  # a copy from it may be under way
        cudart.cudaHostUnregister(address)

    weakref.finalize(whole.untyped_storage(), release).atexit = False
