"""Do pictures show what their prompts ask for? The scorer's attribute network decides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiny_world.scenes import Scene
from tiny_world.scorer import CREATURE, THINGS, Attributes
from tiny_world.words import COLOURS, KINDS, POSITIONS, TEXTURES

ASPECTS = ("kind", "colour", "background", "texture", "position", "relation")


def following(found: Attributes, scenes: Sequence[Scene]) -> list[dict[str, bool]]:
    """For each picture, aspect → whether it is right. Only aspects that the scene asks for are there.

    kind: every thing is present; a subject's name counts as a creature. colour: every thing has its colour; for two
    things of one kind, both colours lead. position: that of a thing alone. relation: that of two things of different
    kinds, by the centres of their boxes.
    """
    return [_one(found, i, scene) for i, scene in enumerate(scenes)]


def shares(results: Sequence[dict[str, bool]]) -> dict[str, float]:
    """The share of pictures with the right aspect, among the pictures that have to show it.

    `all` is the mean over pictures of their share of right aspects.
    """
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
    """Whether the first box is `relation` the second; boxes: (left, top, right, bottom)."""
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
