"""Find the faces in a picture.

Uses OpenCV's cascades, which its package contains (Viola and Jones, "Rapid Object Detection using a Boosted Cascade of
Simple Features", CVPR 2001). A single cascade mistakes coins and patches for faces. Several cascades on several
rotations of the picture rarely agree on anything but a face. Knows pixels; does not know masks.
"""

import functools
import threading
from collections.abc import Iterator

import cv2
import cv2.data
import numpy as np
from PIL import Image

from sdxl.data.framing import PixelBox

_FRONTAL = ("frontalface_default", "frontalface_alt", "frontalface_alt2")
_PROFILE = "profileface"
_ROTATIONS = (-30, -15, 0, 15, 30)
"""Degrees. A cascade detects faces that are rotated by up to about ten degrees."""
_LONGER_SIDE = 640
"""Pictures are searched at this longer side, in pixels. A face must be about a thirtieth of it."""
_STEP = 1.2
"""Ratio between the sizes of faces to search for."""
_MIN_DETECTIONS = 6
"""How many detections must agree on a face. Chosen on few photographs: a portrait and a group of six had 7 or more,
portraits on coins up to 5. A fist in the group passed too."""
_SAME_FACE = 0.4
"""Detections with at least this overlap (intersection over union) belong to one face."""

_LOCK = threading.Lock()
"""A cascade is not thread-safe, and uses all cores anyway."""

_Detection = tuple[float, float, float, str]
"""Centre x, centre y and side of a square in pixels, and the cascade that detected it."""


def find_faces(image: Image.Image) -> list[PixelBox]:
    """The boxes of all faces from brows to chin, clipped to the picture, most certain first."""
    scale = min(1.0, _LONGER_SIDE / max(image.size))
    size_wh = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    grey = np.array(image.convert("L").resize(size_wh, Image.Resampling.BOX if scale < 1 else None))
    with _LOCK:
        detections = [detection for degrees in _ROTATIONS for detection in _detect(grey, degrees)]

    # Each group holds the detections of one face.
    groups: list[list[_Detection]] = []
    for detection in detections:
        group = next((group for group in groups if _overlap(_median(group), detection) > _SAME_FACE), None)
        if group is None:
            groups.append([detection])
        else:
            group.append(detection)

    boxes = []
    for group in sorted(groups, key=len, reverse=True):
        if len(group) >= _MIN_DETECTIONS and len({cascade for *_, cascade in group}) > 1:
            x, y, side = (value / scale for value in _median(group))
            box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
            limits = (image.width, image.height) * 2
            boxes.append(tuple(min(max(0.0, value), limit) for value, limit in zip(box, limits, strict=True)))
    return boxes


def _detect(grey: np.ndarray, degrees: int) -> Iterator[_Detection]:
    """All detections of all cascades in `grey` rotated by `degrees`, in pixels of `grey`."""
    # Rotate about the centre, on a canvas large enough for the whole rotated picture.
    height, width = grey.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    cosine, sine = abs(matrix[0, 0]), abs(matrix[0, 1])
    canvas_wh = (int(height * sine + width * cosine), int(height * cosine + width * sine))
    matrix[:, 2] += (canvas_wh[0] - width) / 2, (canvas_wh[1] - height) / 2
    rotated = grey
    if degrees:
        rotated = cv2.warpAffine(grey, matrix, canvas_wh, borderMode=cv2.BORDER_REPLICATE)
    back = cv2.invertAffineTransform(matrix)

    smallest = max(20, min(height, width) // 25)
    # The profile cascade detects faces turned to one side; the mirrored picture shows it the other side.
    for name, mirrored in (*((name, False) for name in _FRONTAL), (_PROFILE, False), (_PROFILE, True)):
        seen = cv2.flip(rotated, 1) if mirrored else rotated
        for left, top, side, _ in _cascade(name).detectMultiScale(
            seen, _STEP, 2, minSize=(smallest, smallest)
        ):
            x, y = left + side / 2, top + side / 2
            upright = back @ np.array([canvas_wh[0] - x if mirrored else x, y, 1.0])
            yield float(upright[0]), float(upright[1]), float(side), name


def _median(group: list[_Detection]) -> tuple[float, float, float]:
    """The median centre x, centre y and side of a group."""
    x, y, side = np.median([detection[:3] for detection in group], axis=0)
    return float(x), float(y), float(side)


def _overlap(one: tuple[float, float, float], two: _Detection) -> float:
    """Intersection over union of two squares."""
    across = min(one[0] + one[2] / 2, two[0] + two[2] / 2) - max(one[0] - one[2] / 2, two[0] - two[2] / 2)
    down = min(one[1] + one[2] / 2, two[1] + two[2] / 2) - max(one[1] - one[2] / 2, two[1] - two[2] / 2)
    shared = max(0.0, across) * max(0.0, down)
    return shared / (one[2] ** 2 + two[2] ** 2 - shared)


@functools.cache
def _cascade(name: str) -> "cv2.CascadeClassifier":
    return cv2.CascadeClassifier(f"{cv2.data.haarcascades}haarcascade_{name}.xml")
