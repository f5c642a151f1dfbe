"""The inputs of `benchmarks.hostile`: valid data sets, fine-tunes and requests, and seeded damage to them.

An input is a function of a seed and an index, so that each can be made again. Every `CONTROL_EVERY`th is undamaged and
comes with what must be made of it.
"""

from __future__ import annotations

import base64
import json
import random
from typing import Any

from benchmarks.hostile_damage import (
    COLOURS,
    FORMATS,
    HUGE,
    IN_BYTES,
    IN_FILES,
    NAMES,
    Files,
    Input,
    Materials,
    damage,
    mask,
    pack,
    picture,
)

CONTROL_EVERY = 10
PACKINGS = ("zip", "tar", "tar.gz", "tar.xz")


def make(seed: int, index: int, materials: Materials) -> Input:
    """Input number `index` of `seed`."""
    dice = random.Random(f"{seed} {index}")
    door = dice.choice((_dataset, _dataset, _weights, _weights, _request))
    return door(dice, materials, index % CONTROL_EVERY == 0)


# What is valid ----------------------------------------------------------------------------------------------------------


def _dataset(dice: random.Random, materials: Materials, control: bool) -> Input:
    """Two to four pictures with captions in one of three forms, some with masks."""
    suffixes = [dice.choice(list(FORMATS)) for _ in range(dice.randint(2, 4))]
    files = {f"{i}.{kind}": picture(kind, COLOURS[i]) for i, kind in enumerate(suffixes)}
    captions = [
        f"a photo of TOK, {dice.choice(('outside', 'at night', 'on “ice”'))} {i}" for i in range(len(files))
    ]
    names = list(files)
    form = dice.choice(("csv", "txt", "jsonl"))
    if form == "csv":
        rows = "".join(f'{name},"{text}"\n' for name, text in zip(names, captions, strict=True))
        files["captions.csv"] = ("image_file,caption\n" + rows).encode()
    elif form == "txt":
        files |= {f"{i}.txt": text.encode() for i, text in enumerate(captions)}
    else:
        lines = [{"file_name": name, "text": text} for name, text in zip(names, captions, strict=True)]
        files["metadata.jsonl"] = "\n".join(map(json.dumps, lines)).encode()
    masked = [i for i in range(len(names)) if dice.random() < 0.3]
    files |= {f"{i}.mask.png": mask() for i in masked}
    packing = dice.choice(PACKINGS)
    made = _packed("dataset", files, packing, dice, control, materials)
    made.expected = (captions, masked) if control else None
    return made


def _weights(dice: random.Random, materials: Materials, control: bool) -> Input:
    """A fine-tune: a bare file or an archive of them."""
    embeddings = {name: materials.trained[name] for name in ("embeddings.pti", "special_params.json")}
    kind = dice.choice(("trained", "ours", "kohya", "bare ours", "bare kohya", "embeddings"))
    if kind == "trained":
        files = dict(materials.trained)
    elif kind == "embeddings":
        files = embeddings
    else:
        content = materials.ours if "ours" in kind else materials.kohya
        if kind.startswith("bare"):
            made = Input("weights", "style.safetensors", content)
            if not control:
                damage(made, dice, materials, [*IN_FILES, *IN_BYTES])
            made.expected = kind.removeprefix("bare ") if control else None
            return made
        files = {"lora.safetensors": content} | (embeddings if dice.random() < 0.3 else {})
    made = _packed("weights", files, dice.choice(PACKINGS), dice, control, materials)
    made.expected = kind if control else None
    return made


def _request(dice: random.Random, materials: Materials, control: bool) -> Input:
    """The inputs of a request, some with a picture, a mask or a fine-tune."""
    kind = dice.choice(list(FORMATS))
    made = Input("request", f"given.{kind}", picture(kind, dice.choice(COLOURS)))
    made.given = {
        "prompt": "a photo of TOK",
        "num_inference_steps": 1,
        "seed": 1,
        "disable_safety_checker": True,
    }
    made.given |= dice.choice(
        [
            {"width": 64, "height": 72},
            {"image": "FILE"},
            {"image": "FILE", "mask": "MASK"},
            {"width": 64, "height": 64, "replicate_weights": _uri(materials.ours), "lora_scale": 0.5},
        ]
    )
    if control:
        made.expected = (64, made.given["height"]) if "width" in made.given else (72, 66)
        return made
    for _ in range(dice.randint(0, 2)):
        name = dice.choice([*FIELDS])
        made.given[name] = dice.choice(FIELDS[name])
        made.damage.append(f"{name}={str(made.given[name])[:40]!r}")
    if "image" in made.given and dice.random() < 0.7:
        damage(made, dice, materials, [*IN_FILES, *IN_BYTES])
    if not made.damage:
        made.given["mask"] = "FILE"
        made.damage.append("mask is the picture")
    return made


_TEXTS = [
    "",
    " ",
    "\0",
    "TOK" * 5000,
    "<s0>" * 40,
    "a\nb\x1b[31m",
    "\ud800",
    "é" * 300,
    "((((TOK:1e99)",
    "../../x",
]
_SOURCES = [
    *("", " ", "/etc/passwd", "../../x.tar", "file:///etc/passwd", "data:", "data:,x", "data:;base64,!!", "a\0b", "/" * 5000),
    *("http://127.0.0.1:1/a", "http://[::1]/a", "http://[", "https://169.254.169.254/", "http://user:pw@localhost:1/"),
    *("x" * 5000, "data:application/x-tar;base64," + "A" * 4001, "\n", "https://", "HTTP://0x7f.1/\r\nHost: a"),
]  # fmt: skip
_INTEGERS = [*HUGE, 7.0, 7.5, 64, 72, 100, 2048, 2056, 10**400]
_OPTIONAL = [*_INTEGERS, None]
_NUMBERS = [0.0, -1.0, 1e308, -1e308, 1e-320, 0.5, 50, 2, 10**400, float("nan"), float("inf")]
_CHOICES = [*_TEXTS, "1:1", "9:21", "jpg", "DDIM", "base_image_refiner"]
_FILES = [*_SOURCES, "FILE", "MASK", None]
FIELDS: dict[str, list[Any]] = {
    **dict.fromkeys(("prompt", "negative_prompt"), _TEXTS),
    **dict.fromkeys(("num_outputs", "output_quality", "num_inference_steps"), _INTEGERS),
    **dict.fromkeys(("width", "height", "seed", "refine_steps"), _OPTIONAL),
    **dict.fromkeys(("guidance_scale", "prompt_strength", "lora_scale", "high_noise_frac"), _NUMBERS),
    **dict.fromkeys(("scheduler", "refine", "output_format", "aspect_ratio"), _CHOICES),
    "replicate_weights": _SOURCES,
    **dict.fromkeys(("image", "mask"), _FILES),
    "extra_lora": [[], [""], *([source] for source in _SOURCES), [""] * 1000],
    "extra_lora_scale": [[], [1.0], [float("nan")], [1.0] * 1000, [-1], [10**400]],
}
"""Inputs of a request, and values of their declared types that strangers may send."""


def _uri(content: bytes) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(content).decode()


# Archives ---------------------------------------------------------------------------------------------------------------


def _packed(
    door: str, files: Files, packing: str, dice: random.Random, control: bool, materials: Materials
) -> Input:
    """The archive of `files`. Unless it is a control, its files, its names or its bytes are damaged."""
    done: list[str] = []
    layers = (1, 0) if control else dice.choice(((1, 0), (1, 1), (0, 1), (2, 0), (0, 2), (1, 0)))
    for _ in range(0 if control else layers[0]):
        part = Input(door, dice.choice(list(files)), b"")
        part.content = files.pop(part.name)
        damage(part, dice, materials, [*NAMES, *IN_FILES, *IN_BYTES])
        files[part.name] = part.content
        done += [f"{one} in {part.name[:40]!r}" for one in part.damage]
    made = Input(door, f"given.{packing}", pack(files, packing), damage=done)
    for _ in range(0 if control else layers[1]):
        damage(made, dice, materials, [*IN_FILES, *IN_BYTES])
    return made
