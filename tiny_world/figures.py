"""Figures: random things of many parts and any colours.

They are as complex as subjects, with small eyes and thin limbs, but follow rules of their own. The autoencoder trains on
any number of them in any place. The base trains on scenes with one or two of them as objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tiny_world import parts as P
from tiny_world.parts import Frame, Pattern, Rgb
from tiny_world.scenes import background_parts, jittered
from tiny_world.words import COLOURS, TEXTURES

ROUND = 2 * np.pi
Span = tuple[float, float]


def figure_parts(rng: np.random.Generator) -> list[list[float]]:
    """The parts of one random picture: a background with one to three figures or scattered primitives."""
    rows: list[list[float]] = []
    canvas = Frame(rows=rows)
    if rng.random() < 0.45:
        rgb = (
            _rgb(rng) if rng.random() < 0.5 else jittered(COLOURS[str(rng.choice(tuple(COLOURS)))], rng, 0.06)
        )
        rows.extend(background_parts(rgb, str(rng.choice(TEXTURES)), rng))
    else:
        pattern = _pattern(rng, 0.1, 0.4) if rng.random() < 0.6 else None
        canvas.box(
            0.5, 0.5, 1.5, 1.5, _rgb(rng), rounding=0.0, rotation=rng.uniform(0, ROUND), pattern=pattern
        )
    if rng.random() < 0.2:
        for _ in range(rng.integers(3, 14)):
            frame = canvas.child(*rng.uniform(0.05, 0.95, 2), 1.0, rng.uniform(0, ROUND))
            _primitive(frame, rng, float(rng.uniform(0.03, 0.25)), _rgb(rng))
        return rows
    count = int(rng.choice((1, 1, 1, 2, 3)))
    for _ in range(count):
        size = rng.uniform(0.16, 0.34) if count == 1 else rng.uniform(0.1, 0.2)
        centre = rng.uniform(0.25, 0.75, 2)
        _grow(canvas.child(centre[0], centre[1], size, rng.uniform(-0.5, 0.5)), rng)
    return rows


def draw_toy(f: Frame, rng: np.random.Generator, colours: str | None) -> None:
    """Draw one figure into a frame of about -1..1, in any colours or in two named ones ("red and blue").

    It has a trunk and a head of random primitives with limbs, eyes and odd bits, or it grows around a trunk alone.
    """
    palette = [_rgb(rng) for _ in range(int(rng.integers(2, 6)))]
    if colours:
        palette = [jittered(COLOURS[name], rng, 0.04) for name in colours.split(" and ")]
    if rng.random() < 0.25:
        _grow(f.child(0, 0, 0.62, rng.uniform(-0.3, 0.3)), rng, palette)
        return

    def pick() -> Rgb:
        return palette[int(rng.integers(len(palette)))]

    trunk = f.child(0, rng.uniform(0.2, 0.4), 1.0, rng.uniform(-0.15, 0.15))
    head = f.child(rng.uniform(-0.06, 0.06), rng.uniform(-0.5, -0.3), 1.0, rng.uniform(-0.2, 0.2))
    for _ in range(rng.integers(1, 3)):
        length, width, tip = rng.uniform(0.45, 0.75), rng.uniform(0.05, 0.14), rng.uniform(0.08, 0.2)
        rgb, end_rgb, has_tip = pick(), pick(), rng.random() < 0.6
        angle, swing = rng.uniform(0.1, 2.2), rng.uniform(-0.3, 0.3)
        for side in (1, -1):
            end = trunk.limb(0, 0, length, width, side * angle + swing, rgb)
            if has_tip:
                end.ellipse(0, 0, tip, tip * 0.8, end_rgb)
    _mirrored(head, rng, pick, count=int(rng.integers(0, 3)), reach=(0.25, 0.5), size=(0.12, 0.28))
    _primitive(trunk, rng, float(rng.uniform(0.42, 0.56)), pick(), solid=True)
    _mirrored(trunk, rng, pick, count=int(rng.integers(0, 3)), reach=(0.0, 0.3), size=(0.06, 0.2))
    _primitive(head, rng, float(rng.uniform(0.38, 0.54)), pick(), solid=True)
    _mirrored(head, rng, pick, count=int(rng.integers(0, 3)), reach=(0.05, 0.45), size=(0.05, 0.22))
    _eyes(head, rng)


def _mirrored(
    f: Frame, rng: np.random.Generator, pick: Callable[[], Rgb], *, count: int, reach: Span, size: Span
) -> None:
    """Primitives around the frame's origin, in pairs or one in the middle."""
    for _ in range(count):
        angle, far, s, rgb = (
            rng.uniform(-np.pi, np.pi),
            rng.uniform(*reach),
            float(rng.uniform(*size)),
            pick(),
        )
        x, y, state = far * np.sin(angle), far * np.cos(angle), rng.bit_generator.state
        for side in (1, -1) if rng.random() < 0.6 else (0,):
            rng.bit_generator.state = state  # both primitives of a pair look alike
            _primitive(f.child(side * x, y, 1.0, side * angle), rng, s, rgb)


def _eyes(f: Frame, rng: np.random.Generator) -> None:
    """One to three eyes in a row."""
    n, r, y = int(rng.choice((1, 2, 2, 2, 3))), rng.uniform(0.06, 0.17), rng.uniform(-0.2, 0.1)
    white, dark, gaze = _rgb(rng, grey=0.8), _rgb(rng, grey=0.6), rng.uniform(-0.35, 0.35, 2) * r
    for i in range(n):
        x = (i - (n - 1) / 2) * r * 2.2
        f.ellipse(x, y, r, r, white)
        f.ellipse(x + gaze[0], y + gaze[1], r * 0.55, r * 0.55, dark)


def _grow(f: Frame, rng: np.random.Generator, palette: Sequence[Rgb] = ()) -> None:
    """A figure around a trunk, with mirrored limbs and lobes behind it and smaller lumps and eyes in front."""
    palette = list(palette) or [_rgb(rng) for _ in range(int(rng.integers(2, 6)))]

    def pick() -> Rgb:
        return palette[int(rng.integers(len(palette)))]

    for _ in range(rng.integers(1, 5)):
        a, length, colour = rng.uniform(-np.pi, np.pi), rng.uniform(0.8, 1.6), pick()
        width, tip = rng.uniform(0.05, 0.16), rng.uniform(0.08, 0.3)
        for side in (1, -1) if rng.random() < 0.75 else (1,):
            end = f.limb(0, 0, length, width, side * a, colour)
            if rng.random() < 0.7:
                _primitive(end.child(0, 0, 1.0, rng.uniform(-0.6, 0.6)), rng, tip, pick())
    for _ in range(rng.integers(1, 4)):
        at = rng.uniform(-0.7, 0.7, 2)
        _primitive(
            f.child(at[0], at[1], 1.0, rng.uniform(-0.6, 0.6)), rng, float(rng.uniform(0.4, 0.95)), pick()
        )
    for _ in range(rng.integers(0, 4)):
        x, y = rng.uniform(0, 0.7), rng.uniform(-0.9, 0.9)
        r, colour, inner = rng.uniform(0.07, 0.24), pick(), _rgb(rng)
        eye = rng.random() < 0.6
        for side in (1, -1) if rng.random() < 0.7 else (1,):
            f.ellipse(side * x, y, r, r * rng.uniform(0.8, 1.2), _rgb(rng, grey=0.7) if eye else colour)
            if eye:
                dx, dy = rng.uniform(-0.3, 0.3, 2) * r
                f.ellipse(
                    side * x + dx, y + dy, r * 0.55, r * 0.55, _rgb(rng, grey=0.4) if r > 0.15 else inner
                )
    for _ in range(rng.integers(0, 6)):
        at = rng.uniform(-0.9, 0.9, 2)
        _primitive(
            f.child(at[0], at[1], 1.0, rng.uniform(0, ROUND)), rng, float(rng.uniform(0.08, 0.35)), pick()
        )


def _primitive(f: Frame, rng: np.random.Generator, size: float, rgb: Rgb, *, solid: bool = False) -> None:
    """One random primitive of about `size` at the frame's origin. solid: choose one without holes."""
    low = 0.75 if solid else 0.5
    hx, hy = size * rng.uniform(low, 1.0), size * rng.uniform(low, 1.0)
    options = {}
    if rng.random() < 0.25:
        options["pattern"] = _pattern(rng, 0.5 * size + 0.1, 1.5 * size + 0.2)
    if rng.random() < 0.08:
        options["outline"], options["outline_rgb"] = size * rng.uniform(0.05, 0.2), _rgb(rng)
    if not solid and rng.random() < 0.1:
        options["cut"] = rng.uniform(-0.3, 0.6)
    kind = int(rng.choice(6, p=(0.5, 0.3, 0.2, 0, 0, 0) if solid else (0.34, 0.24, 0.14, 0.12, 0.1, 0.06)))
    if kind == P.ELLIPSE:
        f.ellipse(0, 0, hx, hy, rgb, **options)
    elif kind == P.BOX:
        f.box(0, 0, hx, hy, rgb, rounding=float(rng.choice((0.0, 0.2, 0.5, 1.0))), **options)
    elif kind == P.TRAPEZOID:
        f.trapezoid(0, 0, hx, hy, rgb, top=rng.uniform(0, 0.9), rounding=rng.uniform(0, 0.6), **options)
    elif kind == P.STAR:
        n = int(rng.integers(3, 8))
        f.star(0, 0, size, rgb, n=n, m=float(rng.uniform(2, 2 + 0.5 * (n - 2))), hy=hy, **options)
    elif kind == P.ARC:
        f.arc(
            0,
            0,
            size * 0.8,
            rgb,
            thickness=rng.uniform(0.15, 0.4),
            opening=rng.uniform(0.5, np.pi),
            **options,
        )
    else:
        f.heart(0, 0, size, rgb, **options)


def _pattern(rng: np.random.Generator, low: float, high: float) -> Pattern:
    return Pattern(
        kind=int(rng.integers(1, 5)),
        rgb=_rgb(rng),
        period=float(rng.uniform(low, high)),
        angle=float(rng.uniform(0, ROUND)),
        phase=float(rng.random()),
    )


def _rgb(rng: np.random.Generator, grey: float = 0.12) -> Rgb:
    if rng.random() < grey:
        v = float(rng.choice((rng.uniform(0, 0.15), rng.uniform(0.9, 1.0), rng.random())))
        return v, v, v
    r, g, b = (float(v) for v in rng.random(3) ** rng.choice((0.5, 1.0, 1.6)))
    return r, g, b
