"""Where the faces of a picture are.

OpenCV's cascades (Viola and Jones, "Rapid Object Detection using a Boosted Cascade of Simple Features", CVPR 2001),
whose weights come inside its package. One cascade alone takes coins and patches for faces; several of them, each on
several turns of the picture, seldom agree on anything but a face. Knows pixels; does not know masks.
"""

import functools
import threading
from collections.abc import Iterator

import cv2
import cv2.data
import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels."""

_FRONTAL = ("frontalface_default", "frontalface_alt", "frontalface_alt2")
_PROFILE = "profileface"
_TURNS = (-30, -15, 0, 15, 30)
"""Degrees: a cascade sees faces that are turned by up to about ten."""
_SIDE = 640
"""Pictures are searched at this longer side, in pixels; a face must be about a thirtieth of it."""
_STEP = 1.2
"""Ratio of the sizes at which faces are looked for."""
_MIN_VOTES = 6
"""How many finds must agree. Chosen on few photographs: a portrait and a group of six got 7 or more, struck portraits on
coins up to 5; a fist in the group got past it too."""
_SAME_FACE = 0.4
"""Overlap (intersection over union) from which two finds are one face."""

_ONE_AT_A_TIME = threading.Lock()
"""A cascade must not be used by two threads at once; each uses all cores by itself."""

_Find = tuple[float, float, float, str]
"""Centre x and y and side of a find in pixels, and the cascade that made it."""


def find_faces(image: Image.Image) -> list[Box]:
    """Boxes of all faces, the most certain first: from the brows to the chin, clipped to the picture."""
    scale = min(1.0, _SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    grey = np.array(image.convert("L").resize(size, Image.Resampling.BOX if scale < 1 else None))
    groups: list[list[_Find]] = []
    with _ONE_AT_A_TIME:
        finds = [find for turn in _TURNS for find in _finds(grey, turn)]
    for find in finds:
        near = next((group for group in groups if _overlap(_middle(group), find) > _SAME_FACE), None)
        if near is None:
            groups.append([find])
        else:
            near.append(find)
    boxes = []
    for group in sorted(groups, key=len, reverse=True):
        if len(group) >= _MIN_VOTES and len({cascade for *_, cascade in group}) > 1:
            x, y, side = (value / scale for value in _middle(group)[:3])
            box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
            limits = (image.width, image.height) * 2
            boxes.append(tuple(min(max(0.0, value), limit) for value, limit in zip(box, limits, strict=True)))
    return boxes


def _finds(grey: np.ndarray, turn: int) -> Iterator[_Find]:
    """Everything that any cascade takes for a face in `grey` turned by `turn` degrees, in the upright picture's pixels."""
    height, width = grey.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), turn, 1)
    cosine, sine = abs(matrix[0, 0]), abs(matrix[0, 1])
    wide, high = int(height * sine + width * cosine), int(height * cosine + width * sine)
    matrix[:, 2] += (wide - width) / 2, (high - height) / 2
    turned = cv2.warpAffine(grey, matrix, (wide, high), borderMode=cv2.BORDER_REPLICATE) if turn else grey
    back = cv2.invertAffineTransform(matrix)
    smallest = max(20, min(height, width) // 25)
    for name, mirrored in (*((name, False) for name in _FRONTAL), (_PROFILE, False), (_PROFILE, True)):
        seen = cv2.flip(turned, 1) if mirrored else turned
        for x, y, side, _ in _cascade(name).detectMultiScale(seen, _STEP, 2, minSize=(smallest, smallest)):
            middle = x + side / 2
            upright = back @ np.array([wide - middle if mirrored else middle, y + side / 2, 1.0])
            yield float(upright[0]), float(upright[1]), float(side), name


def _middle(group: list[_Find]) -> tuple[float, float, float]:
    x, y, side = np.median([find[:3] for find in group], axis=0)
    return float(x), float(y), float(side)


def _overlap(one: tuple[float, float, float], two: _Find) -> float:
    """Intersection over union of two squares."""
    across = min(one[0] + one[2] / 2, two[0] + two[2] / 2) - max(one[0] - one[2] / 2, two[0] - two[2] / 2)
    down = min(one[1] + one[2] / 2, two[1] + two[2] / 2) - max(one[1] - one[2] / 2, two[1] - two[2] / 2)
    shared = max(0.0, across) * max(0.0, down)
    return shared / (one[2] ** 2 + two[2] ** 2 - shared)


@functools.cache
def _cascade(name: str) -> "cv2.CascadeClassifier":
    return cv2.CascadeClassifier(f"{cv2.data.haarcascades}haarcascade_{name}.xml")
