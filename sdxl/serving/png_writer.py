"""Write PNG files with several threads.

Pillow tries five filters for each line and works on one thread, which takes as long as two steps of the UNet. Here every line
has Paeth's filter, which is almost always the best one for pictures, and strips of lines are written at the same time. Knows the
format (ISO/IEC 15948); does not know requests.
"""

import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EIGHT_BIT_RGB = (8, 2, 0, 0, 0)
"""Bits, kind of colours, compression, kind of filters, interlacing."""
_PAETH = 4
"""The filter that stores the difference from one of three neighbours."""
_MOST_STRIPS = 8
_SMALLEST_STRIP = 64
"""Lines. Each strip begins with an empty memory of what came before."""
_ZLIB_HEADER = b"\x78\x01"
"""Deflate with a window of 32 KiB, at the fastest level."""


def write_png(picture: Image.Image, path: Path, texts: dict[str, str]) -> None:
    """Write `picture`, which is RGB, to `path`.

    texts: keyword, in ASCII, → text, for the file's metadata.
    """
    header = struct.pack(">IIBBBBB", *picture.size, *_EIGHT_BIT_RGB)
    chunks = [(b"IHDR", header), *map(_text, texts.items()), (b"IDAT", _compressed(picture)), (b"IEND", b"")]
    with path.open("wb") as file:
        file.write(_SIGNATURE)
        for kind, content in chunks:
            file.write(struct.pack(">I", len(content)) + kind)
            file.write(content)
            file.write(struct.pack(">I", zlib.crc32(content, zlib.crc32(kind))))


def _text(item: tuple[str, str]) -> tuple[bytes, bytes]:
    """A text as a chunk: what is not ASCII needs the international kind."""
    keyword, text = item
    if text.isascii():
        return b"tEXt", f"{keyword}\0{text}".encode("ascii")
    return b"iTXt", f"{keyword}\0\0\0\0\0{text}".encode()


def _compressed(picture: Image.Image) -> bytes:
    """The filtered lines of `picture` as one zlib stream (RFC 1950)."""
    pixels = np.asarray(picture.convert("RGB"))
    count = min(max(len(pixels) // _SMALLEST_STRIP, 1), _MOST_STRIPS)
    ends = [len(pixels) * number // count for number in range(count + 1)]

    def strip(begin: int, end: int) -> tuple[bytes, bytes]:
        lines = _filtered(pixels, begin, end)
        return lines, _deflated(lines, last=end == len(pixels))

    with ThreadPoolExecutor(max_workers=min(count, os.cpu_count() or 1)) as threads:
        strips = list(threads.map(strip, ends, ends[1:]))
    checksum = 1
    for lines, _ in strips:
        checksum = zlib.adler32(lines, checksum)
    return b"".join([_ZLIB_HEADER, *(deflated for _, deflated in strips), struct.pack(">I", checksum)])


def _filtered(pixels: np.ndarray, begin: int, end: int) -> bytes:
    """The lines `begin` to `end` (exclusive) of pixels [h, w, 3], each after the number of its filter.

    Paeth's filter predicts a value from those to the left, above, and above to the left: it takes the one that is nearest to
    left + above − above left. Source: the format's standard, section 9.4.
    """
    width = pixels.shape[1]
    with_border = np.zeros((end - begin + 1, width + 1, 3), np.int16)  # zeros stand beyond the edges
    with_border[1 if begin == 0 else 0 :, 1:] = pixels[max(begin - 1, 0) : end]
    value, left = with_border[1:, 1:], with_border[1:, :-1]
    above, corner = with_border[:-1, 1:], with_border[:-1, :-1]
    to_left, to_above = np.abs(above - corner), np.abs(left - corner)
    to_corner = np.abs(left + above - 2 * corner)
    nearest = np.where(to_above <= to_corner, above, corner)
    nearest = np.where((to_left <= to_above) & (to_left <= to_corner), left, nearest)
    lines = np.empty((end - begin, 1 + 3 * width), np.uint8)
    lines[:, 0] = _PAETH
    lines[:, 1:] = (value - nearest).astype(np.uint8).reshape(end - begin, -1)
    return lines.tobytes()


def _deflated(lines: bytes, *, last: bool) -> bytes:
    """A part of a deflate stream (RFC 1951) that ends at a whole byte, so that the next part can follow."""
    # Run-length matches only: in drawn pictures longer searches find little.
    work = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return work.compress(lines) + work.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)
