"""A training is watched: from time to time its signals are read and previews are drawn, and the best moment is kept.

Knows when to look and what is better; does not know how signals are computed or pictures drawn.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean

from sdxl.history import Check, Choice, History, Previews
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.training.data_parallel import agreed
from sdxl.training.signals import Meter

log = logging.getLogger(__name__)

CHECKS = 6
"""How often a run is checked by default."""
PATIENCE = 3
"""A run stops when so many checks in a row, after the pivot, were worse than an earlier one."""
MARGIN = 0.02
"""By how much an earlier moment must be better than the last to be handed over: below that they are equal."""


@dataclass(kw_only=True)
class Watch:
    """Looks at a training every `every` steps, and at its end."""

    every: int
    """Steps between two looks; 0: only count steps."""
    pivot: int
    """The step from which the token rows no longer change."""
    history: History
    draw: Callable[[int], Previews] | None = None
    """Draws the previews of a moment with the present weights; None: there are none."""
    meter: Meter | None = None
    _best: TrainedFineTune | None = field(default=None, init=False)
    _best_at: int = field(default=0, init=False)

    def begin(self, meter: Meter) -> None:
        """Take the meter, and draw what the base makes of the prompts."""
        self.meter = meter
        self._preview(0)

    def due(self, step: int, total: int) -> bool:
        """Whether to look after `step` (from 1) of `total`."""
        return bool(self.every) and (step % self.every == 0 or step == total)

    def look(self, step: int, snapshot: Callable[[], TrainedFineTune]) -> bool:
        """Read the signals after `step`, keep a snapshot if this moment is the best, and draw previews.

        Returns whether the training may as well stop.
        """
        assert self.meter is not None
        signals = self.meter.read()
        self.history.checks.append(Check(step=step, strength=1.0, score=0.0, **vars(signals)))
        self.history.checks = with_scores(self.history.checks)
        best = max(self.history.checks, key=lambda check: check.score)
        # All processes have the same weights, but may round differently: the first one decides.
        if agreed(int(best.step == step)):
            self._best, self._best_at = snapshot(), step
        self._preview(step)
        return bool(agreed(int(self._has_fallen())))

    def chosen(self, last: TrainedFineTune, step: int) -> TrainedFineTune:
        """The fine-tune to hand over, of the best moment or of the `last` one, with the reason in the history."""
        checks = {check.step: check for check in self.history.checks}
        if self._best is None or step not in checks:
            return last
        best, end = checks[self._best_at], checks[step]
        earlier = best.step != end.step and best.score > end.score + MARGIN
        reason = _reason(best, end) if earlier else "No earlier moment was clearly better than the last."
        chosen = best if earlier else end
        self.history.choice = Choice(step=chosen.step, strength=1.0, reason=reason)
        log.info("The fine-tune after step %d is handed over. %s", chosen.step, reason)
        return self._best if earlier else last

    def _has_fallen(self) -> bool:
        after = [check for check in self.history.checks if check.step > self.pivot]
        best = max(self.history.checks, key=lambda check: check.score)
        return len(after) > PATIENCE and all(check.score < best.score - MARGIN for check in after[-PATIENCE:])

    def _preview(self, step: int) -> None:
        """Draw previews. A failure is told, and does not stop the training."""
        if self.draw is None:
            return
        try:
            self.history.previews.append(self.draw(step))
        except Exception as error:
            log.warning("The previews after step %d failed (%s): training goes on without them.", step, error)
            self.draw = None


def with_scores(checks: list[Check]) -> list[Check]:
    """The checks with scores that can be compared: the share of what was learned × what is followed, less half the drift.

    What was learned is how far the held-out loss fell below the base's, as a share of the furthest in any check.
    """
    learned = [max(1 - mean(check.held_out.values()), 0.0) for check in checks]
    most = max(learned) or 1.0
    return [
        _scored(check, share / most * check.followed - check.drift / 2)
        for check, share in zip(checks, learned, strict=True)
    ]


def _scored(check: Check, score: float) -> Check:
    return Check(**{**vars(check), "score": score})


def _reason(best: Check, end: Check) -> str:
    """Why `best` is handed over and not `end`."""
    said = [
        (end.followed < best.followed - 0.01, "prompts were followed better"),
        (end.drift > best.drift + 0.01, "other prompts had changed less"),
        (
            mean(end.held_out.values()) > mean(best.held_out.values()),
            "what training did not see was predicted better",
        ),
    ]
    reasons = [text for holds, text in said if holds] or ["the score was higher"]
    return f"After step {best.step} {' and '.join(reasons)} than at the end."


def every_for(steps: int, checks: int = CHECKS) -> int:
    """The steps between two looks of a run of `steps` that is looked at about `checks` times."""
    return max(-(-steps // checks), 1)
