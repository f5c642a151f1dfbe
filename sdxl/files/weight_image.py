"""A safetensors file in memory: tensors are copied to where they lie in the file, and its bytes are written as they are.

So what changes quickly can be copied quickly, and written while it changes. Knows the format
(https://huggingface.co/docs/safetensors); does not know what the tensors are.
"""

import contextlib
import json
import math
import mmap
import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sdxl.files.checksums import PIECE, combined
from sdxl.files.weight_files import pin

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 64
"""Bytes: the first tensor begins at a multiple of this, and larger types come first, so each is aligned for its type."""


class StoppedError(Exception):
    """The writing was given up on request."""


class WeightImage:
    """A safetensors file in memory for tensors of given names, types and shapes."""

    def __init__(self, like: Mapping[str, Tensor], *, pinned: bool = False) -> None:
        """Make room for tensors as in `like`; their values do not matter.

        pinned: pin the memory if CUDA is available, so that copies from a GPU need not be waited for.

        Raises:
            OSError: there is not enough memory.
        """
        self._header = _header(like)
        self.nbytes = len(self._header) + sum(tensor.nbytes for tensor in like.values())
        """Bytes of the file."""
        # Anonymous memory in huge pages: 512 times fewer page faults than with pages of 4 KiB.
        self._block = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                self._block.madvise(mmap.MADV_HUGEPAGE)
        self._block[: len(self._header)] = self._header
        data = torch.frombuffer(self._block, dtype=torch.uint8)
        if pinned and torch.cuda.is_available():
            pin(data, self._block)
        self.tensors: dict[str, Tensor] = {}
        """Name → view of its bytes in the file."""
        place = len(self._header)
        for name in _order(like):
            tensor = like[name]
            part = data[place : place + tensor.nbytes]
            self.tensors[name] = part.view(tensor.dtype).view(tensor.shape)
            place += tensor.nbytes

    def is_for(self, like: Mapping[str, Tensor]) -> bool:
        """Whether tensors of the names, types and shapes of `like` fit."""
        return _header(like) == self._header

    def write(self, path: Path, stop: threading.Event) -> int:
        """Write the file, down to the disk. Returns its checksum, as `checksums.checksum` computes it.

        Raises:
            StoppedError: `stop` was set.
            OSError: it cannot be written.
        """
        pieces = []
        with path.open("wb", buffering=0) as file, memoryview(self._block) as content:
            for start in range(0, self.nbytes, PIECE):
                if stop.is_set():
                    raise StoppedError
                piece = content[start : min(start + PIECE, self.nbytes)]
                pieces.append(zlib.crc32(piece))
                while piece:
                    piece = piece[file.write(piece) :]
            os.fsync(file.fileno())
        return combined(pieces)


def _order(like: Mapping[str, Tensor]) -> list[str]:
    return sorted(like, key=lambda name: (-like[name].dtype.itemsize, name))


def _header(like: Mapping[str, Tensor]) -> bytes:
    """The file's bytes before the first tensor: the length of the JSON, and the JSON."""
    entries, place = {}, 0
    for name in _order(like):
        tensor = like[name]
        assert tensor.nbytes == math.prod(tensor.shape) * tensor.dtype.itemsize
        offsets = [place, place + tensor.nbytes]
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        place = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = len(text) + -(8 + len(text)) % _ALIGNMENT
    return length.to_bytes(8, "little") + text.ljust(length)
