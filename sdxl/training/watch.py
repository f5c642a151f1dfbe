"""A training is watched: from time to time its signals are read and previews are drawn, and the best moment is kept.

Knows when to look; does not know how signals are computed, what makes a moment the best, or how pictures are drawn.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dataset_and_utils import ExampleDataset, TokenMap
from sdxl.history import Check, History, Previews
from sdxl.model.components import Components
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.training import kept_previews
from sdxl.training.best_moment import choice_of, has_fallen, with_scores
from sdxl.training.config import TrainingConfig, prompts_of
from sdxl.training.data_parallel import agreed, world_size
from sdxl.training.preservation import PROMPTS
from sdxl.training.signals import Meter

log = logging.getLogger(__name__)

PREVIEWED = 2
"""Previews are drawn at every so many looks, and of the last moment if it is chosen."""

Lent = Callable[[Mapping[str, Tensor]], AbstractContextManager[None]]
"""Gives the model the exported weights of another moment while a context lasts."""


class Previewer(Protocol):
    """Draws previews."""

    def __call__(self, step: int) -> Previews:
        """Draw them with the weights after `step`."""
        ...

    def freeze_text(self) -> None:
        """Read the prompts for the last time, because the text encoders are about to leave the device."""
        ...


@dataclass(kw_only=True)
class Watch:
    """Looks at a training several times, and at its end. `Watch()` never looks."""

    checks: int = 0
    """How often to look."""
    held_out: ExampleDataset | None = None
    """What training does not see; not None if `checks` is above 0."""
    draw: Previewer | None = None
    """Draws the previews of a moment with the present weights; None: there are none."""
    score: Callable[[Previews], Previews] | None = None
    """Adds their scores to previews; None: they have none."""
    folder: Path | None = None
    """What the files of previews are relative to; not None if there are previews."""
    keep: Callable[[int, TrainedFineTune], None] | None = None
    """Takes the fine-tune of every checked moment."""
    asked_to_finish: Callable[[], bool] = lambda: False
    """Whether somebody wants the training to end now, with the best moment so far."""
    history: History = field(default_factory=History)
    """What was seen; the choice too, at the end."""
    _meter: Meter | None = field(default=None, init=False)
    _token_map: TokenMap | None = field(default=None, init=False)
    _total: int = field(default=0, init=False)
    _pivot: int = field(default=0, init=False)
    _text_is_frozen: bool = field(default=False, init=False)
    _best: TrainedFineTune | None = field(default=None, init=False)
    _best_at: int = field(default=0, init=False)

    def begin(
        self, components: Components, config: TrainingConfig, *, mixed_precision: bool, goes_on: bool = False
    ) -> None:
        """Keep what the base predicts, and draw what it makes of the prompts: nothing has trained yet.

        goes_on: whether a state follows, which has these previews.
        """
        if not self.checks:
            return
        assert self.held_out is not None
        self._total, self._pivot = config.max_train_steps, config.pivot_step
        self._token_map = TokenMap.parse(config.token_map)
        with self._timed():
            self._meter = Meter(
                components,
                self.held_out,
                self._token_map,
                words=config.token_init,
                texts=texts_beside(config),
                seed=config.seed,
                mixed_precision=mixed_precision,
                at_once=config.at_once_without_gradients,
            )
            if not goes_on:
                self._preview(0)

    def freeze_text(self) -> None:
        """The text encoders have learned all that they will, and are about to leave the device."""
        if self._meter is not None:
            self._meter.freeze_text()
        with self._without_failure("draw", "The previews after the pivot"):
            if self.draw is not None:
                self.draw.freeze_text()
        self._text_is_frozen = True

    def stops_after(self, step: int, snapshot: Callable[[], TrainedFineTune]) -> bool:
        """Look after `step`, if it is time or the last chance, and keep a snapshot of the best moment.

        Returns whether the training is to stop, because it only gets worse or somebody wants it.
        """
        due = self._meter is not None and _due(step, self._total, self.checks)
        # Several processes must agree, which takes time: they do so only when it is time to look.
        finish = bool(agreed(int(self.asked_to_finish()))) if due or world_size() == 1 else False
        if self._meter is None or not (due or finish):
            return finish
        with self._timed():
            self.history.checks.append(Check(step=step, strength=1.0, score=0.0, **vars(self._meter.read())))
            self.history.checks = with_scores(self.history.checks)
            # All processes have the same weights, but may round differently: the first one decides.
            best = max(self.history.checks, key=lambda check: check.score)
            if agreed(int(best.step == step)):
                self._best, self._best_at = snapshot(), step
            if self.keep is not None:
                self.keep(step, snapshot())
            stops = finish or bool(agreed(int(has_fallen(self.history.checks, self._pivot))))
            is_turn = (self.checks - len(self.history.checks)) % PREVIEWED == 0
            is_end = stops or step == self._total
            # Processes that share the UNet draw together.
            if agreed(int(is_turn or (is_end and choice_of(self.history.checks).step == step))):
                self._preview(step)
        return stops

    def caught_up(self, done: int, snapshot: Callable[[], TrainedFineTune]) -> int:
        """Look after the step `done` if it is time and nobody has: a state is saved before that. Returns `done`."""
        seen = any(check.step == done for check in self.history.checks)
        if done and not seen:
            self.stops_after(done, snapshot)
        return done

    def tensors(self) -> dict[str, Tensor]:
        """The best fine-tune so far and the files of previews: name → tensor on the CPU."""
        found: dict[str, Tensor] = {}
        if self.folder is not None:
            found |= kept_previews.as_tensors(self.history.previews, self.folder)
        if self._best is None:
            return found
        rows = {f"rows.{number}": rows for number, rows in enumerate(self._best.token_rows)}
        return found | {f"weights.{name}": tensor for name, tensor in self._best.weights.items()} | rows

    def as_json(self) -> dict[str, Any]:
        """All that was seen."""
        kind = "" if self._best is None else self._best.kind
        return {
            "checks": [asdict(check) for check in self.history.checks],
            "best": self._best_at,
            "kind": kind,
            "previews": kept_previews.as_json(self.history.previews),
        }

    def restore(self, told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `as_json` and `tensors` told, which may come from a stranger.

        Raises:
            KeyError, TypeError, ValueError: it is not what they tell.
        """
        checks = [Check(**check) for check in told["checks"]]
        for check in checks:
            numbers = [check.strength, check.followed, check.drift, check.score, *check.held_out.values()]
            if type(check.step) is not int or not all(math.isfinite(number) for number in numbers):
                raise ValueError("a check is not what it should be")
        if not self.checks:
            return
        if self.draw is not None and self.folder is not None:  # in the process that draws
            self.history.previews = kept_previews.restored(told.get("previews", []), tensors, self.folder)
        if not checks:
            return
        self.history.checks, self._best_at = checks, int(told["best"])
        if all(check.step != self._best_at for check in checks):
            raise ValueError("the best moment was not checked")
        weights = {
            name.removeprefix("weights."): tensor
            for name, tensor in tensors.items()
            if name.startswith("weights.")
        }
        rows = [tensors[f"rows.{number}"] for number in (0, 1)]
        assert self._token_map is not None
        self._best = TrainedFineTune(
            kind=str(told["kind"]), weights=weights, token_rows=rows, token_map=self._token_map
        )

    def chosen(self, last: TrainedFineTune, lent: Lent | None = None) -> TrainedFineTune:
        """The fine-tune to hand over: that of the best moment or the `last` one. The history says why.

        lent: lends the model the weights of another moment, for previews of the chosen one if there are none yet. They need
        texts that no longer changed since then.
        """
        if self._best is None or _shapes(self._best) != _shapes(last):  # a state may have held anything
            return last
        choice = choice_of(self.history.checks)
        self.history.choice = choice
        log.info("The fine-tune after step %d is handed over. %s", choice.step, choice.reason)
        missing = self.draw is not None and all(one.step != choice.step for one in self.history.previews)
        if missing and lent is not None and self._text_is_frozen and choice.step >= self._pivot:
            told = f"The previews after step {choice.step}"
            with self._timed(), self._without_failure("draw", told), lent(self._best.weights):
                self._preview(choice.step)
        log.info("Checks and previews took %.0f seconds.", self.history.watched_seconds)
        return last if choice.step == self.history.checks[-1].step else self._best

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.history.watched_seconds += time.monotonic() - started

    def _preview(self, step: int) -> None:
        if self.draw is None:
            return
        with self._without_failure("draw", f"The previews after step {step}"):
            drawn = self.draw(step)
            with self._without_failure("score", f"The scores of the previews after step {step}"):
                if self.score is not None:
                    drawn = self.score(drawn)
            self.history.previews.append(drawn)

    @contextmanager
    def _without_failure(self, part: Literal["draw", "score"], what: str) -> Iterator[None]:
        """A failure of the part is told, ends its use, and does not stop the training."""
        try:
            yield
        except Exception as error:
            log.warning("%s failed (%s): training goes on without them.", what, error)
            setattr(self, part, None)


def _shapes(model: TrainedFineTune) -> dict[str, tuple[torch.dtype, torch.Size]]:
    rows = {f"rows.{number}": rows for number, rows in enumerate(model.token_rows)}
    return {name: (tensor.dtype, tensor.shape) for name, tensor in (model.weights | rows).items()}


def _due(step: int, total: int, checks: int) -> bool:
    """Whether to look after `step` (from 1) of `total`, for `checks` looks in all, evenly, the last one at the end."""
    return step * checks // total > (step - 1) * checks // total


def texts_beside(config: TrainingConfig) -> Sequence[str]:
    """What the meter asks for beside the subject: what preservation keeps, or common things."""
    named = config.preservation_prompts
    texts = prompts_of(named, name="preservation_prompts") if named else PROMPTS
    return texts if len(texts) > 1 else [*texts, *PROMPTS]
