"""Pictures inside a page: small WebP files as `data:` addresses, of a bounded size.

Knows pixels and bytes; does not know what a picture shows.
"""

import base64
import io
from pathlib import Path

from PIL import Image

from sdxl.report.markup import Html, tag

_QUALITIES = (82, 65, 45)
"""WebP qualities, tried in this order."""
_SHRINK = 0.7
"""Largest factor of the sides if even the lowest quality takes too much."""
_MASKED = (200, 30, 50, 165)
"""Colour and opacity over what a mask leaves out."""


def thumbnail(path: Path, side: int) -> Image.Image:
    """The picture in a file, in RGB, with sides of at most `side` pixels.

    Raises:
        OSError: it cannot be read.
    """
    with Image.open(path) as opened:
        opened.draft("RGB", (side, side))
        picture = opened.convert("RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def mask_layer(path: Path, size: tuple[int, int]) -> Image.Image:
    """A layer [width, height] of `size` that covers what the mask in a file leaves out, in red."""
    with Image.open(path) as opened:
        mask = opened.convert("L").resize(size, Image.Resampling.BOX)
    layer = Image.new("RGBA", size, _MASKED)
    layer.putalpha(mask.point([(255 - value) * _MASKED[3] // 255 for value in range(256)]))
    return layer


def data_uri(picture: Image.Image, most_bytes: int) -> str:
    """The picture as an address of at most `most_bytes` characters, which should be 1000 or more.

    Where the bytes do not suffice, its quality falls, and then its size.
    """
    uri = ""
    while True:
        for quality in _QUALITIES:
            buffer = io.BytesIO()
            picture.save(buffer, "WEBP", quality=quality, method=4)
            uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
            if len(uri) <= most_bytes:
                return uri
            if len(uri) > 2 * most_bytes:  # a lower quality would not do
                break
        factor = min(_SHRINK, (most_bytes / len(uri)) ** 0.5)
        width, height = (max(1, int(length * factor)) for length in picture.size)
        assert (width, height) != picture.size, "a single pixel fits"
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)


def image(picture: Image.Image, alt: str, *, most_bytes: int, class_: str | None = None) -> Html:
    """An element that shows the picture. See `data_uri` for `most_bytes`."""
    width, height = picture.size
    return tag(
        "img",
        src=data_uri(picture, most_bytes),
        alt=alt,
        width=width,
        height=height,
        decoding="async",
        class_=class_,
    )
