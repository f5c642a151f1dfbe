"""Advice on a data set: one sentence for each finding, with the file and the remedy.

Knows measurements of pictures, and captions; does not change anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdxl.data.caption_text import count_token

FEW, MANY = 5, 60
"""Fewer or more pictures than these are worth a remark."""
_SAME_HASH = 6
"""The 64-bit hashes of nearly equal pictures differ in at most this many bits."""
_SAME_GREY = 48
"""Nearly equal pictures, brought to the same brightness, differ nowhere by more than this grey value, of 255. The hash
alone is not enough: a small thing on a plain background flips few of its bits."""
_BLURRED = 0.004
"""Pictures with less `sharpness` at 512 pixels are blurred. Photographs that were tried had at least 0.03, and 0.001 to
0.004 after a Gaussian blur of two pixels; flat drawings had 0.006 to 0.02."""
_DARK = 0.12
"""Pictures with a lower mean brightness, 0 to 1, are dark."""
_OTHER_SHAPE = 1.3
"""A picture differs in shape if its ratio of width to height differs by this factor from the median."""
_SMALL_FACE = 0.08
"""Faces below this share of the picture's height, on average, are too small to learn."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Measurements of one picture."""

    name: str
    """Its path in the archive."""
    height: int
    """Height of the upright original, in pixels."""
    width: int
    """Width of the upright original, in pixels."""
    enlarged: float
    """Factor by which the crop was enlarged; below 1 it was shrunk."""
    cut_off: float
    """Share of the picture outside the crop, 0 to 1."""
    brightness: float
    """Mean luma, 0 to 1."""
    sharpness: float
    """`sharpness` of the prepared picture at 512 pixels."""
    fingerprint: int
    """`fingerprint` of the prepared picture."""
    thumbnail: np.ndarray
    """`thumbnail` of the prepared picture."""
    transparent: float = 0.0
    """Share of the picture that is transparent, 0 to 1."""
    two_tones: bool = False
    """Whether the picture has no mask and is black and white itself, like a mask."""
    face_heights: Sequence[float] = ()
    """Heights of the detected faces, as shares of the picture's height."""


def sharpness(grey: np.ndarray) -> float:
    """Variance of the Laplacian of a picture [h, w] of 0 to 1, divided by the picture's variance; 0 if it is flat.

    Source: Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (ICPR 2000). The division by the
    contrast is ours: a foggy picture is not blurred.
    """
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    contrast = float(grey.var())
    return float(laplacian.var()) / contrast if contrast > 1e-6 else 0.0


def fingerprint(image: Image.Image) -> int:
    """A perceptual hash of 64 bits: whether each of 8×8 cells is darker than its right neighbour.

    Small changes of size, tone or compression flip few bits. Source: Krawetz, "Kind of Like That" (2013), dHash.
    """
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int("".join("1" if bit else "0" for bit in (small[:, 1:] > small[:, :-1]).flat), 2)


def thumbnail(image: Image.Image) -> np.ndarray:
    """A picture as 16×16 grey values minus their mean, int16."""
    small = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=np.int16)
    return small - np.int16(small.mean())


def advise(facts: Sequence[Facts], captions: Sequence[str], tokens: Sequence[str]) -> list[str]:
    """Sentences about the whole data set, then about single pictures; empty if all is well.

    captions: the pictures' captions, in the same order.
    tokens: every caption should name one of them; empty if the tokens are unknown.
    """
    advice = on_number(len(facts))
    faces = [height for fact in facts for height in fact.face_heights]
    if faces:
        average = float(np.mean(faces))
        remedy = "add close-ups, or crop closer by hand" if average < _SMALL_FACE else "good"
        advice.append(f"Faces are on average {average:.0%} of the pictures' height: {remedy}.")
    advice += on_equal_captions(captions)
    advice += _shapes(facts)
    for index, (fact, caption) in enumerate(zip(facts, captions, strict=True)):
        advice += [f"{fact.name} {finding}" for finding in _on_one(fact, caption, tokens)]
        twin = next((other for other in facts[:index] if _nearly_equal(fact, other)), None)
        if twin is not None:
            advice.append(
                f"{fact.name} is nearly the same as {twin.name}: keep one, or that pose becomes part of the subject."
            )
    return advice


def on_number(pictures: int) -> list[str]:
    """A sentence about few or many pictures."""
    if pictures < FEW:
        there = "is only 1 picture" if pictures == 1 else f"are only {pictures} pictures"
        return [f"There {there}: 5 to 20 varied ones teach a subject far better."]
    if pictures > MANY:
        return [
            f"There are {pictures} pictures: for one subject the best 20 work as well; "
            "with more, num_train_epochs=200 shows each as often as usual."
        ]
    return []


def on_equal_captions(captions: Sequence[str]) -> list[str]:
    """A sentence about captions that are all the same."""
    if len(captions) < 2 or len(set(captions)) > 1:
        return []
    return [
        f'All captions are "{captions[0]}": say what else each picture shows, or it becomes part of the subject.'
    ]


def _shapes(facts: Sequence[Facts]) -> list[str]:
    """A sentence about the pictures whose shape differs from the median: their crops lose other parts."""
    median = float(np.median([np.log(fact.width / fact.height) for fact in facts])) if facts else 0.0
    others = [
        f"{fact.name} ({fact.width}×{fact.height})"
        for fact in facts
        if abs(np.log(fact.width / fact.height) - median) > np.log(_OTHER_SHAPE)
    ]
    if not others:
        return []
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    return [
        f"{', '.join(others[:5])}{more} differ in shape from the rest: crop them by hand, or set bucketing."
    ]


def _nearly_equal(one: Facts, other: Facts) -> bool:
    same_hash = (one.fingerprint ^ other.fingerprint).bit_count() <= _SAME_HASH
    return same_hash and int(np.abs(one.thumbnail - other.thumbnail).max()) <= _SAME_GREY


def _on_one(fact: Facts, caption: str, tokens: Sequence[str]) -> list[str]:
    """Findings about one picture: sentences without their subject, the picture's name."""
    findings = []
    if fact.enlarged > 1.5:
        findings.append(
            f"is tiny ({fact.width}×{fact.height}) and was enlarged {fact.enlarged:.1f} times: use a larger original."
        )
    elif fact.sharpness < _BLURRED:
        findings.append("is blurred: leave it out, or training learns the blur.")
    if fact.transparent > 0.01:
        findings.append(f"is transparent on {fact.transparent:.0%} of its area: training learns white there.")
    if fact.two_tones:
        findings.append(
            "is black and white like a mask: if it is one, name it after its picture, as a.mask.png."
        )
    if fact.brightness < _DARK:
        findings.append("is very dark: brighten it or leave it out.")
    if fact.cut_off > 0.4:
        findings.append(
            f"({fact.width}×{fact.height}) lost {fact.cut_off:.0%} in the crop: crop it by hand, or set bucketing."
        )
    if tokens and not any(count_token(caption, token) for token in tokens):
        findings.append(
            f'has the caption "{caption}" without {" or ".join(tokens)}: add it as a separate word.'
        )
    return findings
