"""Scenes: what a picture shows, as data; its parts; and the combinations that the pretraining never shows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from tiny_world import parts as P
from tiny_world.kinds import draw_kind
from tiny_world.parts import Frame, Pattern, Rgb, shade
from tiny_world.words import COLOURS, KINDS, POSITIONS, RELATIONS, SIZES, TEXTURES, TOYS

HALF_SIZES = {"small": 0.12, "medium": 0.19, "large": 0.29}
"""Half the size of an object, in canvas widths."""

CAST_SCALE = {"small": 1.7, "medium": 1.42, "large": 1.3}
"""Subjects are this much larger than objects of the same size word."""

HELD_OUT_SHARE = 10
"""One in this many combinations of kind, colour, background colour and texture is held out."""

Draw = Callable[[Frame, np.random.Generator], None]
"""Draws a named subject into a frame of about -1..1."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What one picture shows. All words are those of `words`.

    kind: a kind, the name of a subject (then `colour` is None), one of `words.TOYS` (then `colour` is None or two
        colours, "red and blue"), or None for an empty background.
    relation: where the first thing is, seen from the second; `position` is "middle" then.
    """

    kind: str | None
    colour: str | None
    size: str
    position: str
    background: str
    texture: str
    second_kind: str | None = None
    second_colour: str | None = None
    relation: str | None = None


class View(NamedTuple):
    """The part of the scene that the canvas shows: first enlarged by `zoom`, then cut at `left` and `top`, in canvas widths."""

    zoom: float = 1.0
    left: float = 0.0
    top: float = 0.0


def held_out(kind: str | None, colour: str | None, background: str, texture: str) -> bool:
    """Whether a combination is reserved for judging: the first 4 bytes of its SHA-256, modulo 10, are 0."""
    key = f"{kind}/{colour}/{background}/{texture}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") % HELD_OUT_SHARE == 0


def is_held_out(scene: Scene) -> bool:
    """Whether any object of the scene is a held-out combination with its background."""
    if scene.kind is None:
        return False
    first = held_out(scene.kind, scene.colour, scene.background, scene.texture)
    return first or (
        scene.second_kind is not None
        and held_out(scene.second_kind, scene.second_colour, scene.background, scene.texture)
    )


def random_scene(
    rng: np.random.Generator, *, held: bool = False, empty: float = 0.03, pairs: float = 0.22
) -> Scene:
    """A random scene from the held-out combinations (`held`) or from the others.

    `empty` and `pairs` are the shares of pictures with no object and with two.
    """
    while True:
        background = _pick(rng, tuple(COLOURS))
        texture = str(rng.choice(TEXTURES, p=(0.36, 0.18, 0.17, 0.14, 0.15)))
        if not held and rng.random() < empty:
            return Scene(
                kind=None,
                colour=None,
                size="medium",
                position="middle",
                background=background,
                texture=texture,
            )
        colours = [c for c in COLOURS if c != background]
        pair = rng.random() < pairs
        position = "middle" if pair or rng.random() < 0.2 else _pick(rng, tuple(POSITIONS))
        scene = Scene(
            kind=_pick(rng, KINDS),
            colour=_pick(rng, colours),
            size=_pick(rng, SIZES[:2] if pair else SIZES),
            position=position,
            background=background,
            texture=texture,
            second_kind=_pick(rng, KINDS) if pair else None,
            second_colour=_pick(rng, colours) if pair else None,
            relation=_pick(rng, tuple(RELATIONS)) if pair else None,
        )
        if is_held_out(scene) == held:
            return scene


def toy_scene(rng: np.random.Generator) -> Scene:
    """A random scene in which one thing or both are toys: any figures. Captions name at most two of their colours."""
    scene = random_scene(rng, empty=0.0, pairs=0.4)
    nouns = [str(noun) for noun in rng.choice(TOYS, 2, replace=False)]

    def looks() -> str | None:
        return " and ".join(rng.choice(tuple(COLOURS), 2, replace=False)) if rng.random() < 0.4 else None

    if scene.relation is None:
        return replace(scene, kind=nouns[0], colour=looks())
    which = rng.random()
    if which < 0.7:
        scene = replace(scene, kind=nouns[0], colour=looks())
    if which > 0.5:
        scene = replace(scene, second_kind=nouns[1], second_colour=looks())
    return scene


def background_parts(rgb: Rgb, texture: str, rng: np.random.Generator) -> list[list[float]]:
    """The background's parts: one box over the whole canvas, with a lighter or darker shade of `rgb` as second colour."""
    rows: list[list[float]] = []
    bright = 0.3 * rgb[0] + 0.6 * rgb[1] + 0.1 * rgb[2]
    lighter = bright < 0.25 or (bright < 0.8 and rng.random() < 0.6)
    second = shade(rgb, rng.uniform(0.32, 0.42)) if lighter else shade(rgb, -rng.uniform(0.2, 0.28))
    if bright < 0.1:
        second = shade(rgb, rng.uniform(0.24, 0.3))
    period, angle, phase = rng.uniform(0.13, 0.2), 0.0, float(rng.random())
    kind = {
        "plain": P.SOLID,
        "striped": P.STRIPES,
        "dotted": P.DOTS,
        "checkered": P.CHECKS,
        "gradient": P.GRADIENT,
    }
    if texture == "striped":
        angle = float(rng.choice((0.0, 0.25, 0.5, 0.75))) * np.pi
    elif texture == "checkered":
        period = rng.uniform(0.24, 0.36)
    elif texture == "gradient":
        angle, period, phase = float(rng.choice((0.0, 0.5, 1.0, 1.5))) * np.pi, 1.0, 0.0
        second = shade(rgb, 0.62 if lighter else -0.5)
    pattern = Pattern(kind=kind[texture], rgb=second, period=period, angle=angle, phase=phase)
    Frame(rows=rows).box(0.5, 0.5, 1.5, 1.5, rgb, rounding=0.0, pattern=pattern)
    return rows


def jittered(rgb: Rgb, rng: np.random.Generator, amount: float = 0.02) -> Rgb:
    """The colour with each channel moved by at most `amount`, so that it keeps its name."""
    r, g, b = (float(np.clip(c + rng.uniform(-amount, amount), 0, 1)) for c in rgb)
    return r, g, b


def scene_parts(
    scene: Scene,
    rng: np.random.Generator,
    *,
    cast: Mapping[str, Draw] | None = None,
    view: View = View(),
    tint: Rgb = (1.0, 1.0, 1.0),
) -> list[list[float]]:
    """The parts of a scene. Layer 1 is the first thing, layer 2 the second.

    cast: how to draw the scene's subjects. tint: factors of light on everything, the background included.
    """
    base = jittered(COLOURS[scene.background], rng)
    lit = (base[0] * tint[0], base[1] * tint[1], base[2] * tint[2])
    rows = background_parts((min(lit[0], 1.0), min(lit[1], 1.0), min(lit[2], 1.0)), scene.texture, rng)
    if scene.kind is not None:
        for layer, kind, colour, x, y, half in _layout(scene, rng, cast or {}):
            frame = Frame(rows=rows, x=x, y=y, scale=half, layer=layer, tint=tint)
            if cast and kind in cast:
                cast[kind](frame, rng)
            else:
                assert colour is not None
                draw_kind(
                    frame.child(0, 0, 1, rng.uniform(-0.08, 0.08)), kind, jittered(COLOURS[colour], rng)
                )
    return [_through(view, row) for row in rows] if view != View() else rows


def _layout(
    scene: Scene, rng: np.random.Generator, cast: Mapping[str, Draw]
) -> list[tuple[int, str, str | None, float, float, float]]:
    """(layer, kind, colour, x, y, half size) of each thing, in drawing order."""
    assert scene.kind is not None
    half = HALF_SIZES[scene.size] * rng.uniform(0.94, 1.06)
    half *= CAST_SCALE[scene.size] if scene.kind in cast else 1.0
    dx, dy = rng.uniform(-0.02, 0.02, 2)
    if scene.second_kind is None:
        column, row = POSITIONS[scene.position]
        reach = 0.5 - half - 0.025
        return [(1, scene.kind, scene.colour, 0.5 + column * reach + dx, 0.5 + row * reach + dy, half)]
    other = 0.16 * rng.uniform(0.9, 1.1) * (1.4 if scene.second_kind in cast else 1.0)
    half = min(half, 0.235)
    other = min(other, 0.235)
    relation = scene.relation
    if relation == "next to":
        relation = _pick(rng, ("left of", "right of"))
    gap = rng.uniform(0.0, 0.06) + half + other
    ox, oy = {
        "left of": (-gap, 0.0),
        "right of": (gap, 0.0),
        "above": (0.0, -gap - 0.02),
        "on top of": (0.0, -(half + other) * 0.9),
        "below": (0.0, gap + 0.02),
        "in front of": (rng.choice((-1, 1)) * 0.5 * other, 0.45 * other),
    }[str(relation)]
    share = other / (half + other) if relation != "in front of" else 0.5
    first = (1, scene.kind, scene.colour, 0.5 + ox * (1 - share) + dx, 0.5 + oy * (1 - share) + dy, half)
    second = (2, scene.second_kind, scene.second_colour, 0.5 - ox * share + dx, 0.5 - oy * share + dy, other)
    return [second, first]


def _through(view: View, row: list[float]) -> list[float]:
    """One part as seen through a view."""
    row = list(row)
    row[P.X], row[P.Y] = row[P.X] * view.zoom - view.left, row[P.Y] * view.zoom - view.top
    for field in (P.HX, P.HY, P.PERIOD, P.OUTLINE):
        row[field] *= view.zoom
    return row


def _pick(rng: np.random.Generator, options) -> str:
    return str(options[int(rng.integers(len(options)))])
