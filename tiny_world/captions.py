"""True captions of scenes in varied wording. A caption may omit an attribute but never misnames one."""

from __future__ import annotations

import numpy as np

from tiny_world.scenes import Scene, random_scene
from tiny_world.words import BACKGROUND_LINKS, KINDS, LEADS, RELATIONS, TEXTURE_NOUNS, TOYS, places


def caption(scene: Scene, rng: np.random.Generator, *, full: bool = False) -> str:
    """A caption of the scene. With `full` it always names colour, place, background and texture.

    About half of the captions name the size. Captions of two things never do.
    """
    if scene.kind is None:
        return _empty(scene, rng)
    thing = _thing(scene.kind, scene.colour, scene.size if scene.relation is None else None, rng, full=full)
    if scene.relation is not None:
        phrase = _pick(rng, RELATIONS[scene.relation])
        assert scene.second_kind is not None
        thing = f"{thing} {phrase} {_thing(scene.second_kind, scene.second_colour, None, rng, full=full)}"
    elif not full and rng.random() < 0.05:
        return thing
    lead = f"{_pick(rng, LEADS)} " if rng.random() < 0.4 else ""
    place = ""
    if scene.relation is None and (full or rng.random() < 0.7):
        place = " " + _pick(rng, places(scene.position))
    if not full and rng.random() < 0.08:
        return f"{lead}{thing}{place}"
    background = _background(scene, rng, full=full, name_plain=full)
    if not lead and rng.random() < 0.12:
        return f"{background[0]} with {thing}{place}"
    if rng.random() < 0.08:
        return f"{lead}{thing}{place} , {background[0]}".replace(" ,", ",")
    return f"{lead}{thing}{place} {background[1]}"


def held_out_prompts(n: int, seed: int) -> list[tuple[str, Scene]]:
    """n pairs (prompt, scene) of combinations that the pretraining never shows. The prompts name every attribute except
    the size."""
    rng = np.random.default_rng((seed, 77))
    scenes = [random_scene(rng, held=True, pairs=0.15) for _ in range(n)]
    return [(caption(scene, rng, full=True), scene) for scene in scenes]


def _thing(kind: str, colour: str | None, size: str | None, rng: np.random.Generator, *, full: bool) -> str:
    """A noun phrase with its article. A subject's name has no article, unless its size is named."""
    named = kind not in KINDS + TOYS
    words = []
    share = {"small": 0.65, "medium": 0.2, "large": 0.65}.get(size or "", 0.0) * (0.3 if named else 1.0)
    if size and rng.random() < share:
        words.append(size)
    if colour and (full or rng.random() < 0.92):
        words.append(colour)
    words.append(kind)
    if named and len(words) == 1:
        return kind
    return f"{'an' if words[0][0] in 'aeio' else 'a'} {' '.join(words)}"


def _background(
    scene: Scene, rng: np.random.Generator, *, full: bool, name_plain: bool = False
) -> tuple[str, str]:
    """The background as a noun phrase without article, and as an adverbial phrase."""
    colour = scene.background if full or scene.texture == "plain" or rng.random() < 0.92 else ""
    texture = scene.texture if full or not colour or rng.random() < 0.88 else ""
    if texture == "plain" and rng.random() < 0.75 and not name_plain:
        texture = ""
    link = _pick(rng, BACKGROUND_LINKS)
    if texture in TEXTURE_NOUNS and colour and rng.random() < 0.2:
        nouns = TEXTURE_NOUNS[texture]
        if rng.random() < 0.4:
            return f"{colour} {nouns}", f"on {colour} {nouns}"
        return f"{colour} background with {nouns}", f"on {_article(colour)} background with {nouns}"
    words = [w for w in (colour, texture) if w]
    if len(words) == 2 and rng.random() < (1.0 if texture == "plain" else 0.25):
        words.reverse()
    words.append("background")
    return " ".join(words), f"{link} {_article(' '.join(words))}"


def _empty(scene: Scene, rng: np.random.Generator) -> str:
    noun, _ = _background(scene, rng, full=True)
    if rng.random() < 0.3:
        return noun
    if rng.random() < 0.3:
        return f"{_pick(rng, LEADS)} {_article(noun)}"
    return f"an empty {noun}" if rng.random() < 0.7 else _article(noun)


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeio' else 'a'} {phrase}"


def _pick(rng: np.random.Generator, options) -> str:
    return str(options[int(rng.integers(len(options)))])
