"""What happened in a training: numbers of the steps, checks of the fine-tune, previews, and which moment was chosen.

Knows how that is written as JSON; does not know how a training works or who reads it.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

FILE = "history.json"


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step did."""

    step: int
    """Counted from 1."""
    loss: float
    learning_rate: float
    ti_learning_rate: float
    """Of the token rows; 0 after the pivot."""
    seconds: float
    """Since the first step began."""
    memory_gib: float = 0.0
    """Peak GPU memory so far; 0 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """How good the fine-tune of one moment is."""

    step: int
    """After so many steps; 0 is the base."""
    strength: float
    """Factor of the change of the weights."""
    held_out: dict[str, float]
    """Band of noise ("low", "middle", "high") → loss on what was kept out, divided by the base's."""
    followed: float
    """How much of the base's answer to another text is left when the text names the new token, 0 to 1."""
    drift: float
    """How far predictions for other texts have moved, as a share of what the text itself changes in them."""
    score: float
    """What the choice compares. Higher is better."""


@dataclass(frozen=True, kw_only=True)
class Previews:
    """Pictures of one moment, one for each of the history's prompts."""

    step: int
    pictures: list[str]
    """Files, relative to the history's folder."""
    likeness: float | None = None
    """How like the training pictures those that name a new token are: the mean cosine of DINOv2's vectors. None: not known."""
    prompt_shown: float | None = None
    """How well these show their prompts: the mean cosine of CLIP's vectors of picture and text. None: not known."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which moment is handed over."""

    step: int
    strength: float
    reason: str
    """One sentence for people."""


@dataclass(kw_only=True)
class History:
    """All of one training."""

    steps: list[Step] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    """What the previews show. The last names no new token, so its picture should not change."""
    previews: list[Previews] = field(default_factory=list)
    likeness_among_pictures: float | None = None
    """How like each other the training pictures are, on the scale of the previews' likeness. None: not known."""
    choice: Choice | None = None
    watched_seconds: float = 0.0
    """What the checks and the previews took."""

    def write(self, folder: Path) -> None:
        """Write the history as `FILE` into `folder`."""
        part = folder / f".{FILE}.partial"
        part.write_text(json.dumps(asdict(self)))
        part.replace(folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the `FILE` in `folder`, which a training wrote."""
        told: dict[str, Any] = json.loads((folder / FILE).read_text())
        return cls(
            steps=[Step(**one) for one in told["steps"]],
            checks=[Check(**one) for one in told["checks"]],
            prompts=told["prompts"],
            previews=[Previews(**one) for one in told["previews"]],
            likeness_among_pictures=told.get("likeness_among_pictures"),
            choice=Choice(**told["choice"]) if told["choice"] else None,
            watched_seconds=told.get("watched_seconds", 0.0),
        )
