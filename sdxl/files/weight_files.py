"""Read safetensors quickly, from a file or directly from inside an uncompressed tar.

Several threads fill one block of memory, and a file's tensors are views of it. On a machine with CUDA the block can be
pinned, so that it goes to the GPU without another copy. The safetensors library maps the file instead and pays a page
fault for each page. Knows the format (https://huggingface.co/docs/safetensors); does not know fine-tunes.
"""

import contextlib
import json
import math
import mmap
import os
import struct
import weakref
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl.errors import WeightsError
from sdxl.files.file_kinds import describe_other_kind, looks_like_safetensors

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
_UNREAD_DTYPES = (
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "U16",
    "U32",
    "U64",
    "C64",
)
"""Further types of the format, for quantised or other weights."""
_MAX_HEADER = 16 << 20
"""Bytes. The header of SDXL's UNet has 0.2 million."""
_MAX_TENSORS = 100_000
"""The UNet of SDXL has 1,680; each tensor costs memory beyond its bytes."""
_MAX_DIMS, _MAX_NUMBER = 8, 2**40
"""Limits on the dimensions of a tensor, and on the sizes and offsets in a header."""
_PIECE = 32 << 20
"""Bytes that a thread reads at a time."""
_THREADS = 8


class _CutOffError(ValueError):
    """The file is shorter than its header says: its size, and what it should be, in bytes."""


class _TooManyTensorsError(ValueError):
    """The header lists more than `_MAX_TENSORS`."""


class _UnknownNumbersError(ValueError):
    """A tensor has a dtype that is not read here: its name."""


@dataclass(frozen=True)
class WeightFile:
    """A stranger's safetensors file. Checks all claims of the header against the file's size."""

    path: Path
    name: str
    """Its name in messages."""
    start: int = 0
    """The offset in `path`, in bytes, at which it begins."""
    size: int | None = None
    """Its size in bytes; None for everything from `start`."""

    @cached_property
    def _header(self) -> tuple[int, dict[str, tuple[torch.dtype, list[int], int, int]], dict[str, str]]:
        """The offset of the data in `path`; name → (dtype, shape, first byte, byte after the last); the metadata.

        Raises:
            WeightsError: not a safetensors file, damaged, or with a type of numbers that torch does not have.
        """
        try:
            # The format: 8 bytes with the header's length, the header in JSON, the data.
            with self.path.open("rb") as file:
                file.seek(self.start)
                available = os.fstat(file.fileno()).st_size - self.start
                size = available if self.size is None else min(self.size, available)
                (length,) = struct.unpack("<Q", file.read(8))
                if size - 8 < length <= _MAX_HEADER:
                    raise _CutOffError(size, 8 + length)
                if length > _MAX_HEADER:
                    raise ValueError("the header is too long")
                header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            if len(header) > _MAX_TENSORS:
                raise _TooManyTensorsError
            entries = {name: _parse_entry(entry) for name, entry in header.items()}

            # The format forbids gaps and overlaps. This also bounds the memory that `read` takes by the file's size.
            end = 0
            for *_, start, stop in sorted(entries.values(), key=lambda entry: entry[2:]):
                if start != end:
                    raise ValueError("the tensors overlap or leave gaps")
                end = stop
            if end > size - 8 - length:
                raise _CutOffError(size, 8 + length + end)
            if end != size - 8 - length:
                raise ValueError("the tensors do not fill the file")
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            struct.error,
            RecursionError,
        ) as error:
            raise WeightsError(f"{self.name} {self._what_is_wrong(error)}") from error
        metadata = metadata if isinstance(metadata, dict) else {}
        metadata = {name: text for name, text in metadata.items() if isinstance(text, str)}
        return self.start + 8 + length, entries, metadata

    def _what_is_wrong(self, error: Exception) -> str:
        """The rest of a sentence about a file whose header gave `error`."""
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            file.seek(self.start)
            if not looks_like_safetensors(file.read(9)):
                # A file inside a tar is named only if it is large, as no other kind is.
                other = None if self.start else describe_other_kind(self.path, wanted="a .safetensors file")
                return other or "is damaged or not a safetensors file: download it again, or give another."
        if isinstance(error, _UnknownNumbersError):
            return f"holds {error} numbers, which cannot be read here: give it in fp16, bf16 or fp32."
        if isinstance(error, _TooManyTensorsError):
            return f"holds more than {_MAX_TENSORS:,} tensors: give a fine-tune of SDXL."
        if isinstance(error, _CutOffError):
            has, needs = error.args
            return f"is damaged, since it has only {has:,} of {needs:,} bytes: download or copy it again."
        return "is damaged: download it again."

    @property
    def keys(self) -> set[str]:
        """The names of the tensors.

        Raises:
            WeightsError: not a safetensors file, or damaged.
        """
        return set(self._header[1])

    @property
    def metadata(self) -> dict[str, str]:
        """The header's `__metadata__`, without values that are not text."""
        return self._header[2]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor.

        Raises:
            WeightsError: not a safetensors file, or damaged.
        """
        return {name: tuple(shape) for name, (_, shape, *_) in self._header[1].items()}

    def beginnings(self, count: int) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
        """The dtype, the shape and the first `count` bytes of each tensor; no more is read.

        Raises:
            WeightsError: not a safetensors file, or damaged.
        """
        data_start, entries, _ = self._header
        with self.path.open("rb") as file:
            return {
                name: (dtype, shape, os.pread(file.fileno(), min(count, stop - start), data_start + start))
                for name, (dtype, shape, start, stop) in entries.items()
            }

    def read(self, names: Collection[str] | None = None, *, pinned: bool = False) -> dict[str, Tensor]:
        """Read tensors into memory.

        names: which ones; by default all.
        pinned: pin that memory if CUDA is available.

        Raises:
            WeightsError: not a safetensors file, or damaged.
        """
        data_start, entries, _ = self._header
        if names is not None:
            entries = {name: entry for name, entry in entries.items() if name in names}

        # What lies together in the file is read together.
        runs: list[tuple[int, int]] = []
        places: dict[str, int] = {}
        length = 0
        for name, (*_, start, stop) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((start, stop))
            places[name] = length
            length += stop - start
        if not length:
            return {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape, *_) in entries.items()}

        # Anonymous memory in huge pages: 512 times fewer page faults than with pages of 4 KiB.
        block = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                block.madvise(mmap.MADV_HUGEPAGE)
        self._fill(block, [(data_start + start, data_start + stop) for start, stop in runs])

        data = torch.frombuffer(block, dtype=torch.uint8)
        if pinned and torch.cuda.is_available():
            pin(data, block)
        return {
            name: _view(data[places[name] : places[name] + stop - start], dtype, shape)
            for name, (dtype, shape, start, stop) in entries.items()
        }

    def _fill(self, block: mmap.mmap, runs: list[tuple[int, int]]) -> None:
        """Read the parts `runs` of the file (first byte, byte after the last) into `block`, in pieces on several threads."""
        file = os.open(self.path, os.O_RDONLY)
        target = memoryview(block)
        pieces: list[tuple[int, int, int]] = []
        place = 0
        for first, end in runs:
            for start in range(first, end, _PIECE):
                stop = min(start + _PIECE, end)
                pieces.append((start, stop, place))
                place += stop - start

        def read_piece(piece: tuple[int, int, int]) -> None:
            start, stop, place = piece
            while start < stop:
                count = os.preadv(file, [target[place : place + stop - start]], start)
                if not count:
                    raise WeightsError(f"{self.name} is damaged: download it again.")
                start, place = start + count, place + count

        try:
            with ThreadPoolExecutor(_THREADS) as threads:
                list(threads.map(read_piece, pieces))
        finally:
            os.close(file)
            target.release()


def _parse_entry(entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    """Check one tensor's entry in the header, and return its dtype, shape, first byte and the byte after its last."""
    if entry["dtype"] in _UNREAD_DTYPES:
        raise _UnknownNumbersError(entry["dtype"])
    dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS:
        raise ValueError("a shape is not a list of at most 8 sizes")
    if not all(type(number) is int and 0 <= number <= _MAX_NUMBER for number in (*shape, start, stop)):
        raise ValueError("a size or offset is not an integer in range")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor's offsets do not match its shape")
    return dtype, shape, start, stop


def _view(part: Tensor, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """View the bytes `part` as a tensor; copy them first if they are not aligned for `dtype`."""
    if part.storage_offset() % dtype.itemsize:
        part = part.clone()
    return part.view(dtype).view(shape)


def pin(data: Tensor, block: mmap.mmap) -> None:
    """Pin the memory of `data` until its last view is gone; `block` owns that memory."""
    cudart: Any = torch.cuda.cudart()
    address, length = data.data_ptr(), data.nbytes
    if int(cudart.cudaHostRegister(address, length, 0)) != 0:
        # The limit on pinned memory is reached: go on without, copies are only slower. CUDA reports this error once
        # more at the next launch, so launch something here to clear it.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        return

    def release(kept: mmap.mmap = block) -> None:  # `kept` holds the memory until it is unpinned
        torch.cuda.synchronize()  # a copy from this memory may still be running
        cudart.cudaHostUnregister(address)

    weakref.finalize(data.untyped_storage(), release).atexit = False
