"""Which moment of a training is the best, judged by its checks.

Knows checks and the rule; does not know how checks are made or what follows from the choice.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

from sdxl.history import Check, Choice

PATIENCE = 3
"""A run stops when so many checks in a row, after the pivot, were worse than an earlier one."""
MARGIN = 0.02
"""By how much an earlier moment must be better than the last to be handed over: below that they are equal."""


def with_scores(checks: Sequence[Check]) -> list[Check]:
    """The checks with scores that can be compared: the share of what was learned × what is followed.

    What was learned is how far the held-out loss fell below the base's, as a share of the furthest in any check. Drift is
    told, but not weighed: it grows in every run, so it would always speak for the earliest moment.
    """
    learned = [max(1 - mean(check.held_out.values()), 0.0) for check in checks]
    most = max(learned, default=0.0) or 1.0
    return [
        replace(check, score=share / most * check.followed)
        for check, share in zip(checks, learned, strict=True)
    ]


def best_of(checks: Sequence[Check]) -> Check:
    """The check with the highest score; the last one unless an earlier is better by `MARGIN`."""
    best, last = max(checks, key=lambda check: check.score), checks[-1]
    return best if best.score > last.score + MARGIN else last


def has_fallen(checks: Sequence[Check], pivot: int) -> bool:
    """Whether the training may as well stop, because the last `PATIENCE` checks after the `pivot` step were worse than
    an earlier one."""
    after = [check for check in checks if check.step > pivot]
    enough = max(check.score for check in checks) - MARGIN
    return len(after) > PATIENCE and all(check.score < enough for check in after[-PATIENCE:])


def choice_of(checks: Sequence[Check]) -> Choice:
    """The best moment, with the reason for people."""
    best, last = best_of(checks), checks[-1]
    reason = "No earlier moment was clearly better than the last." if best is last else _reason(best, last)
    return Choice(step=best.step, strength=best.strength, reason=reason)


def _reason(best: Check, last: Check) -> str:
    """Why `best` is handed over and not `last`."""
    said = [
        (last.followed < best.followed - 0.01, "prompts were followed better"),
        (
            mean(last.held_out.values()) > mean(best.held_out.values()),
            "what training did not see was predicted better",
        ),
    ]
    reasons = [text for holds, text in said if holds] or ["the score was higher"]
    return f"After step {best.step} {' and '.join(reasons)} than at the end."
