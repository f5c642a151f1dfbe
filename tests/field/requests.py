"""Pictures and masks of requests as people send them, and the right outcome of each.

Every kind was reported by people who draw with fine-tuned models. All files are made anew in every run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

SIZE = (96, 64)
"""Width and height of every picture."""
BOX = (8, 16, 40, 48)
"""Left, top, right and bottom of the area that is meant to be repainted. It lies off the centre."""

Write = Callable[[Path], Path]
"""Writes a file into a folder; returns its path."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A picture and a mask, and what must be repainted."""

    name: str
    image: Write
    mask: Write | None = None
    repaints: str = "box"
    """"box", "half", "all", "no mask" or "refused"."""
    says: tuple[str, ...] = ()
    """Parts of the error or of the log."""


def painted(ground: Any, paint: Any, mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """`paint` in the box, and `ground` around it."""
    image = Image.new(mode, SIZE, ground)
    image.paste(paint, BOX)
    return image.resize(size, Image.Resampling.NEAREST)


def photo(seed: int = 0) -> Image.Image:
    """Soft colours without structure."""
    blocks = np.random.default_rng(seed).integers(60, 200, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(SIZE, Image.Resampling.BICUBIC)


def with_alpha(image: Image.Image, outside: int, inside: int) -> Image.Image:
    """`image` with one opacity in the box and another around it."""
    image = image.convert("RGBA")
    image.putalpha(painted(outside, inside, "L"))
    return image


def file(image: Image.Image, name: str = "given.png", **options: Any) -> Write:
    """A file of `image`; the format follows the name's suffix."""

    def write(folder: Path) -> Path:
        image.save(folder / name, **options)
        return folder / name

    return write


def content(data: bytes, name: str) -> Write:
    """A file of these bytes."""

    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def turned(image: Image.Image) -> Write:
    """A jpg that lies on its side and says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return file(image.transpose(Image.Transpose.ROTATE_90), "turned.jpg", exif=exif, quality=95)


def deep() -> Image.Image:
    """16 bits a pixel."""
    return Image.fromarray(np.asarray(painted(0, 255, "L")).astype(np.uint16) * 257)


def palette(transparent: int | None = None) -> Write:
    """Two entries, black and white; one may be transparent."""
    image = painted(0, 1, "P")
    image.putpalette([0, 0, 0, 255, 255, 255])
    return file(image, **({} if transparent is None else {"transparency": transparent}))


def black_palette() -> Write:
    """Two black entries, of which the first is transparent."""
    image = painted(0, 1, "P")
    image.putpalette([0, 0, 0, 0, 0, 0])
    return file(image, transparency=0)


CLEAR = (0, 0, 0, 0)
PHOTO = file(photo(), "photo.png")
HOLE = with_alpha(photo(), 255, 0)
GRADIENT = Image.linear_gradient("L").rotate(90).resize(SIZE)

_MASKS: dict[str, Write] = {
    "grey": file(painted(0, 255, "L")),
    "rgb": file(painted("black", "white")),
    "one_bit": file(painted(0, 1, "1")),
    "palette": palette(),
    "16_bits": file(deep()),
    "jpg": file(painted("black", "white"), "mask.jpg", quality=80),
    "cmyk": file(painted("black", "white").convert("CMYK"), "mask.jpg", quality=95),
    "webp": file(painted(CLEAR, "white", "RGBA"), "mask.webp", lossless=True),
    "turned": turned(painted("black", "white")),
    "half_size": file(painted(0, 255, "L", (48, 32))),
    "soft_edge": file(painted(0, 255, "L").filter(ImageFilter.GaussianBlur(1))),
    "opaque_alpha": file(painted((0, 0, 0, 255), (255, 255, 255, 255), "RGBA")),
    "white_on_transparent": file(painted(CLEAR, "white", "RGBA")),
    "white_on_transparent_white": file(with_alpha(Image.new("RGB", SIZE, "white"), 0, 255)),
    "grey_and_alpha": file(painted((0, 0), (255, 255), "LA")),
    "transparent_palette": palette(transparent=0),
    "transparent_grey": file(painted(0, 255, "L"), transparency=0),
    "transparent_rgb": file(painted((0, 0, 0), (255, 255, 255)), transparency=(0, 0, 0)),
    "black_on_transparent": file(painted(CLEAR, "black", "RGBA")),
    "black_grey_and_alpha": file(painted((0, 0), (0, 255), "LA")),
    "black_palette": black_palette(),
    "dark_on_transparent": file(painted(CLEAR, (70, 20, 90, 255), "RGBA")),
    "grey_on_transparent": file(painted(CLEAR, (150, 150, 150, 255), "RGBA")),
    "red_on_transparent": file(painted(CLEAR, "red", "RGBA")),
    "red_on_black": file(painted("black", "red")),
    "blue_on_black": file(painted("black", "blue")),
    "blue_on_black_jpg": file(painted("black", "blue"), "mask.jpg", quality=90, subsampling=0),
}
"""Masks that mean the box."""

_REFUSED: dict[str, tuple[Write, str]] = {
    "black": (file(Image.new("L", SIZE)), "mask is completely black: paint"),
    "black_with_alpha": (file(Image.new("RGBA", SIZE, "black")), "mask is completely black: paint"),
    "nothing_visible": (file(Image.new("RGBA", SIZE, (255, 255, 255, 0))), "mask is completely black: paint"),
    "dark": (file(painted(0, 85, "L")), "brightest value of 85 of 255: paint"),
    "labels": (file(painted(0, 1, "L")), "brightest value of 1 of 255: paint"),
    "red_on_white": (file(painted("white", "red")), "coloured areas beside white ones"),
    "red_and_white": (file(with_alpha(painted("red", "white"), 255, 255)), "coloured areas beside white"),
    "photo_with_hole": (file(HOLE), "mask is a picture with transparent areas, not a mask"),
    "web_page": (content(b"<!doctype html><html>", "mask.png"), "mask cannot be read as a picture, because it is a web page"),
    "empty": (content(b"", "mask.png"), "mask cannot be read as a picture, because it is empty"),
    "cut_png": (content(b"\x89PNG\r\n\x1a\n\0\0", "mask.png"), "mask cannot be read as a picture: save it again"),
}  # fmt: skip

_IMAGES: dict[str, tuple[Write, str]] = {
    "hole": (file(HOLE), "box"),
    "hole_webp": (file(HOLE, "hole.webp", lossless=True), "box"),
    "soft_hole": (file(with_alpha(photo(), 255, 60)), "box"),
    "transparent_palette": (palette(transparent=1), "box"),
    "opaque_alpha": (file(with_alpha(photo(), 255, 255)), "no mask"),
    "translucent": (file(with_alpha(photo(), 255, 200)), "no mask"),
    "opaque": (PHOTO, "no mask"),
    "nothing_visible": (file(with_alpha(photo(), 0, 0)), "all"),
}
"""Pictures without a mask → what is repainted."""

CASES = [
    *(Case(name=f"mask_{name}", image=PHOTO, mask=mask) for name, mask in _MASKS.items()),
    *(
        Case(name=f"mask_{name}", image=PHOTO, mask=mask, repaints="refused", says=(says,))
        for name, (mask, says) in _REFUSED.items()
    ),
    *(
        Case(
            name=f"image_{name}",
            image=image,
            repaints=repaints,
            says=() if repaints == "no mask" else ("image has transparent areas",),
        )
        for name, (image, repaints) in _IMAGES.items()
    ),
    Case(name="hole_with_mask", image=file(with_alpha(photo(), 0, 255)), mask=file(painted(0, 255, "L"))),
    Case(
        name="mask_white", image=PHOTO, mask=file(Image.new("L", SIZE, 255)), repaints="all",
        says=("mask is completely white",),
    ),
    Case(
        name="mask_gradient", image=PHOTO, mask=file(GRADIENT), repaints="half", says=("mask is mostly neither black nor white",)
    ),
    Case(
        name="image_web_page", image=content(b"<html></html>", "photo.jpg"), repaints="refused",
        says=("image cannot be read as a picture, because it is a web page",),
    ),
    Case(
        name="image_pickle", image=content(b"\x80\x02}q\0.", "photo.jpg"), repaints="refused",
        says=("image cannot be read as a picture, because it is a pickle",),
    ),
]  # fmt: skip
