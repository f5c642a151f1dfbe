"""`python -m tiny_world.make_examples`: write the example data sets, always the same bytes.

- `crowny.zip`: one subject with captions, named TOK;
- `doggo_robo.zip`: two subjects, named DOGGO_TOK and ROBO_TOK, alone and together;
- `bunny.zip`: one subject, pictures only.
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
    }


def describe(scene: Scene) -> str:
    """The caption of an example: who, where, and on which background."""
    where = (
        f"{RELATIONS[scene.relation][0]} {scene.second_kind}" if scene.relation else places(scene.position)[0]
    )
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


def _shot(
    name: str,
    position: str,
    background: str,
    texture: str,
    *,
    size: str = "medium",
    second: str | None = None,
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
        relation=relation,
    )


def _archive(scenes: list[Scene], cast: dict[str, Subject], *, seed: int, captions: bool) -> bytes:
    """A zip of 0.png, 1.png, ... and captions.csv, with fixed dates."""
    table = pad([shot_parts(scene, cast, seed * 1000 + i) for i, scene in enumerate(scenes)])
    files: dict[str, bytes] = {}
    for i, image in enumerate(render(table).images):
        buffer = io.BytesIO()
        to_pil(image).save(buffer, format="PNG")
        files[f"{i}.png"] = buffer.getvalue()
    if captions:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("image_file", "caption"))
        writer.writerows((f"{i}.png", describe(scene)) for i, scene in enumerate(scenes))
        files["captions.csv"] = text.getvalue().encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return out.getvalue()


if __name__ == "__main__":
    main()
