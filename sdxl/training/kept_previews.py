"""The previews in the state of a run, so that a run which goes on has those of before, also in another folder.

Knows files of previews, and tensors that hold their bytes; does not know when previews are drawn. A state may come from a
stranger.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdxl.history import Previews
from sdxl.training.config import MOST_PREVIEWS

_MOST_MOMENTS = 14
"""The first and the last ones are kept: 4 prompts at 1024 pixels have about 10 MB."""
_NAME = re.compile(r"previews/step-[0-9]{6,9}-[0-9]{1,3}\.jpg")
_LARGEST_SIDE = 4096


def kept(previews: Sequence[Previews]) -> list[Previews]:
    """Those of `previews` that a state holds."""
    return [*previews[:1], *previews[1:][1 - _MOST_MOMENTS :]]


def as_tensors(previews: Sequence[Previews], folder: Path) -> dict[str, Tensor]:
    """The files that `kept` leaves, relative to `folder`: name → bytes. Files that are gone are left out."""
    return {
        name: torch.from_numpy(np.fromfile(folder / name, dtype=np.uint8))
        for one in kept(previews)
        for name in one.pictures
        if (folder / name).is_file()
    }


def as_json(previews: Sequence[Previews]) -> list[dict[str, Any]]:
    """What a state tells beside the files."""
    return [asdict(one) for one in kept(previews)]


def restored(told: Sequence[Mapping[str, Any]], files: Mapping[str, Tensor], folder: Path) -> list[Previews]:
    """Write into `folder` the files that `as_tensors` made, and return the previews that `as_json` told.

    Moments without all their files are left out.

    Raises:
        TypeError, ValueError: it is not what they make.
    """
    found = [Previews(**one) for one in told]
    for one in found:
        scores = [score for score in (one.likeness, one.prompt_shown) if score is not None]
        if (
            type(one.step) is not int
            or len(one.pictures) > MOST_PREVIEWS
            or not all(map(math.isfinite, scores))
        ):
            raise ValueError("previews are not what they should be")
        if not all(_NAME.fullmatch(name) for name in one.pictures):
            raise ValueError("a preview has another name")
    whole = kept([one for one in found if one.pictures and all(name in files for name in one.pictures)])
    for name in (name for one in whole for name in one.pictures):
        content = files[name].numpy().tobytes()
        _require_picture(content)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return whole


def _require_picture(content: bytes) -> None:
    """Raise ValueError if `content` is no JPEG of a preview's size."""
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as picture:
            if max(picture.size) > _LARGEST_SIDE:
                raise ValueError("a preview is too large")
            picture.load()
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError("a preview is no picture") from error
