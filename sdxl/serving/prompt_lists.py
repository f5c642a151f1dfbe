"""Many prompts: in one input, or in a file of a command line, with contact sheets of what was drawn.

Knows texts and pictures; does not know models or requests. Imports no torch.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sdxl import settings
from sdxl.data.caption_table import read_text
from sdxl.data.caption_text import one_line, require_short
from sdxl.data.contact_sheet import Row, contact_sheet
from sdxl.errors import UserInputError
from sdxl.files.archives import atomic_path
from sdxl.model.prompt_weights import parts_of

EXAMPLE_PROMPT = "a photo of TOK"
"""What is drawn if no prompt is given."""
MOST_PROMPTS = 16
"""Prompts of one request, and also the pictures of one with several prompts."""
MOST_IN_FILE = 1000
"""Prompts in a file."""
_COLUMNS, _ROWS, _SIDE = 4, 10, 256
"""Of a contact sheet: pictures in a row, rows, and the side of a picture in pixels."""


def prompts_in(text: str) -> tuple[str, ...]:
    """The prompts of the input `prompts`: one a line, or separated by |.

    Raises:
        UserInputError: there is none, there are too many, or one is too long.
    """
    prompts = tuple(filled for part in re.split(r"[\r\n|]", text) if (filled := part.strip()))
    if not prompts:
        raise UserInputError(
            "prompts contains no prompt: write some, such as 'a photo of TOK|a photo of a dog'."
        )
    if len(prompts) > MOST_PROMPTS:
        raise UserInputError(
            f"prompts has {len(prompts):,} prompts, but may have at most {MOST_PROMPTS}: give fewer, or use the command "
            "line with --prompts-file."
        )
    for prompt in prompts:
        require_short(prompt, "A prompt of prompts")
    return prompts


def runs_of_file(file: Path, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The inputs of one run for each prompt in a text file, which has one a line.

    The seed is chosen once, so that all prompts are drawn from the same noise.

    inputs: those of all runs.

    Raises:
        UserInputError: the file cannot be read or has no prompt or too many, one of them is wrong, or `inputs` have
            prompts of their own.
    """
    if inputs["prompts"] or inputs["prompt"] != EXAMPLE_PROMPT:
        raise UserInputError("--prompts-file is given together with prompt or prompts: give one of them.")
    prompts = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not 0 < len(prompts) <= MOST_IN_FILE:
        raise UserInputError(
            f"{file.name} has {len(prompts):,} prompts, but must have 1 to {MOST_IN_FILE:,}, one on each line."
        )
    for number, prompt in enumerate(prompts, start=1):
        require_short(prompt, f"Prompt {number} of {file.name}")
        parts_of(prompt, weights=inputs["prompt_weights"], name=f"Prompt {number} of {file.name}")
    shared = {**inputs, "seed": settings.resolve_seed(inputs["seed"])}
    return [{**shared, "prompt": prompt} for prompt in prompts]


def write_sheets(drawn: Sequence[tuple[Mapping[str, Any], Sequence[Path]]], folder: Path) -> list[Path]:
    """Contact sheets of all pictures with their prompts, `contact_sheet.jpg` or several with numbers; returns the files.

    drawn: the inputs and the files of each run; a run may have no files.
    """
    cells = [
        (file, one_line(f"{file.stem}: {inputs['prompt']}")) for inputs, files in drawn for file in files
    ]
    sheets = []
    for start in range(0, len(cells), _COLUMNS * _ROWS):
        number = "" if len(cells) <= _COLUMNS * _ROWS else f"-{start // (_COLUMNS * _ROWS) + 1}"
        sheets.append(folder / f"contact_sheet{number}.jpg")
        shown = cells[start : start + _COLUMNS * _ROWS]
        rows = [_row(shown[first : first + _COLUMNS]) for first in range(0, len(shown), _COLUMNS)]
        with atomic_path(sheets[-1]) as partial:
            contact_sheet(rows, side=_SIDE).save(partial, format="JPEG", quality=90)
    return sheets


def _row(cells: Sequence[tuple[Path, str]]) -> Row:
    pictures = []
    for file, _ in cells:
        with Image.open(file) as opened:
            opened.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            pictures.append(opened.convert("RGB"))
    return Row(title="", pictures=pictures, captions=[caption for _, caption in cells])
