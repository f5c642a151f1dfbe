"""Find files that were damaged after they were written.

Knows bytes only.
"""

import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PIECE = 32 << 20
"""Bytes of a file that have a checksum of their own."""
_THREADS = 8


def checksum(path: Path) -> int:
    """A checksum of a file's content, from 0 to 2**32 - 1. It finds accidents, not forgeries."""

    def of_piece(start: int) -> int:
        with path.open("rb") as file:
            file.seek(start)
            return zlib.crc32(file.read(PIECE))

    with ThreadPoolExecutor(_THREADS) as threads:
        return combined(threads.map(of_piece, range(0, path.stat().st_size, PIECE)))


def combined(of_pieces: Iterable[int]) -> int:
    """The checksum of a file whose pieces of `PIECE` bytes have these CRC-32s, in their order."""
    return zlib.crc32(b"".join(one.to_bytes(4, "little") for one in of_pieces))
