"""The pretraining's data: part tables, token ids and time ids, made by many processes without torch."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from tiny_world.captions import caption
from tiny_world.figures import draw_toy, figure_parts
from tiny_world.parts import pad
from tiny_world.scenes import Draw, Scene, View, random_scene, scene_parts, toy_scene
from tiny_world.tokens import END, encode_words, vocabulary
from tiny_world.words import TOYS

CAPTIONS = 4
"""Captions of each scene, in different wording."""


class Chunk(NamedTuple):
    """The data of n pictures.

    table: [n, P, FIELDS]. ids: uint16 [n, CAPTIONS, 77], padded with <|endoftext|> and empty for figures.
    time_ids: float32 [n, 6], the original height and width, crop top and left, target height and width.
    size: pixels to render at.
    """

    table: np.ndarray
    ids: np.ndarray
    time_ids: np.ndarray
    size: int


class Order(NamedTuple):
    """A chunk to make.

    what: "scenes", "toys" for scenes with figures, or "figures". n: number of pictures. how: "whole", "crop" or
    "coarse".
    """

    what: str
    seed: int
    n: int
    how: str = "whole"


def orders(what: str, total: int, *, seed: int, chunk: int = 1000) -> list[Order]:
    """Orders of `total` pictures. Of chunks with captions, every tenth is cropped and every tenth coarse (192 pixels)."""
    how = {3: "crop", 7: "coarse"} if what != "figures" else {}
    starts = range(0, total, chunk)
    return [
        Order(what, seed + i, min(chunk, total - s), how.get(i % 10, "whole")) for i, s in enumerate(starts)
    ]


def make(order: Order) -> Chunk:
    """Make one chunk."""
    rng = np.random.default_rng((order.seed, len(order.what)))
    if order.what == "figures":
        table = pad([figure_parts(rng) for _ in range(order.n)])
        return Chunk(table, np.zeros((0, CAPTIONS, 77), np.uint16), np.zeros((0, 6), np.float32), 256)
    end = vocabulary()[END]
    pictures, ids, times = [], [], []
    size = 192 if order.how == "coarse" else 256
    for _ in range(order.n):
        scene = toy_scene(rng) if order.what == "toys" else random_scene(rng)
        view, time = View(), (size, size, 0, 0, 256, 256)
        if order.how == "crop":
            top, left = (int(v) for v in rng.integers(0, 65, 2))
            view, time = View(320 / 256, left / 256, top / 256), (320, 320, top, left, 256, 256)
        pictures.append(scene_parts(scene, rng, view=view, cast=_toys(scene)))
        ids.append([encode_words(caption(scene, rng), end) for _ in range(CAPTIONS)])
        times.append(time)
    return Chunk(pad(pictures), np.asarray(ids), np.asarray(times, np.float32), size)


def _toys(scene: Scene) -> dict[str, Draw]:
    """How to draw the scene's toys: a new figure every time."""
    things = {scene.kind: scene.colour, scene.second_kind: scene.second_colour}
    return {kind: partial(draw_toy, colours=colours) for kind, colours in things.items() if kind in TOYS}


def make_all(wanted: list[Order], workers: int) -> Iterator[Chunk]:
    """Yield the chunks in order, made by `workers` processes. 0 makes them in this process."""
    if not workers:
        yield from map(make, wanted)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(make, wanted)
