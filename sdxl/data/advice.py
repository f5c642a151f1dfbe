"""What would make a data set better: one sentence a finding, with the file and the remedy.

Knows figures of pictures; does not know how to mend anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from sdxl.data.captioning import names_in

FEW, MANY = 5, 60
"""Numbers of pictures below and above which there is advice."""
_TWINS = 6
"""Hashes of 64 bits that differ in at most so many are of nearly equal pictures."""
_BLURRED = 0.004
"""Sharpness, at 512 pixels, below which a picture is called blurred; see `sharpness`. Photographs tried had 0.03 and
more, and 0.001 to 0.004 after a Gaussian blur of two pixels; flat drawings have 0.006 to 0.02."""
_DARK = 0.12
"""Mean brightness, 0 to 1, below which a picture is called dark."""
_SAME_PLACE = 48
"""Grey values, of 255, by which no place of two nearly equal pictures differs once their brightness is the same: what
stands on an even ground flips few bits of the hash."""
_OTHER_SHAPE = 1.3
"""How many times wider or taller than the middle one a picture is of another shape than the rest."""
_SMALL_FACE = 0.08
"""Share of the picture's height below which faces are on average too small to learn."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of one picture."""

    name: str
    """The file's name in the data set that came in."""
    height: int
    """Of the upright original, in pixels; as `width`."""
    width: int
    enlarged: float
    """How many times the crop was enlarged; below 1 it was shrunk."""
    cut_off: float
    """Share of the picture that was cut off, 0 to 1."""
    brightness: float
    """Mean luma, 0 to 1."""
    sharpness: float
    """See `sharpness`; of the prepared picture at 512 pixels."""
    fingerprint: int
    """See `fingerprint`."""
    thumbnail: np.ndarray
    """See `thumbnail`."""
    face_heights: Sequence[float] = field(default=())
    """Heights of the faces found, as shares of the picture's height."""


def sharpness(grey: np.ndarray) -> float:
    """Variance of the Laplacian of a picture [h, w] of 0 to 1, over the variance of the picture itself; 0 if it is flat.

    Source: Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (ICPR 2000); put in relation to the
    contrast here, so that a foggy picture is not a blurred one.
    """
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    contrast = float(grey.var())
    return float(laplacian.var()) / contrast if contrast > 1e-6 else 0.0


def fingerprint(image: Image.Image) -> int:
    """A perceptual hash of 64 bits: whether each of 8×8 places is brighter than its right neighbour.

    Small changes of size, tone or compression flip few bits. Source: Krawetz, "Kind of Like That" (2013), dHash.
    """
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int("".join("1" if bit else "0" for bit in (small[:, 1:] > small[:, :-1]).flat), 2)


def thumbnail(image: Image.Image) -> np.ndarray:
    """A picture in 16×16 grey values, int16, the mean taken off."""
    small = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=np.int16)
    return small - np.int16(small.mean())


def _twins(one: Facts, other: Facts) -> bool:
    if (one.fingerprint ^ other.fingerprint).bit_count() > _TWINS:
        return False
    return int(np.abs(one.thumbnail - other.thumbnail).max()) <= _SAME_PLACE


def advise(facts: Sequence[Facts], captions: Sequence[str], tokens: Sequence[str]) -> list[str]:
    """Sentences on the whole data set, then on single pictures; none where nothing is to be said.

    `captions` are the pictures' in the same order; `tokens` are words of which each must hold one (empty: unknown).
    """
    advice = []
    if len(facts) < FEW:
        advice.append(
            f"There are only {len(facts)} pictures: 5 to 20 varied ones teach a subject far better."
        )
    if len(facts) > MANY:
        advice.append(
            f"There are {len(facts)} pictures: for one subject the best 20 do as well, and train_batch_size and steps "
            "have to grow with more."
        )
    faces = [height for fact in facts for height in fact.face_heights]
    if faces:
        small = float(np.mean(faces)) < _SMALL_FACE
        remedy = "add close-ups, or crop nearer by hand" if small else "good"
        advice.append(f"Faces are on average {np.mean(faces):.0%} of the pictures' height: {remedy}.")
    if len(captions) > 1 and len(set(captions)) == 1:
        advice.append(
            f'All captions are "{captions[0]}": say what else each picture shows, or it becomes part of the subject.'
        )
    advice += _shapes(facts)
    for index, (fact, caption) in enumerate(zip(facts, captions, strict=True)):
        advice += [f"{fact.name} {finding}" for finding in _on_one(fact, caption, tokens)]
        twin = next((other for other in facts[:index] if _twins(fact, other)), None)
        if twin is not None:
            advice.append(
                f"{fact.name} is nearly the same as {twin.name}: keep one, or the subject is learned in that pose."
            )
    return advice


def _shapes(facts: Sequence[Facts]) -> list[str]:
    """A sentence on pictures of another shape than the middle one, which lose other parts than the rest."""
    middle = float(np.median([np.log(fact.width / fact.height) for fact in facts])) if facts else 0.0
    others = [
        f"{fact.name} ({fact.width}×{fact.height})"
        for fact in facts
        if abs(np.log(fact.width / fact.height) - middle) > np.log(_OTHER_SHAPE)
    ]
    if not others:
        return []
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    return [
        f"{', '.join(others[:5])}{more} differ in shape from the rest: crop them by hand, or set bucketing."
    ]


def _on_one(fact: Facts, caption: str, tokens: Sequence[str]) -> list[str]:
    findings = []
    if fact.enlarged > 1.5:
        findings.append(
            f"is tiny ({fact.width}×{fact.height}) and was enlarged {fact.enlarged:.1f} times: use a larger original."
        )
    elif fact.sharpness < _BLURRED:
        findings.append("is blurred: leave it out, or the subject is learned blurred.")
    if fact.brightness < _DARK:
        findings.append("is very dark: brighten it or leave it out.")
    if fact.cut_off > 0.4:
        findings.append(
            f"({fact.width}×{fact.height}) lost {fact.cut_off:.0%} in the crop: crop it by hand, or set bucketing."
        )
    if tokens and not any(names_in(caption, token) for token in tokens):
        findings.append(
            f'has the caption "{caption}" without {" or ".join(tokens)}: write it in as a word of its own.'
        )
    return findings
