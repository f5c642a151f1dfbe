"""The objects of the world. Each kind fills a frame of about -1..1, with its main body in the named colour."""

from __future__ import annotations

import math
from collections.abc import Callable

from tiny_world.parts import Frame, Rgb, shade

WOOD: Rgb = (0.60, 0.42, 0.26)
DARK: Rgb = (0.16, 0.15, 0.17)
CREAM: Rgb = (0.98, 0.94, 0.82)
GLASS: Rgb = (0.78, 0.90, 0.96)


def draw_kind(frame: Frame, kind: str, rgb: Rgb) -> None:
    """Append the parts of an object in colour `rgb`; kind: one of `words.KINDS`."""
    _DRAW[kind](frame, rgb)


def _circle(f: Frame, c: Rgb) -> None:
    f.ellipse(0, 0, 0.9, 0.9, c)


def _square(f: Frame, c: Rgb) -> None:
    f.box(0, 0, 0.8, 0.8, c, rounding=0.06)


def _triangle(f: Frame, c: Rgb) -> None:
    f.trapezoid(0, 0, 0.98, 0.86, c, rounding=0.06)


def _star(f: Frame, c: Rgb) -> None:
    f.star(0, 0.05, 1.0, c, n=5, m=3.1)


def _heart(f: Frame, c: Rgb) -> None:
    f.heart(0, 0, 0.95, c)


def _diamond(f: Frame, c: Rgb) -> None:
    f.star(0, 0, 0.68, c, n=4, m=2.0, hy=1.0)


def _ring(f: Frame, c: Rgb) -> None:
    f.arc(0, 0, 0.7, c, thickness=0.3)


def _cross(f: Frame, c: Rgb) -> None:
    f.box(0, 0, 0.3, 0.9, c, rounding=0.1)
    f.box(0, 0, 0.9, 0.3, c, rounding=0.1)


def _house(f: Frame, c: Rgb) -> None:
    roof = shade(c, -0.4) if max(c) > 0.3 else shade(c, 0.35)
    f.box(0, 0.4, 0.68, 0.52, c, rounding=0.04)
    f.trapezoid(0, -0.48, 0.95, 0.44, roof, top=0.08, rounding=0.1)
    f.box(-0.3, 0.56, 0.18, 0.36, WOOD if c[0] > 0.6 or c[2] > 0.5 or c[1] > 0.5 else CREAM, rounding=0.1)
    f.box(0.28, 0.3, 0.2, 0.2, GLASS if c[2] < 0.8 or c[0] > 0.9 else DARK, rounding=0.1)


def _fish(f: Frame, c: Rgb) -> None:
    fin = shade(c, -0.25) if max(c) > 0.3 else shade(c, 0.3)
    f.trapezoid(0.76, 0, 0.46, 0.32, fin, rotation=-math.pi / 2, rounding=0.2)
    f.trapezoid(0.0, -0.5, 0.32, 0.24, fin, rounding=0.2)
    f.ellipse(-0.18, 0, 0.76, 0.52, c)
    f.ellipse(-0.52, -0.12, 0.15, 0.15, (0.98, 0.98, 0.97))
    f.ellipse(-0.54, -0.12, 0.08, 0.08, DARK)


def _tree(f: Frame, c: Rgb) -> None:
    f.box(0, 0.62, 0.15, 0.36, WOOD, rounding=0.2)
    f.ellipse(-0.42, -0.02, 0.44, 0.42, c)
    f.ellipse(0.42, -0.02, 0.44, 0.42, c)
    f.ellipse(0, -0.42, 0.54, 0.54, c)
    f.ellipse(0, 0.05, 0.45, 0.38, c)


def _boat(f: Frame, c: Rgb) -> None:
    f.box(0, -0.22, 0.06, 0.72, WOOD, rounding=0.3)
    f.trapezoid(0.34, -0.32, 0.36, 0.52, CREAM if min(c) < 0.9 else shade(c, -0.15), rounding=0.1)
    f.trapezoid(-0.24, -0.2, 0.2, 0.34, CREAM if min(c) < 0.9 else shade(c, -0.15), rounding=0.1)
    f.trapezoid(0, 0.56, 0.95, 0.36, c, top=0.55, rotation=math.pi, rounding=0.15)


def _flower(f: Frame, c: Rgb) -> None:
    leaf = (0.25, 0.55, 0.25)
    f.box(0, 0.45, 0.07, 0.52, leaf, rounding=1.0)
    f.ellipse(0.24, 0.62, 0.24, 0.11, leaf, rotation=-0.5)
    for i in range(5):
        a = 2 * math.pi * i / 5
        f.ellipse(0.36 * math.sin(a), -0.34 - 0.36 * math.cos(a), 0.28, 0.28, c)
    f.ellipse(0, -0.34, 0.22, 0.22, (0.99, 0.85, 0.2) if not (c[0] > 0.9 and c[2] < 0.3) else WOOD)


def _mushroom(f: Frame, c: Rgb) -> None:
    f.trapezoid(0, 0.44, 0.34, 0.48, CREAM if min(c) < 0.9 else shade(c, -0.2), top=0.75, rounding=0.4)
    f.ellipse(0, 0.12, 0.95, 0.95, c, cut=0.02)
    spot = (0.99, 0.98, 0.95) if min(c) < 0.9 else (0.7, 0.68, 0.66)
    f.ellipse(-0.42, -0.22, 0.17, 0.17, spot)
    f.ellipse(0.08, -0.48, 0.19, 0.17, spot)
    f.ellipse(0.5, -0.16, 0.15, 0.15, spot)


def _car(f: Frame, c: Rgb) -> None:
    f.trapezoid(-0.05, -0.22, 0.62, 0.36, c, top=0.62, rounding=0.25)
    f.trapezoid(-0.05, -0.18, 0.46, 0.22, GLASS if c[2] < 0.8 or c[0] > 0.9 else DARK, top=0.66, rounding=0.2)
    f.box(0, 0.2, 0.95, 0.28, c, rounding=0.5)
    for x in (-0.5, 0.5):
        f.ellipse(x, 0.46, 0.24, 0.24, DARK)
        f.ellipse(x, 0.46, 0.1, 0.1, (0.8, 0.8, 0.8))


def _cup(f: Frame, c: Rgb) -> None:
    f.arc(0.5, 0.05, 0.32, c, thickness=0.3)
    f.trapezoid(-0.12, 0.08, 0.62, 0.74, c, top=0.8, rounding=0.15, rotation=math.pi)
    f.ellipse(-0.12, -0.62, 0.6, 0.16, shade(c, -0.35) if max(c) > 0.3 else shade(c, 0.35))


_DRAW: dict[str, Callable[[Frame, Rgb], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "diamond": _diamond,
    "ring": _ring,
    "cross": _cross,
    "house": _house,
    "fish": _fish,
    "tree": _tree,
    "boat": _boat,
    "flower": _flower,
    "mushroom": _mushroom,
    "car": _car,
    "cup": _cup,
}
