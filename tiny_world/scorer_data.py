"""The scorer's training data: rendered scenes and creatures with labels, heavily augmented."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_world.parts import pad
from tiny_world.raster import render
from tiny_world.scenes import Scene, random_scene, scene_parts
from tiny_world.scorer import CREATURE, THINGS
from tiny_world.subjects import random_shot, shot_parts, subject
from tiny_world.words import COLOURS, KINDS, POSITIONS, RELATIONS, TEXTURES

FIRST_IDENTITY = 1_000_000
"""Training identities are even seeds from here on. Lower seeds and odd seeds are never trained on."""

SHOTS = 8
"""Pictures of each training identity alone."""


class Order(NamedTuple):
    """Pictures to make: "scenes", "creatures" (SHOTS of each identity, alone) or "company" (a creature and an object)."""

    what: str
    start: int
    n: int


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of n pictures, on the pictures' device.

    presence: [n, T], 0 or 1. colour: [n, T, 12], 0 or 1. box: [n, T, 4] in 0..1, NaN unless there is exactly one.
    background, texture, position: [n]; the position is -1 unless there is one thing alone. who: [n], the identity or -1.
    """

    presence: Tensor
    colour: Tensor
    box: Tensor
    background: Tensor
    texture: Tensor
    position: Tensor
    who: Tensor

    def rows(self, index: Tensor) -> Labels:
        return Labels(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def describe(order: Order) -> tuple[np.ndarray, list[Scene], list[int]]:
    """The part table, scenes and identities of an order. Needs no torch."""
    rng = np.random.default_rng((order.start, len(order.what), 31))
    scenes, pictures, who = [], [], []
    for i in range(order.n):
        identity = -1
        if order.what == "scenes":
            scene = random_scene(rng, held=bool(rng.random() < 0.1))
            rows = scene_parts(scene, rng)
        else:
            alone = order.what == "creatures"
            identity = FIRST_IDENTITY + 2 * (order.start + (i // SHOTS if alone else i))
            scene = random_shot(CREATURE, rng) if alone else in_company(rng)
            rows = shot_parts(scene, {CREATURE: subject(identity)}, seed=int(rng.integers(1 << 30)))
        scenes.append(scene)
        pictures.append(rows)
        who.append(identity)
    return pad(pictures), scenes, who


def in_company(rng: np.random.Generator) -> Scene:
    """A creature next to, above, on, below or in front of an object, or the object in front of it."""
    shot = random_shot(CREATURE, rng)
    colours = [colour for colour in COLOURS if colour != shot.background]
    scene = replace(
        shot,
        size="medium",
        position="middle",
        second_kind=str(rng.choice(KINDS)),
        second_colour=str(rng.choice(colours)),
        relation=str(rng.choice(tuple(RELATIONS))),
    )
    if rng.random() < 0.5:
        return scene
    return replace(
        scene,
        kind=scene.second_kind,
        colour=scene.second_colour,
        second_kind=CREATURE,
        second_colour=None,
    )


def picture_bank(wanted: list[Order], workers: int, device: str) -> tuple[Tensor, Labels]:
    """Pictures uint8 [N, 3, 256, 256] and their labels, on the device."""
    images, labels = [], []
    for table, scenes, who in _described(wanted, workers):
        for at in range(0, len(table), 500):
            drawn = render(table[at : at + 500], device=device)
            images.append((drawn.images * 255).round().to(torch.uint8))
            labels.append(_labels(scenes[at : at + 500], who[at : at + 500], drawn.masks))
    merged = {f.name: torch.cat([getattr(part, f.name) for part in labels]) for f in fields(Labels)}
    return torch.cat(images), Labels(**merged)


def augment(images: Tensor) -> Tensor:
    """float [n, 3, h, h] in 0..1, each picture randomly warped, moved, blurred, made noisy and relit.

    No change is strong enough to change a label.
    """
    n, size, device = len(images), images.shape[-1], images.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, device=device) * (high - low) + low

    warp = F.interpolate(torch.randn(n, 2, 6, 6, device=device), size=(size, size), mode="bicubic")
    warp = warp * uniform(0, 0.012, n, 1, 1, 1) + uniform(-0.03, 0.03, n, 2, 1, 1)
    theta = torch.eye(2, 3, device=device).expand(n, 2, 3)
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False) + warp.permute(0, 2, 3, 1)
    x = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    for factor in (2, 4):
        soft = F.interpolate(F.avg_pool2d(x, factor), size=(size, size), mode="bilinear")
        amount = uniform(0, 1, n, 1, 1, 1) * (uniform(0, 1, n, 1, 1, 1) < 0.4 / factor * 2)
        x = torch.lerp(x, soft, amount)
    x = x + torch.randn_like(x) * uniform(0, 0.06, n, 1, 1, 1) * (uniform(0, 1, n, 1, 1, 1) < 0.5)
    blotch = F.interpolate(torch.randn(n, 3, 8, 8, device=device), size=(size, size), mode="bilinear")
    x = x + blotch * uniform(0, 0.03, n, 1, 1, 1)
    gain = uniform(0.93, 1.07, n, 1, 1, 1) * uniform(0.97, 1.03, n, 3, 1, 1)
    return (x * gain + uniform(-0.03, 0.03, n, 1, 1, 1)).clamp(0, 1)


def mask_boxes(masks: Tensor) -> Tensor:
    """Bounding boxes [n, 4] in 0..1 of masks [n, h, w]. NaN for an empty mask."""
    inside = masks > 0.5
    out = []
    for axis in (1, 2):
        line = inside.any(axis)
        size = line.shape[1]
        first = line.float().argmax(1)
        last = size - line.flip(1).float().argmax(1)
        out += [first / size, last / size]
    boxes = torch.stack([out[0], out[2], out[1], out[3]], 1)
    return torch.where(inside.flatten(1).any(1, keepdim=True), boxes, torch.nan)


def _described(wanted: list[Order], workers: int) -> Iterator[tuple[np.ndarray, list[Scene], list[int]]]:
    if not workers:
        yield from map(describe, wanted)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(describe, wanted)


def _labels(scenes: list[Scene], who: list[int], masks: Tensor) -> Labels:
    n, things, colours = len(scenes), len(THINGS), list(COLOURS)
    presence, colour = torch.zeros(n, things), torch.zeros(n, things, len(colours))
    box = torch.full((n, things, 4), torch.nan, device=masks.device)
    boxes = [mask_boxes(masks[:, layer]) for layer in range(2)]
    position = torch.full((n,), -1)
    for i, scene in enumerate(scenes):
        shown = [(scene.kind, scene.colour), (scene.second_kind, scene.second_colour)]
        for layer, (kind, name) in enumerate(shown):
            if kind is None:
                continue
            thing = THINGS.index(kind)
            presence[i, thing] = 1
            if name:
                colour[i, thing, colours.index(name)] = 1
            if scene.kind != scene.second_kind:
                box[i, thing] = boxes[layer][i]
        if scene.kind is not None and scene.second_kind is None:
            position[i] = list(POSITIONS).index(scene.position)
    device = masks.device
    return Labels(
        presence=presence.to(device),
        colour=colour.to(device),
        box=box,
        background=torch.tensor([colours.index(s.background) for s in scenes], device=device),
        texture=torch.tensor([TEXTURES.index(s.texture) for s in scenes], device=device),
        position=position.to(device),
        who=torch.tensor(who, device=device),
    )
