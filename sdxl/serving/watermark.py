"""An invisible mark that says a picture was made by a machine.

The mark is that of Stable Diffusion's own code: 48 bits, written as the package invisible-watermark writes them with its
method dwtDct, so that detectors made for it read ours. In every block of 4×4 coefficients of the blue chroma's Haar
approximation (8×8 pixels) the largest coefficient but the first carries one bit, by its place within steps of 36. Here
a coefficient is moved only as far as it stays the largest, which keeps the bit readable on flat colours.
"""

import numpy as np
from PIL import Image

BITS = 48
MESSAGE = 0b101100111110110010010000011110111011000110011110
"""The number that SDXL's published code writes."""
_STEP = 36.0
_MARGIN = 5.0
"""How far, in coefficients, the carrier stays above the others of its block."""


def embed(picture: Image.Image, message: int = MESSAGE) -> Image.Image:
    """An RGB picture with the `message` of `BITS` bits in it; one of less than 8×8 pixels comes back as it is."""
    pixels = np.asarray(picture.convert("RGB"))
    blocks = _blocks(_approximation(pixels))
    if not len(blocks):
        return picture
    wanted = _bits(message)[np.arange(len(blocks)) % BITS]
    rows = np.arange(len(blocks))
    where = np.abs(blocks[:, 1:]).argmax(1) + 1
    values = blocks[rows, where]
    others = np.abs(blocks)
    others[:, 0] = 0
    others[rows, where] = 0
    target = _nearest(np.abs(values), wanted, others.max(1) + _MARGIN) * np.where(values < 0, -1, 1)
    change = np.zeros_like(blocks)
    change[rows, where] = target - values
    return _add_chroma(pixels, change)


def read(picture: Image.Image) -> int:
    """The message in a picture of at least 64×64 pixels; of an unmarked one it is of no meaning."""
    blocks = _blocks(_approximation(np.asarray(picture.convert("RGB"))))
    largest = np.abs(blocks[:, 1:]).max(1)
    votes = (largest % _STEP) > _STEP / 2
    bits = [votes[bit::BITS].mean() > 0.5 for bit in range(BITS)]
    return int("".join("1" if bit else "0" for bit in bits), 2)


def is_marked(picture: Image.Image) -> bool:
    """Whether `picture` carries `MESSAGE`: at least 40 of its bits, by chance in one picture of a million."""
    return (read(picture) ^ MESSAGE).bit_count() <= BITS - 40


def _bits(message: int) -> np.ndarray:
    return np.array([int(bit) for bit in f"{message:0{BITS}b}"])


def _nearest(values: np.ndarray, bits: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """The nearest numbers at or above `floor` that lie a quarter (bit 0) or three quarters (bit 1) into a step."""
    offset = (0.25 + 0.5 * bits) * _STEP
    steps = np.maximum(np.round((values - offset) / _STEP), np.ceil((floor - offset) / _STEP))
    return np.maximum(steps, 0) * _STEP + offset


def _approximation(pixels: np.ndarray) -> np.ndarray:
    """Haar approximation [h/2, w/2] of U = 0.492 (B − Y) + 128, on sides cut to multiples of 4."""
    height, width = (side // 4 * 4 for side in pixels.shape[:2])
    whole = pixels[:height, :width].astype(np.uint16)
    sums = whole[::2, ::2] + whole[::2, 1::2] + whole[1::2, ::2] + whole[1::2, 1::2]
    red, green, blue = np.moveaxis(sums.astype(np.float32), 2, 0)
    return (0.492 * (blue - (0.299 * red + 0.587 * green + 0.114 * blue)) + 4 * 128) / 2


def _blocks(plane: np.ndarray) -> np.ndarray:
    """[n, 16]: the whole blocks of 4×4, row by row."""
    height, width = (side // 4 * 4 for side in plane.shape)
    cut = plane[:height, :width].reshape(height // 4, 4, width // 4, 4)
    return cut.transpose(0, 2, 1, 3).reshape(-1, 16)


def _add_chroma(pixels: np.ndarray, change: np.ndarray) -> Image.Image:
    """The picture with a change [n, 16] of the approximation, its luma untouched."""
    rows, columns = pixels.shape[0] // 4 * 4 // 8, pixels.shape[1] // 4 * 4 // 8
    plane = change.reshape(rows, columns, 4, 4).transpose(0, 2, 1, 3).reshape(rows * 4, columns * 4)
    blue = plane / 2 / 0.492
    green = -0.114 / 0.587 * blue
    marked = pixels.copy()
    for channel, shift in ((1, green), (2, blue)):
        levels = np.round(shift).astype(np.int16).repeat(2, 0).repeat(2, 1)
        part = marked[: levels.shape[0], : levels.shape[1], channel]
        part[...] = np.clip(part + levels, 0, 255)
    return Image.fromarray(marked)
