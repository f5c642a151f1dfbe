"""Pictures as lists of parts: the table that the rasteriser reads, and local frames that fill it.

Knows geometry; does not know pixels or what parts mean. x points right and y down, and the canvas is 0..1. Angles are in
radians, clockwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

Rgb = tuple[float, float, float]

ELLIPSE, BOX, TRAPEZOID, STAR, ARC, HEART = range(6)
"""Primitives, each within half sizes (hx, hy) around its centre. `p1`, `p2` mean:
BOX: rounding 0..1 of the smaller half size (1: capsule); TRAPEZOID: top width over bottom width, rounding
0..1; STAR: points n, sharpness m in 2..n (2: regular polygon), a vertex upwards; ARC: half thickness over
radius hx, half opening in radians around the downward direction (pi: ring); HEART: none."""

SOLID, STRIPES, DOTS, CHECKS, GRADIENT = range(5)
"""Patterns of a part's two colours."""

(
    PRIMITIVE, X, Y, HX, HY, ROTATION, P1, P2, CUT, R, G, B,
    PATTERN, PERIOD, ANGLE, PHASE, R2, G2, B2, OUTLINE, OUTLINE_R, OUTLINE_G, OUTLINE_B, LAYER,
) = range(24)  # fmt: skip
FIELDS = 24
NO_CUT = 1e3
EMPTY = -1.0
"""The value of PRIMITIVE in padding rows."""


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """The second colour of a part. `period` is in the frame's units, `phase` in periods, `angle` in radians."""

    kind: int
    rgb: Rgb
    period: float
    angle: float = 0.0
    phase: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A local coordinate frame. It appends parts to a shared list, in drawing order."""

    rows: list[list[float]]
    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0
    angle: float = 0.0
    flip: bool = False
    layer: int = 0
    tint: Rgb = (1.0, 1.0, 1.0)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Canvas coordinates of the local point (x, y)."""
        x = -x if self.flip else x
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return self.x + self.scale * (cos * x - sin * y), self.y + self.scale * (sin * x + cos * y)

    def child(self, x: float, y: float, scale: float = 1.0, angle: float = 0.0) -> Frame:
        """A frame at the local point (x, y), scaled and turned."""
        px, py = self.place(x, y)
        turn = -angle if self.flip else angle
        return replace(self, x=px, y=py, scale=self.scale * scale, angle=self.angle + turn)

    def add(
        self,
        primitive: int,
        x: float,
        y: float,
        hx: float,
        hy: float,
        rgb: Rgb,
        *,
        rotation: float = 0.0,
        p1: float = 0.0,
        p2: float = 0.0,
        cut: float = NO_CUT,
        pattern: Pattern | None = None,
        outline: float = 0.0,
        outline_rgb: Rgb = (0.0, 0.0, 0.0),
    ) -> None:
        """Append one part. Lengths are in the frame's units. `cut` keeps what is above local y = cut * hy."""
        px, py = self.place(x, y)
        turn = -rotation if self.flip else rotation
        pattern = pattern or Pattern(kind=SOLID, rgb=rgb, period=1.0)
        row = [float(primitive), px, py, hx * self.scale, hy * self.scale, self.angle + turn, p1, p2, cut]
        row += self._lit(rgb)
        row += [float(pattern.kind), pattern.period * self.scale, pattern.angle, pattern.phase]
        row += [*self._lit(pattern.rgb), outline * self.scale, *self._lit(outline_rgb), float(self.layer)]
        self.rows.append(row)

    def ellipse(self, x: float, y: float, hx: float, hy: float, rgb: Rgb, **options) -> None:
        self.add(ELLIPSE, x, y, hx, hy, rgb, **options)

    def box(
        self, x: float, y: float, hx: float, hy: float, rgb: Rgb, *, rounding: float = 0.2, **options
    ) -> None:
        self.add(BOX, x, y, hx, hy, rgb, p1=rounding, **options)

    def trapezoid(
        self,
        x: float,
        y: float,
        hx: float,
        hy: float,
        rgb: Rgb,
        *,
        top: float = 0.0,
        rounding: float = 0.15,
        **options,
    ) -> None:
        self.add(TRAPEZOID, x, y, hx, hy, rgb, p1=top, p2=rounding, **options)

    def star(
        self,
        x: float,
        y: float,
        r: float,
        rgb: Rgb,
        *,
        n: int = 5,
        m: float = 3.0,
        hy: float = 0.0,
        **options,
    ):
        self.add(STAR, x, y, r, hy or r, rgb, p1=float(n), p2=m, **options)

    def arc(
        self,
        x: float,
        y: float,
        r: float,
        rgb: Rgb,
        *,
        thickness: float = 0.2,
        opening: float = math.pi,
        **options,
    ) -> None:
        self.add(ARC, x, y, r, r, rgb, p1=thickness, p2=opening, **options)

    def heart(self, x: float, y: float, r: float, rgb: Rgb, **options) -> None:
        self.add(HEART, x, y, r, r, rgb, **options)

    def limb(
        self, x: float, y: float, length: float, width: float, angle: float, rgb: Rgb, **options
    ) -> Frame:
        """Append a capsule that starts at (x, y) and points `angle` from the downward direction towards +x.

        Returns the frame at its end.
        """
        dx, dy = math.sin(angle) * length, math.cos(angle) * length
        self.box(
            x + dx / 2, y + dy / 2, width, length / 2 + width, rgb, rounding=1.0, rotation=-angle, **options
        )
        return self.child(x + dx, y + dy, 1.0, -angle)

    def _lit(self, rgb: Rgb) -> list[float]:
        return [min(1.0, max(0.0, c * t)) for c, t in zip(rgb, self.tint, strict=True)]


def shade(rgb: Rgb, amount: float) -> Rgb:
    """Mix with white (amount > 0) or black (amount < 0), |amount| in 0..1."""
    target = 1.0 if amount > 0 else 0.0
    r, g, b = (c + (target - c) * abs(amount) for c in rgb)
    return r, g, b


def pad(pictures: Sequence[Sequence[Sequence[float]]], slots: int | None = None) -> np.ndarray:
    """The part lists of B pictures as one table float32[B, P, FIELDS], padded with EMPTY rows."""
    slots = slots or max(len(rows) for rows in pictures)
    table = np.zeros((len(pictures), slots, FIELDS), dtype=np.float32)
    table[:, :, PRIMITIVE] = EMPTY
    for i, rows in enumerate(pictures):
        table[i, : len(rows)] = rows
    return table
