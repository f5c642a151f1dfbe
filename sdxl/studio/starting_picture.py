"""The picture that a drawing starts from, and what was painted over it.

Knows pixels; does not know the page, or how a picture is drawn.
"""

from pathlib import Path
from typing import Any

from PIL import Image

from sdxl.data.picture_reader import read_image
from sdxl.studio.crops import painted_in

_LONGEST = 2048
"""Pixels of the longer side; more is not drawn anyway."""


def opened(path: Path) -> Image.Image:
    """The picture in a file, upright and at most `_LONGEST` pixels long.

    Raises:
        UserInputError: it is no picture, or too large.
    """
    picture = read_image(path, at_least=(_LONGEST, _LONGEST))[0]
    picture.thumbnail((_LONGEST, _LONGEST))
    return picture


def in_editor(value: dict[str, Any] | None) -> Image.Image | None:
    """The picture in an editor; None if there is none."""
    background: Image.Image | None = (value or {}).get("background")
    return None if background is None or background.getbbox() is None else background


def inputs_for(value: dict[str, Any] | None, change: float, folder: Path) -> dict[str, Any]:
    """The inputs of `predict` for what an editor holds; none if it holds no picture. Files go into `folder`.

    value: "background" and "layers", as pictures. change: how much to change, 0 to 1.
    """
    background = in_editor(value)
    if value is None or background is None:
        return {}
    picture = folder / "start.png"
    background.convert("RGB").save(picture)
    given: dict[str, Any] = {"image": str(picture), "prompt_strength": change}
    painted = painted_in(value["layers"]) if value.get("layers") else None
    if painted is not None and painted.getbbox() is not None:
        painted.save(folder / "mask.png")
        given |= {"mask": str(folder / "mask.png"), "mask_blur": 4}
    return given
