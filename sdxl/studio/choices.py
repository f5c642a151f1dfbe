"""What a person chooses for a training, as inputs of `train`, and what it will take.

Knows names of inputs and figures that were measured; does not know how they are asked for or what they do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl import miniature
from sdxl.errors import UserInputError
from sdxl.report.overview import duration
from sdxl.studio.projects import STYLE, About

Resolve = Callable[[Mapping[str, str], int, int], dict[str, Any]]
"""The settings that inputs of `train` become, from texts by name, the number of pictures and their size in pixels."""

SMALLEST_REAL_BASE = 512
"""Pixels; a base made for smaller pictures is a miniature."""
_MINIATURE_STEPS = {"quick": 120, "good": miniature.STEPS, "patient": 500}
_SECONDS = {"quick": 0.17, "good": 0.2, "patient": 0.25, "whole": 0.25, "miniature": 0.45}
"""Of a step: of a LoRA or the whole UNet at 1024 pixels, batch 4, on an H100; and of the miniature on two CPU cores."""
_SECONDS_AROUND = 60
"""Before and after the steps: loading, previews, packing."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a person chose."""

    preset: str = "good"
    whole_unet: bool = False
    save_memory: bool = False
    """One picture at a time, for GPUs of 12 to 24 GB."""
    steps: int | None = None
    rank: int | None = None
    previews: str = ""
    """Prompts, one a line; empty: made from the captions."""
    more: str = ""
    """Further inputs of `train`, one name=value a line. They win over all others."""

    def inputs(self, about: About, side: int) -> dict[str, Any]:
        """The inputs of `train`, apart from the archive. side: of the pictures, in pixels.

        Raises:
            UserInputError: a line of `more` is no input, or names a file.
        """
        given: dict[str, Any] = {"token_map": token_map(about), "preset": self.preset}
        if side < SMALLEST_REAL_BASE:
            given |= miniature.TRAINING | {"max_train_steps": _MINIATURE_STEPS[self.preset]}
        if about.kind and about.kind != STYLE and about.kind.isascii() and about.kind.isalpha():
            given["token_init"] = f"{about.word}:{about.kind}"
        if about.kind == STYLE:
            given["caption_dropout"] = 0.1
        if self.whole_unet:
            given = {name: value for name, value in given.items() if not name.startswith("lora_")}
            given["is_lora"] = False
        if self.save_memory:
            given["train_batch_size"] = 1
        if self.steps:
            given["max_train_steps"] = int(self.steps)
        if self.rank and not self.whole_unet:
            given["lora_rank"] = int(self.rank)
        if self.previews.strip():
            given["preview_prompts"] = "|".join(
                line.strip() for line in self.previews.splitlines() if line.strip()
            )
        more = _parsed(self.more)
        if "preservation" in more:
            given.pop("preservation_prompts", None)  # of the miniature; without preservation it has no effect
        return given | more


def token_map(about: About) -> str:
    """The word of the captions, as an input of `train`."""
    return f"{about.word}:2"


def _parsed(lines: str) -> dict[str, str]:
    """The inputs in lines of name=value."""
    given = {}
    for line in filter(None, map(str.strip, lines.splitlines())):
        name, equals, value = line.partition("=")
        if not equals or not name.strip().isidentifier():
            raise UserInputError(f"“{line[:60]}” is not a setting: write one name=value in each line.")
        if name.strip() == "input_images" or value.strip().startswith("@"):
            raise UserInputError(f"“{line[:60]}” names a file: the studio gives the files itself.")
        given[name.strip()] = value.strip()
    return given


def as_texts(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Inputs as a command line writes them."""
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in inputs.items()
    }


def forecast(resolved: Mapping[str, Any], measured: float | None, *, has_gpu: bool) -> str:
    """Sentences on the time and memory that a training will take.

    resolved: its settings. measured: seconds of a step of the last such training here; None: there was none.
    """
    steps = resolved["max_train_steps"]
    if measured is not None:
        took = f"about {duration(steps * measured + _SECONDS_AROUND)}, going by your last training"
    elif resolved["resolution"] < SMALLEST_REAL_BASE:
        took = f"about {duration(steps * _SECONDS['miniature'] + _SECONDS_AROUND)} on two processor cores"
    elif has_gpu:
        kind = resolved["preset"] if resolved["is_lora"] else "whole"
        pictures = resolved["train_batch_size"] / 4
        took = (
            f"about {duration(steps * _SECONDS[kind] * pictures + _SECONDS_AROUND)} on an H100, and several times as long on "
            "a smaller card"
        )
    else:
        took = "days, because this computer has no NVIDIA GPU: use one that has, or try the miniature first"
    return f"{steps} steps: {took}. {_memory(resolved)}"


def _memory(resolved: Mapping[str, Any]) -> str:
    if resolved["resolution"] < SMALLEST_REAL_BASE:
        return "It needs 2 GB of memory, and no GPU."
    small = resolved["train_batch_size"] == 1
    if resolved["is_lora"]:
        return "It needs 12 GB of GPU memory." if small else "It needs 25 to 30 GB of GPU memory."
    return "It needs 24 GB of GPU memory." if small else "It needs 58 GB of GPU memory."


def gpu_is_here() -> bool:
    """Whether this machine seems to have an NVIDIA GPU."""
    return Path("/dev/nvidiactl").exists()
