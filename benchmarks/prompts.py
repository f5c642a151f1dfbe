"""Training pictures and prompts of the quality benchmark, in the style of DreamBench: data, no models."""

from __future__ import annotations

from dataclasses import replace

from tiny_world.captions import held_out_prompts
from tiny_world.scenes import Scene

NAME = "TOK"
KNOWN = "mushroom"
"""An object that the base knows. It replaces the subject to measure how well the base itself follows prompts."""


def _scene(position: str, background: str, texture: str = "plain", size: str = "medium", **second) -> Scene:
    return Scene(
        kind=NAME,
        colour=None,
        size=size,
        position=position,
        background=background,
        texture=texture,
        **second,
    )


_TRAINING = [
    ("a photo of {} in the middle on a plain purple background", _scene("middle", "purple", size="large")),
    ("a photo of {} on the left on a cyan striped background", _scene("left", "cyan", "striped")),
    (
        "a small {} in the bottom left on a plain orange background",
        _scene("bottom left", "orange", size="small"),
    ),
    (
        "a photo of {} at the top on a green dotted background",
        _scene("top", "green", "dotted"),
    ),
    (
        "a photo of {} right of a yellow tree on a purple checkered background",
        _scene(
            "middle", "purple", "checkered", second_kind="tree", second_colour="yellow", relation="right of"
        ),
    ),
    (
        "a photo of {} in the middle on a pink gradient background",
        _scene("middle", "pink", "gradient", size="large"),
    ),
]
TRAINING = [scene for _, scene in _TRAINING]
"""Six pictures of the subject, as people take them: two close up, three from further away, one with another object."""
_MORE_TRAINING = [
    ("a photo of {} on the right on a plain white background", _scene("right", "white")),
    ("a photo of {} in the middle on a gray dotted background", _scene("middle", "gray", "dotted")),
    ("a photo of {} at the bottom on a yellow gradient background", _scene("bottom", "yellow", "gradient")),
    ("a small {} in the top right on a plain brown background", _scene("top right", "brown", size="small")),
    (
        "a photo of {} left of a blue cup on a plain green background",
        _scene("middle", "green", second_kind="cup", second_colour="blue", relation="left of"),
    ),
    (
        "a photo of {} in the middle on a red checkered background",
        _scene("middle", "red", "checkered", size="large"),
    ),
]
MOST_PICTURES = len(_TRAINING) + len(_MORE_TRAINING)
"""How many pictures of a subject there are to learn from."""

_SUBJECT = [
    ("a photo of {} in the middle on a plain red background", _scene("middle", "red")),
    ("a photo of {} in the middle on a blue striped background", _scene("middle", "blue", "striped")),
    ("a photo of {} on the left on a yellow dotted background", _scene("left", "yellow", "dotted")),
    ("a photo of {} on the right on a plain gray background", _scene("right", "gray")),
    ("a small {} in the top left on a plain green background", _scene("top left", "green", size="small")),
    (
        "a small {} in the bottom right on a plain cyan background",
        _scene("bottom right", "cyan", size="small"),
    ),
    ("a photo of {} in the middle on a brown checkered background", _scene("middle", "brown", "checkered")),
    ("a photo of {} at the bottom on a purple gradient background", _scene("bottom", "purple", "gradient")),
    (
        "a photo of {} left of a red house on a plain white background",
        _scene("middle", "white", second_kind="house", second_colour="red", relation="left of"),
    ),
    (
        "a photo of {} on top of a blue car on a plain pink background",
        _scene("middle", "pink", second_kind="car", second_colour="blue", relation="on top of"),
    ),
]


def training_scenes(count: int = len(_TRAINING)) -> list[Scene]:
    """The scenes of the first `count` training pictures, 1 to `MOST_PICTURES`. Six are `TRAINING`."""
    return [scene for _, scene in (_TRAINING + _MORE_TRAINING)[:count]]


def training_captions(called: str = NAME, count: int = len(_TRAINING)) -> list[str]:
    """One caption for each of `training_scenes`."""
    return [text.format(called) for text, _ in (_TRAINING + _MORE_TRAINING)[:count]]


def subject_prompts(called: str = NAME) -> list[tuple[str, Scene]]:
    """Prompts that name the subject, each with the scene it asks for."""
    return [(text.format(called), scene) for text, scene in _SUBJECT]


def known_prompts() -> list[tuple[str, Scene]]:
    """The same prompts with an object that the base knows instead of the subject."""
    return [
        (text.format(f"a {KNOWN}").replace("a small a ", "a small "), replace(scene, kind=KNOWN))
        for text, scene in _SUBJECT
    ]


def prior_prompts(n: int = 10) -> list[tuple[str, Scene]]:
    """Prompts without the subject, each about one held-out object."""
    return [pair for pair in held_out_prompts(4 * n, seed=9) if pair[1].second_kind is None][:n]


DIVERSITY_PROMPT = "a photo of a house"
