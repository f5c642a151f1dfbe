"""Subjects: articulated creatures and toys in any pose on any background, one identity for each integer seed.

The pretraining never shows them. Even seeds are for development, odd seeds for judging.
"""

from __future__ import annotations

import colorsys

import numpy as np

from tiny_world.creatures import INK, Pose, Subject, draw_subject
from tiny_world.parts import Rgb
from tiny_world.scenes import Scene, scene_parts
from tiny_world.words import COLOURS, POSITIONS, TEXTURES

BUILDS = ("biped", "blob", "robot", "walker")


def subject(seed: int) -> Subject:
    """The identity of a seed. Colours, build and accessories are independent of each other."""
    rng = np.random.default_rng((seed, 4242))
    hue = rng.random()
    skin = _hsv(hue, rng.uniform(0.45, 0.85), rng.uniform(0.62, 0.95))
    if rng.random() < 0.15:
        skin = _hsv(hue, rng.uniform(0.0, 0.12), rng.uniform(0.35, 0.92))
    second = _hsv(hue + rng.uniform(0.25, 0.75), rng.uniform(0.4, 0.85), rng.uniform(0.6, 0.97))
    build = str(rng.choice(BUILDS))
    robot = build == "robot"
    round_shapes = ("box", "tall box") if robot else ("ellipse", "pear", "round box", "ellipse")
    return Subject(
        build=build,
        skin=skin,
        second=second,
        accent=_hsv(rng.random(), rng.uniform(0.7, 0.95), rng.uniform(0.7, 0.97)),
        body=(rng.uniform(0.36, 0.5), rng.uniform(0.38, 0.48)),
        head=(rng.uniform(0.4, 0.54), rng.uniform(0.34, 0.44)),
        body_shape=str(rng.choice(round_shapes)),
        head_shape=str(
            rng.choice(("box", "tall box", "hexagon") if robot else ("ellipse", "round box", "ellipse"))
        ),
        body_pattern=str(rng.choice(("none", "none", "stripes", "spots"))),
        belly=bool(rng.random() < 0.5),
        ears=str(
            rng.choice(("antenna", "bolts", "none", "two antennae"))
            if robot
            else rng.choice(("pointed", "round", "long", "floppy", "horns", "two antennae", "none"))
        ),
        ear_size=rng.uniform(0.8, 1.15),
        eyes=int(rng.choice((1, 2, 2, 2, 2, 3))),
        eye_size=rng.uniform(0.12, 0.17),
        eye_style=str(rng.choice(("white", "white", "dot"))),
        iris=_hsv(rng.random(), 0.8, 0.5) if rng.random() < 0.5 else INK,
        mouth=str(rng.choice(("smile", "open", "snout", "beak", "teeth", "line"))),
        cheeks=bool(rng.random() < 0.35) and not robot,
        limb=rng.uniform(0.075, 0.11),
        feet=str(rng.choice(("shoes", "paws", "none"))),
        tail=str(rng.choice(("none", "curl", "thick", "puff"))) if not robot else "none",
        wings=bool(rng.random() < 0.22),
        hat=str(rng.choice(("none", "none", "top hat", "cone", "cap", "bow", "crown", "flower"))),
        neck=str(rng.choice(("none", "none", "scarf", "bow tie", "collar"))),
    )


def random_pose(rng: np.random.Generator) -> Pose:
    """A natural pose; never mirrored."""
    return Pose(
        arm_left=-rng.uniform(0.2, 2.3),
        arm_right=rng.uniform(0.2, 2.3),
        legs=rng.uniform(0.0, 0.4),
        tilt=rng.uniform(-0.18, 0.18),
        lean=rng.uniform(-0.14, 0.14),
        gaze=(rng.uniform(-1, 1), rng.uniform(-0.6, 0.8)),
        tail=rng.uniform(-0.3, 0.3),
    )


def random_tint(rng: np.random.Generator) -> Rgb:
    """Mild light: brightness within 8 %, warmth within 4 %."""
    bright, warm = rng.uniform(0.92, 1.06), rng.uniform(-0.04, 0.04)
    return bright * (1 + warm), bright, bright * (1 - warm)


def random_shot(name: str, rng: np.random.Generator, *, second: str | None = None) -> Scene:
    """A random scene of a subject, alone or next to another one, on any background."""
    sizes = ("small", "medium", "large")
    return Scene(
        kind=name,
        colour=None,
        size=str(rng.choice(sizes, p=(0.2, 0.4, 0.4))) if second is None else "medium",
        position="middle" if second or rng.random() < 0.3 else str(rng.choice(tuple(POSITIONS))),
        background=str(rng.choice(tuple(COLOURS))),
        texture=str(rng.choice(TEXTURES)),
        second_kind=second,
        relation=str(rng.choice(("left of", "right of", "next to"))) if second else None,
    )


def shot_parts(scene: Scene, cast: dict[str, Subject], seed: int) -> list[list[float]]:
    """The parts of a scene with subjects; cast: name → subject. Pose, light and jitter come from `seed`."""
    rng = np.random.default_rng((seed, 99))
    draws = {
        name: (lambda frame, rng, who=who: draw_subject(frame, who, random_pose(rng)))
        for name, who in cast.items()
    }
    return scene_parts(scene, rng, cast=draws, tint=random_tint(rng))


def _hsv(h: float, s: float, v: float) -> Rgb:
    return colorsys.hsv_to_rgb(h % 1.0, s, v)
