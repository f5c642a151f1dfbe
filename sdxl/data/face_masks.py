"""Draw soft masks of the heads in a picture.

Knows the proportions of heads; does not know how faces are detected.
"""

import numpy as np
from PIL import Image

from sdxl.data.face_detector import find_faces
from sdxl.data.framing import Salience

_LONGER_SIDE = 256
"""Longer side of a mask in pixels; the masks are smooth."""
_HEAD = (1.3, 1.7)
"""Width and height of a head with hair, as multiples of the detected face from brows to chin."""
_EDGE = 0.06
"""Width of the edge of a head's mask at temperature 1, as a share of the head."""


def face_salience(image: Image.Image, temperature: float) -> Salience | None:
    """The mask of all heads in a picture, and their boxes for the crop to keep; None if there is no face.

    Each head is an ellipse. The mask falls from 1 inside to 0 outside, over an edge proportional to `temperature`.
    """
    faces = find_faces(image)
    if not faces:
        return None
    scale = _LONGER_SIDE / max(image.size)
    height, width = (max(1, round(length * scale)) for length in (image.height, image.width))
    # Centres of the mask's pixels, in pixels of the picture.
    ys = (np.arange(height)[:, None] + 0.5) / height * image.height
    xs = (np.arange(width)[None] + 0.5) / width * image.width

    mask, keep = np.zeros((height, width), np.float32), []
    for left, top, right, bottom in faces:
        half_width, half_height = (right - left) * _HEAD[0] / 2, (bottom - top) * _HEAD[1] / 2
        x, y = (left + right) / 2, (top + bottom) / 2 - 0.08 * half_height
        distance = np.hypot((xs - x) / half_width, (ys - y) / half_height) - 1
        head = 1 / (1 + np.exp(np.clip(distance / (_EDGE * temperature), -60, 60)))
        mask = np.maximum(mask, head)
        box = (
            (x - half_width) / image.width,
            (y - half_height) / image.height,
            (x + half_width) / image.width,
            (y + half_height) / image.height,
        )
        keep.append(tuple(min(max(0.0, share), 1.0) for share in box))
    return Salience(
        mask=(mask / mask.max()).astype(np.float32),
        keep=keep,
        face_heights=[(bottom - top) / image.height for _, top, _, bottom in faces],
    )
