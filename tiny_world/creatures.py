"""One creature or toy: its identity, and how to draw it in a pose as parts for the rasteriser.

Knows parts and poses; does not know how identities, poses or scenes are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tiny_world import parts as P
from tiny_world.parts import Frame, Pattern, Rgb, shade

INK: Rgb = (0.12, 0.11, 0.14)
PAPER: Rgb = (0.98, 0.98, 0.97)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One identity: everything about a creature or toy that stays the same in all its pictures.

    Lengths are in frame units; a creature is about 2 units tall. Colours are RGB in 0..1.
    """

    build: str
    skin: Rgb
    second: Rgb
    accent: Rgb
    body: tuple[float, float]
    head: tuple[float, float]
    body_shape: str
    head_shape: str
    body_pattern: str
    belly: bool
    ears: str
    ear_size: float
    eyes: int
    eye_size: float
    eye_style: str
    iris: Rgb
    mouth: str
    cheeks: bool
    limb: float
    feet: str
    tail: str
    wings: bool
    hat: str
    neck: str


@dataclass(frozen=True, kw_only=True)
class Pose:
    """What changes between pictures.

    Angles are in radians, for arms and legs from the downward direction. The gaze is in -1..1.
    """

    arm_left: float = -0.6
    arm_right: float = 0.6
    legs: float = 0.15
    tilt: float = 0.0
    lean: float = 0.0
    gaze: tuple[float, float] = (0.0, 0.0)
    tail: float = 0.0
    flip: bool = False


def draw_subject(frame: Frame, who: Subject, pose: Pose) -> None:
    """Append the subject's parts to a frame of about -1..1, with the feet at the bottom."""
    flipped = Frame(**{**frame.__dict__, "flip": frame.flip != pose.flip})
    whole = flipped.child(0, 0.9, 0.92, pose.lean).child(0, -0.9)
    if who.build == "walker":
        _walker(whole, who, pose)
    elif who.build == "blob":
        _blob(whole, who, pose)
    else:
        _upright(whole, who, pose)


def _upright(f: Frame, who: Subject, pose: Pose) -> None:
    """A head on a body with two arms and two legs. Robots too."""
    hip, bodyy = 0.62, 0.62 - who.body[1] * 0.85
    shoulder = bodyy - who.body[1] * 0.45
    _tail(f.child(who.body[0] * 0.7, hip - 0.1), who, pose)
    _wings(f.child(0, bodyy - 0.1), who, who.body[0])
    for side in (-1, 1):
        end = f.limb(side * who.body[0] * 0.5, hip, 0.24, who.limb * 1.15, side * pose.legs, _leg(who))
        _foot(end, who, side)
    _torso(f, who, 0, bodyy, who.body)
    for side, angle in ((-1, pose.arm_left), (1, pose.arm_right)):
        end = f.limb(side * who.body[0] * 0.85, shoulder, 0.36, who.limb, angle, _leg(who))
        end.ellipse(
            0,
            0.02,
            who.limb * 1.4,
            who.limb * 1.4,
            who.second if who.build == "robot" else shade(who.skin, 0.2),
        )
    _neck(f.child(0, bodyy - who.body[1] * 0.85), who, who.body[0])
    _head(f.child(0, bodyy - who.body[1] * 0.9, 1, pose.tilt).child(0, -who.head[1] * 0.85), who, pose)


def _blob(f: Frame, who: Subject, pose: Pose) -> None:
    """One big body that is also the head."""
    size = (who.body[0] + 0.26, who.body[1] + 0.3)
    centre = 0.82 - size[1] - 0.06
    _tail(f.child(size[0] * 0.8, 0.55), who, pose)
    _wings(f.child(0, centre), who, size[0])
    for side in (-1, 1):
        end = f.limb(side * size[0] * 0.45, 0.66, 0.14, who.limb * 1.2, side * pose.legs, _leg(who))
        _foot(end, who, side)
    for side, angle in ((-1, pose.arm_left), (1, pose.arm_right)):
        end = f.limb(side * size[0] * 0.85, centre + 0.12, 0.34, who.limb, angle, _leg(who))
        end.ellipse(0, 0.02, who.limb * 1.3, who.limb * 1.3, shade(who.skin, 0.2))
    _ears(f.child(0, centre), who, (size[0] * 0.85, size[1] * 0.95))
    _torso(f, who, 0, centre, size)
    face = f.child(0, centre - size[1] * 0.3, 1, pose.tilt * 0.5)
    _face(face, who, pose, size[0] * 0.9)
    _hat(f.child(0, centre - size[1] * 0.9, 1, pose.tilt * 0.5), who)


def _walker(f: Frame, who: Subject, pose: Pose) -> None:
    """A four-legged animal, seen from its left side with its face to the viewer."""
    size = (who.body[0] + 0.26, who.body[1] * 0.78)
    y = 0.26
    _tail(f.child(size[0] * 0.85, y - 0.05), who, pose)
    for x, swing in ((-0.42, -1), (0.38, 1)):
        f.limb(x + 0.1, y + 0.1, 0.46, who.limb, -swing * pose.legs * 0.8, shade(_leg(who), -0.2))
    _wings(f.child(0.1, y - 0.1), who, size[0] * 0.6)
    _torso(f, who, 0.05, y, size)
    for x, swing in ((-0.36, -1), (0.44, 1)):
        end = f.limb(x, y + 0.12, 0.46, who.limb * 1.1, swing * pose.legs * 0.8, _leg(who))
        _foot(end, who, -1)
    head = f.child(-0.5, y - size[1] * 0.45, 0.92, pose.tilt)
    _neck(head.child(0.05, 0.0), who, who.head[0] * 0.7)
    _head(head.child(0, -who.head[1] * 0.7), who, pose)


def _torso(f: Frame, who: Subject, x: float, y: float, size: tuple[float, float]) -> None:
    kind = {"none": P.SOLID, "stripes": P.STRIPES, "spots": P.DOTS}[who.body_pattern]
    pattern = Pattern(
        kind=kind,
        rgb=shade(who.second, 0.1),
        period=0.34,
        angle=np.pi / 2 if kind == P.STRIPES else 0.3,
        phase=0.2,
    )
    _shape(f, who.body_shape, x, y, size[0], size[1], who.skin, pattern)
    if who.belly and who.body_pattern == "none":
        patch = shade(who.skin, 0.55) if who.build != "robot" else who.second
        if who.build == "robot":
            f.box(x, y + 0.02, size[0] * 0.58, size[1] * 0.5, patch, rounding=0.3)
        else:
            f.ellipse(
                x, y + size[1] * (0.45 if who.build == "blob" else 0.2), size[0] * 0.6, size[1] * 0.5, patch
            )


def _shape(
    f: Frame, shape: str, x: float, y: float, hx: float, hy: float, rgb: Rgb, pattern: Pattern | None = None
):
    if shape == "pear":
        f.trapezoid(x, y, hx * 1.05, hy, rgb, top=0.6, rounding=0.75, pattern=pattern)
    elif shape == "round box":
        f.box(x, y, hx, hy, rgb, rounding=0.6, pattern=pattern)
    elif shape == "box":
        f.box(x, y, hx, hy, rgb, rounding=0.2, pattern=pattern)
    elif shape == "tall box":
        f.box(x, y, hx * 0.85, hy * 1.02, rgb, rounding=0.35, pattern=pattern)
    elif shape == "hexagon":
        f.star(x, y, hx * 1.05, rgb, n=6, m=2.0, hy=hy * 1.15, pattern=pattern)
    else:
        f.ellipse(x, y, hx, hy, rgb, pattern=pattern)


def _head(f: Frame, who: Subject, pose: Pose) -> None:
    _ears(f, who, who.head)
    _shape(f, who.head_shape, 0, 0, who.head[0], who.head[1], who.skin)
    _face(f, who, pose, who.head[0])
    _hat(f.child(0, -who.head[1] * 0.92), who)


def _face(f: Frame, who: Subject, pose: Pose, width: float) -> None:
    xs = {1: (0.0,), 2: (-0.42, 0.42), 3: (-0.58, 0.0, 0.58)}[who.eyes]
    radius = who.eye_size * (1.35 if who.eyes == 1 else 1.0)
    gx, gy = pose.gaze
    for x in xs:
        ex, ey = x * width, -0.06 - (0.06 if x == 0 and who.eyes == 3 else 0)
        if who.eye_style == "white":
            f.ellipse(ex, ey, radius, radius * 1.1, PAPER)
            f.ellipse(
                ex + gx * radius * 0.35, ey + gy * radius * 0.35, radius * 0.58, radius * 0.58, who.iris
            )
        else:
            f.ellipse(ex, ey, radius * 0.85, radius * 0.95, INK)
            f.ellipse(
                ex + radius * 0.25 + gx * radius * 0.2, ey - radius * 0.3, radius * 0.32, radius * 0.32, PAPER
            )
    if who.cheeks:
        for side in (-1, 1):
            f.ellipse(side * width * 0.66, 0.16, 0.09, 0.07, (0.97, 0.5, 0.55))
    _mouth(f, who)


def _mouth(f: Frame, who: Subject) -> None:
    dark = shade(who.skin, -0.75)
    if who.mouth == "smile":
        f.arc(0, 0.08, 0.16, dark, thickness=0.22, opening=1.1)
    elif who.mouth == "open":
        f.ellipse(0, 0.14, 0.16, 0.2, (0.45, 0.08, 0.12), cut=1.0)
        f.ellipse(0, 0.25, 0.1, 0.07, (0.94, 0.45, 0.5))
    elif who.mouth == "snout":
        f.ellipse(0, 0.17, 0.21, 0.14, shade(who.skin, 0.6))
        f.ellipse(0, 0.1, 0.085, 0.06, INK)
    elif who.mouth == "beak":
        f.trapezoid(0, 0.16, 0.15, 0.13, (0.98, 0.66, 0.12), rotation=np.pi, rounding=0.25)
    elif who.mouth == "teeth":
        f.box(0, 0.19, 0.2, 0.09, INK, rounding=0.5)
        f.box(-0.07, 0.16, 0.055, 0.055, PAPER, rounding=0.2)
        f.box(0.07, 0.16, 0.055, 0.055, PAPER, rounding=0.2)
    else:
        f.box(0, 0.2, 0.15, 0.03, dark, rounding=1.0)


def _ears(f: Frame, who: Subject, size: tuple[float, float]) -> None:
    """Ears, horns and the like behind a head of half sizes `size`."""
    s, (hx, hy) = who.ear_size, size
    inner = shade(who.skin, 0.45)
    for side in (-1, 1):
        if who.ears == "pointed":
            ear = f.child(side * hx * 0.68, -hy * 0.85, s, side * 0.35)
            ear.trapezoid(0, -0.08, 0.2, 0.26, who.skin, rounding=0.15)
            ear.trapezoid(0, -0.04, 0.1, 0.15, inner, rounding=0.15)
        elif who.ears == "round":
            f.ellipse(side * hx * 0.8, -hy * 0.75, 0.2 * s, 0.2 * s, who.skin)
            f.ellipse(side * hx * 0.8, -hy * 0.75, 0.11 * s, 0.11 * s, inner)
        elif who.ears == "long":
            ear = f.child(side * hx * 0.45, -hy * 0.8, s, side * 0.2)
            ear.box(0, -0.24, 0.12, 0.36, who.skin, rounding=1.0)
            ear.box(0, -0.24, 0.06, 0.26, inner, rounding=1.0)
        elif who.ears == "floppy":
            f.ellipse(
                side * hx * 0.98, hy * 0.02, 0.14 * s, 0.34 * s, shade(who.skin, -0.3), rotation=-side * 0.25
            )
        elif who.ears == "horns":
            horn = f.child(side * hx * 0.62, -hy * 0.85, s, side * 0.4)
            horn.trapezoid(0, -0.12, 0.11, 0.26, (0.95, 0.88, 0.7), rounding=0.2)
        elif who.ears == "bolts":
            f.box(side * (hx * 0.95), 0, 0.12, 0.12, who.second, rounding=0.3)
        elif who.ears == "two antennae":
            _antenna(f.child(side * hx * 0.45, -hy * 0.8, s, side * 0.3), who)
    if who.ears == "antenna":
        _antenna(f.child(0, -hy * 0.85, s), who)


def _antenna(f: Frame, who: Subject) -> None:
    f.box(0, -0.15, 0.04, 0.2, shade(who.skin, -0.45), rounding=1.0)
    f.ellipse(0, -0.36, 0.1, 0.1, who.accent)


def _hat(f: Frame, who: Subject) -> None:
    """What sits on top of the head. The frame's origin is just below the top."""
    band = shade(who.accent, 0.6)
    if who.hat == "top hat":
        f.box(0, -0.28, 0.24, 0.26, who.accent, rounding=0.12)
        f.box(0, -0.12, 0.24, 0.06, band, rounding=0.0)
        f.box(0, -0.03, 0.4, 0.055, who.accent, rounding=0.6)
    elif who.hat == "cone":
        pattern = Pattern(kind=P.STRIPES, rgb=band, period=0.26, angle=np.pi / 2, phase=0.1)
        f.trapezoid(0, -0.26, 0.28, 0.34, who.accent, rounding=0.1, pattern=pattern)
        f.ellipse(0, -0.58, 0.09, 0.09, band)
    elif who.hat == "cap":
        f.ellipse(0, 0.06, 0.36, 0.3, who.accent, cut=0.0)
        f.box(-0.3, 0.03, 0.28, 0.05, shade(who.accent, -0.3), rounding=1.0)
    elif who.hat == "bow":
        bow = f.child(0.24, -0.02, 1, 0.3)
        bow.trapezoid(-0.15, 0, 0.15, 0.15, who.accent, rotation=np.pi / 2, rounding=0.3)
        bow.trapezoid(0.15, 0, 0.15, 0.15, who.accent, rotation=-np.pi / 2, rounding=0.3)
        bow.ellipse(0, 0, 0.075, 0.075, band)
    elif who.hat == "crown":
        gold = (0.98, 0.8, 0.22)
        for x in (-0.22, 0.0, 0.22):
            f.trapezoid(x, -0.2, 0.13, 0.17, gold, rounding=0.05)
        f.box(0, -0.06, 0.33, 0.09, gold, rounding=0.2)
        f.ellipse(0, -0.08, 0.065, 0.065, who.accent)
    elif who.hat == "flower":
        for i in range(5):
            a = 2 * np.pi * i / 5
            f.ellipse(-0.24 + 0.13 * float(np.sin(a)), -0.08 - 0.13 * float(np.cos(a)), 0.1, 0.1, who.accent)
        f.ellipse(-0.24, -0.08, 0.08, 0.08, (0.99, 0.86, 0.25))


def _neck(f: Frame, who: Subject, width: float) -> None:
    if who.neck == "scarf":
        f.box(0.16, 0.2, 0.09, 0.2, shade(who.accent, -0.2), rounding=0.3)
        f.box(0, 0.04, width * 0.88, 0.1, who.accent, rounding=1.0)
    elif who.neck == "bow tie":
        f.trapezoid(-0.13, 0.12, 0.13, 0.13, who.accent, rotation=np.pi / 2, rounding=0.25)
        f.trapezoid(0.13, 0.12, 0.13, 0.13, who.accent, rotation=-np.pi / 2, rounding=0.25)
        f.ellipse(0, 0.12, 0.06, 0.06, shade(who.accent, -0.35))
    elif who.neck == "collar":
        f.box(0, 0.03, width * 0.75, 0.065, who.accent, rounding=1.0)
        f.ellipse(0, 0.13, 0.08, 0.08, (0.98, 0.82, 0.25))


def _tail(f: Frame, who: Subject, pose: Pose) -> None:
    if who.tail == "curl":
        curl = f.child(0.1, 0.0, 1, pose.tail)
        curl.arc(0.12, -0.12, 0.2, shade(who.skin, -0.15), thickness=0.3, opening=2.2)
    elif who.tail == "thick":
        end = f.limb(0, 0, 0.34, 0.1, 1.9 + pose.tail, shade(who.skin, -0.15))
        end.ellipse(0, 0.02, 0.12, 0.12, who.second)
    elif who.tail == "puff":
        f.ellipse(0.16, 0.0, 0.17, 0.17, shade(who.skin, 0.5))


def _wings(f: Frame, who: Subject, width: float) -> None:
    if who.wings:
        for side in (-1, 1):
            wing = f.child(side * width * 0.8, 0, 1, side * 0.9)
            wing.ellipse(0, -0.3, 0.2, 0.38, shade(who.second, 0.35))
            wing.ellipse(0, -0.22, 0.11, 0.24, who.second)


def _foot(f: Frame, who: Subject, side: int) -> None:
    if who.feet == "shoes":
        f.ellipse(side * 0.05, 0.02, 0.17, 0.1, shade(who.accent, -0.25))
    elif who.feet == "paws":
        f.ellipse(side * 0.02, 0.01, 0.14, 0.11, shade(who.skin, 0.4))


def _leg(who: Subject) -> Rgb:
    return shade(who.skin, -0.35) if who.build == "robot" else shade(who.skin, -0.12)
