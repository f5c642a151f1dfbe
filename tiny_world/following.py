"""Whether pictures show what their prompts ask for, by the scorer's attribute network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiny_world.scenes import Scene
from tiny_world.scorer import CREATURE, THINGS, Attributes
from tiny_world.words import COLOURS, KINDS, POSITIONS, TEXTURES

ASPECTS = ("kind", "colour", "background", "texture", "position", "relation")


def following(found: Attributes, scenes: Sequence[Scene]) -> list[dict[str, bool]]:
    """For each picture, which aspects that its scene asks for are met; aspects not asked for are absent.

    kind: every asked thing is present; a subject's name counts as a creature. colour: every asked thing has its
    colour (two of one kind: both colours lead). position: of a thing alone. relation: of two things of different
    kinds, by the centres of their boxes.
    """
    return [_one(found, i, scene) for i, scene in enumerate(scenes)]


def shares(results: Sequence[dict[str, bool]]) -> dict[str, float]:
    """Share of pictures that meet each aspect, among those asked for it; `all`: mean over pictures of the share
    of asked aspects that are met."""
    out = {}
    for aspect in ASPECTS:
        asked = [result[aspect] for result in results if aspect in result]
        if asked:
            out[aspect] = round(sum(asked) / len(asked), 4)
    out["all"] = round(sum(sum(r.values()) / len(r) for r in results) / max(len(results), 1), 4)
    return out


def _one(found: Attributes, i: int, scene: Scene) -> dict[str, bool]:
    colours = list(COLOURS)
    asked = [(k, c) for k, c in ((scene.kind, scene.colour), (scene.second_kind, scene.second_colour)) if k]
    things = [THINGS.index(kind if kind in KINDS else CREATURE) for kind, _ in asked]
    result = {
        "background": int(found.background[i].argmax()) == colours.index(scene.background),
        "texture": int(found.texture[i].argmax()) == TEXTURES.index(scene.texture),
    }
    if asked:
        result["kind"] = all(bool(found.presence[i, thing] > 0) for thing in things)
    named = [(thing, colour) for thing, (_, colour) in zip(things, asked, strict=True) if colour]
    if named:
        result["colour"] = all(
            colours.index(colour)
            in _leading(found.colour[i, thing], len({c for t, c in named if t == thing}))
            for thing, colour in named
        )
    if len(asked) == 1:
        result["position"] = int(found.position[i].argmax()) == list(POSITIONS).index(scene.position)
    elif len(set(things)) == 2:
        result["relation"] = _related(found.box[i, things[0]], found.box[i, things[1]], str(scene.relation))
    return result


def _leading(logits: Tensor, n: int) -> list[int]:
    return logits.topk(n).indices.tolist()


def _related(first: Tensor, second: Tensor, relation: str) -> bool:
    """Whether boxes (left, top, right, bottom) stand so that the first is `relation` the second."""
    dx, dy = (torch.stack([first[0] + first[2], first[1] + first[3]]) / 2).sub(
        torch.stack([second[0] + second[2], second[1] + second[3]]) / 2
    ).tolist()  # fmt: skip
    return {
        "left of": dx < -0.1,
        "right of": dx > 0.1,
        "next to": abs(dx) > 0.1,
        "above": dy < -0.1,
        "on top of": dy < -0.1,
        "below": dy > 0.1,
        "in front of": abs(dx) < 0.3 and dy > 0,
    }[relation]
