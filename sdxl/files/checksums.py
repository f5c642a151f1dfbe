"""Find files that were damaged after they were written.

Knows bytes only.
"""

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_PIECE, _THREADS = 32 << 20, 8
"""Bytes of a file that a thread reads at a time, and threads."""


def checksum(path: Path) -> int:
    """A checksum of a file's content, from 0 to 2**32 - 1. It finds accidents, not forgeries."""

    def of_piece(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return zlib.crc32(file.read(_PIECE)).to_bytes(4, "little")

    with ThreadPoolExecutor(_THREADS) as threads:
        return zlib.crc32(b"".join(threads.map(of_piece, range(0, path.stat().st_size, _PIECE))))
