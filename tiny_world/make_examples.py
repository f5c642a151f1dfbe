"""`python -m tiny_world.make_examples`: write the example data sets. The bytes are always the same.

- `crowny.zip`: one subject with captions, named TOK;
- `doggo_robo.zip`: two subjects, named DOGGO_TOK and ROBO_TOK, alone and together;
- `bunny.zip`: one subject without captions;
- `crowny/`: the pictures and captions of `crowny.zip` as a folder;
- `crowny_1024.zip`: the subject of `crowny.zip` at SDXL's size in more varied scenes.
"""

from __future__ import annotations

import argparse
import csv
import io
import zipfile
from pathlib import Path

from tiny_world.creatures import Subject
from tiny_world.parts import pad
from tiny_world.raster import render
from tiny_world.scenes import Scene
from tiny_world.sheets import to_pil
from tiny_world.subjects import shot_parts, subject
from tiny_world.words import RELATIONS, places

CROWNY, DOGGO, ROBO, BUNNY = 148, 20, 202, 234
"""Identity seeds, all even."""


def main() -> None:
    """Write the archives into a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m tiny_world.make_examples", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=Path("example_datasets"))
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in archives().items():
        (folder / name).write_bytes(data)
    (folder / "crowny").mkdir(exist_ok=True)
    for name, data in _files(_alone("TOK"), {"TOK": subject(CROWNY)}, seed=148, captions=True).items():
        (folder / "crowny" / name).write_bytes(data)


def archives() -> dict[str, bytes]:
    """File name -> bytes of each archive."""
    pair = {"DOGGO_TOK": subject(DOGGO), "ROBO_TOK": subject(ROBO)}
    together = [
        _shot("DOGGO_TOK", "middle", "yellow", "plain", second="ROBO_TOK", relation="left of"),
        _shot("ROBO_TOK", "middle", "pink", "dotted", second="DOGGO_TOK", relation="left of"),
    ]
    return {
        "crowny.zip": _archive(_alone("TOK"), {"TOK": subject(CROWNY)}, seed=148, captions=True),
        "doggo_robo.zip": _archive(
            _alone("DOGGO_TOK")[:3] + _alone("ROBO_TOK")[3:6] + together, pair, seed=210, captions=True
        ),
        "bunny.zip": _archive(_alone("TOK")[:6], {"TOK": subject(BUNNY)}, seed=234, captions=False),
        "crowny_1024.zip": _archive(
            _varied("TOK"), {"TOK": subject(CROWNY)}, seed=1024, captions=True, side=1024
        ),
    }


def describe(scene: Scene) -> str:
    """The caption of an example: who, where, and on which background."""
    second = f"a {scene.second_colour} {scene.second_kind}" if scene.second_colour else scene.second_kind
    second = (second or "").replace("a orange", "an orange")
    where = f"{RELATIONS[scene.relation][0]} {second}" if scene.relation else places(scene.position)[0]
    texture = "" if scene.texture == "plain" else f"{scene.texture} "
    article = "an" if scene.background[0] in "aeio" else "a"
    return f"a photo of {scene.kind} {where} on {article} {scene.background} {texture}background"


def _alone(name: str) -> list[Scene]:
    return [
        _shot(name, "middle", "white", "plain", size="large"),
        _shot(name, "left", "cyan", "striped"),
        _shot(name, "middle", "green", "dotted", size="large"),
        _shot(name, "right", "orange", "plain"),
        _shot(name, "bottom", "purple", "checkered"),
        _shot(name, "middle", "pink", "gradient", size="large"),
        _shot(name, "top left", "gray", "plain"),
        _shot(name, "bottom right", "yellow", "striped"),
    ]


def _varied(name: str) -> list[Scene]:
    return [
        _shot(name, "middle", "cyan", "gradient", size="large"),
        _shot(name, "middle", "white", "plain", second="house", colour="red", relation="left of"),
        _shot(name, "bottom left", "orange", "dotted", size="small"),
        _shot(name, "middle", "green", "plain", second="tree", colour="brown", relation="right of"),
        _shot(name, "right", "yellow", "checkered"),
        _shot(name, "middle", "pink", "plain", second="car", colour="blue", relation="on top of"),
        _shot(name, "middle", "purple", "striped", size="large"),
        _shot(name, "middle", "gray", "gradient", second="fish", colour="orange", relation="next to"),
    ]


def _shot(
    name: str,
    position: str,
    background: str,
    texture: str,
    *,
    size: str = "medium",
    second: str | None = None,
    colour: str | None = None,
    relation: str | None = None,
) -> Scene:
    return Scene(
        kind=name,
        colour=None,
        size=size,
        position=position,
        background=background,
        texture=texture,
        second_kind=second,
        second_colour=colour,
        relation=relation,
    )


def _files(
    scenes: list[Scene], cast: dict[str, Subject], *, seed: int, captions: bool, side: int = 256
) -> dict[str, bytes]:
    """0.png, 1.png, ... of `side` pixels, and captions.csv."""
    files: dict[str, bytes] = {}
    for i, scene in enumerate(scenes):
        buffer = io.BytesIO()
        picture = render(pad([shot_parts(scene, cast, seed * 1000 + i)]), size=side).images[0]
        to_pil(picture).save(buffer, format="PNG", optimize=side > 256)
        files[f"{i}.png"] = buffer.getvalue()
    if captions:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("image_file", "caption"))
        writer.writerows((f"{i}.png", describe(scene)) for i, scene in enumerate(scenes))
        files["captions.csv"] = text.getvalue().encode()
    return files


def _archive(
    scenes: list[Scene], cast: dict[str, Subject], *, seed: int, captions: bool, side: int = 256
) -> bytes:
    """A zip of the files, with fixed dates."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in _files(scenes, cast, seed=seed, captions=captions, side=side).items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return out.getvalue()


if __name__ == "__main__":
    main()
