"""An invisible watermark that says a picture was made by a machine.

It is the watermark of Stable Diffusion's own code: 48 bits in the format of the package invisible-watermark (method dwtDct),
so that existing detectors read it. Take the Haar approximation of the blue chroma in blocks of 4×4 coefficients, 8×8
pixels each. In every block the largest coefficient, not counting the first, carries one bit by its position within steps
of 36. This code also keeps that coefficient the largest, so that flat colours stay readable. Knows pixels only; does not
know requests.
"""

import numpy as np
from PIL import Image

BITS = 48
MESSAGE = 0b101100111110110010010000011110111011000110011110
"""The number that SDXL's published code writes."""
_STEP = 36.0
_MARGIN = 5.0
"""How much larger the carrier must stay than the other coefficients of its block."""


def embed(picture: Image.Image, message: int = MESSAGE) -> Image.Image:
    """`picture`, which is RGB, with a `message` of `BITS` bits in it; unchanged if it has less than 8×8 pixels."""
    pixels = np.asarray(picture.convert("RGB"))
    blocks = _blocks(_approximation(pixels))
    if not len(blocks):
        return picture

    # The carrier of each block is its largest coefficient, not counting the first.
    wanted = _bits(message)[np.arange(len(blocks)) % BITS]
    rows = np.arange(len(blocks))
    where = np.abs(blocks[:, 1:]).argmax(1) + 1
    values = blocks[rows, where]

    # Move it to the nearest value that encodes its bit, above all other coefficients.
    others = np.abs(blocks)
    others[:, 0] = 0
    others[rows, where] = 0
    target = _nearest(np.abs(values), wanted, others.max(1) + _MARGIN) * np.where(values < 0, -1, 1)
    change = np.zeros_like(blocks)
    change[rows, where] = target - values
    return _add_chroma(pixels, change)


def read(picture: Image.Image) -> int:
    """The message in a picture of at least 64×64 pixels; meaningless if the picture has no watermark."""
    blocks = _blocks(_approximation(np.asarray(picture.convert("RGB"))))
    largest = np.abs(blocks[:, 1:]).max(1)
    votes = (largest % _STEP) > _STEP / 2
    bits = [votes[bit::BITS].mean() > 0.5 for bit in range(BITS)]
    return int("".join("1" if bit else "0" for bit in bits), 2)


def is_marked(picture: Image.Image) -> bool:
    """Whether at least 40 bits of `picture` match `MESSAGE`; by chance that happens in one picture of a million."""
    return (read(picture) ^ MESSAGE).bit_count() <= BITS - 40


def _bits(message: int) -> np.ndarray:
    return np.array([int(bit) for bit in f"{message:0{BITS}b}"])


def _nearest(values: np.ndarray, bits: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """The nearest numbers, at or above `floor`, at a quarter (bit 0) or three quarters (bit 1) of a step."""
    offset = (0.25 + 0.5 * bits) * _STEP
    steps = np.maximum(np.round((values - offset) / _STEP), np.ceil((floor - offset) / _STEP))
    return np.maximum(steps, 0) * _STEP + offset


def _approximation(pixels: np.ndarray) -> np.ndarray:
    """Haar approximation [h/2, w/2] of U = 0.492 (B − Y) + 128; sides are cropped to multiples of 4."""
    height, width = (side // 4 * 4 for side in pixels.shape[:2])
    whole = pixels[:height, :width].astype(np.uint16)
    sums = whole[::2, ::2] + whole[::2, 1::2] + whole[1::2, ::2] + whole[1::2, 1::2]
    red, green, blue = np.moveaxis(sums.astype(np.float32), 2, 0)
    return (0.492 * (blue - (0.299 * red + 0.587 * green + 0.114 * blue)) + 4 * 128) / 2


def _blocks(plane: np.ndarray) -> np.ndarray:
    """The complete blocks of 4×4, row by row: [n, 16]."""
    height, width = (side // 4 * 4 for side in plane.shape)
    cut = plane[:height, :width].reshape(height // 4, 4, width // 4, 4)
    return cut.transpose(0, 2, 1, 3).reshape(-1, 16)


def _add_chroma(pixels: np.ndarray, change: np.ndarray) -> Image.Image:
    """Add a change [n, 16] of the approximation's blocks to the picture; its luma stays the same."""
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
