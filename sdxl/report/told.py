"""What a report tells about: a training's record, its pictures and its history, with the facts that several parts need.

Knows where each fact comes from; does not know how it is shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dataset_and_utils import TokenMap
from sdxl.data.dataset_folder import PreparedPicture
from sdxl.history import Check, History
from sdxl.model.web_ui_metadata import About


@dataclass(frozen=True, kw_only=True)
class Told:
    """All that a report tells about."""

    folder: Path
    """Where the result lies, and the previews of the history."""
    history: History
    record: Mapping[str, Any]
    """The record of the run, as `training.json` has it."""
    pictures: Sequence[PreparedPicture]
    advice: Sequence[str] = ()
    """Sentences on the pictures."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """The inputs that were given, by name."""
    described: Mapping[str, str] = field(default_factory=dict)
    """What an input means, by name."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the run."""
        return self.record.get("settings", {})

    @cached_property
    def token_map(self) -> TokenMap:
        """The words that were learned."""
        return TokenMap.parse(self.settings["token_map"])

    @property
    def words(self) -> list[str]:
        """The words that were learned, in their order."""
        return list(self.token_map.placeholders)

    @property
    def base(self) -> str:
        """The base's name, without the folders of this machine."""
        return About(words=(), resolution=0, record=self.record).base

    @property
    def is_lora(self) -> bool:
        """Whether a LoRA was trained."""
        return bool(self.settings.get("is_lora"))

    @property
    def form(self) -> str:
        """The form of the result: "lora", "whole" or "difference"."""
        return "lora" if self.is_lora else str(self.settings.get("full_result", "whole"))

    @property
    def kind(self) -> str:
        """What was trained, as a noun."""
        if not self.is_lora:
            return "full fine-tune"
        return (
            f"{'DoRA' if self.settings.get('use_dora') else 'LoRA'} of rank {self.settings.get('lora_rank')}"
        )

    @property
    def total(self) -> int:
        """Steps of the run."""
        last = self.history.steps[-1].step if self.history.steps else 0
        return int(self.settings.get("max_train_steps") or last)

    @property
    def pivot(self) -> int | None:
        """The last step in which the tokens trained; None if they trained to the end, or never."""
        with_tokens = [step.step for step in self.history.steps if step.ti_learning_rate > 0]
        if not with_tokens or with_tokens[-1] == self.history.steps[-1].step:
            return None
        return with_tokens[-1]

    def is_chosen(self, check: Check) -> bool:
        """Whether a check is of the moment that was chosen."""
        choice = self.history.choice
        return choice is not None and (check.step, check.strength) == (choice.step, choice.strength)

    def step_name(self, step: int) -> str:
        """A moment's name for people."""
        return "before training" if step == 0 else f"step {step}"
