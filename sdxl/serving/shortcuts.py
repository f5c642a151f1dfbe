"""What each call of the UNet does: everything, or less where the picture hardly shows it.

Pure arithmetic on timesteps; knows no models, samplers or requests. Timesteps go down from 999 (pure noise) to 0. The limits
were chosen on the miniature: `python -m benchmarks.fast` measures what they save and change.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Features = Literal["none", "keep", "reuse"]
"""What a call does about deep features: a whole call that keeps none, one that keeps them, or a shallow call that takes
those that were kept last."""
WHOLE_ABOVE = 0.8
"""Share of a pass's first timestep above which every call is whole: what a picture shows, and where, is decided there."""
OLDEST = 45
"""Most timesteps between the call that kept deep features and one that reuses them (DeepCache, arXiv:2312.00858)."""
FEWEST_STEPS = 1000 // OLDEST + 1
"""With fewer steps than this, neighbouring steps are too far apart."""
GUIDED_ABOVE = 0.4
"""Share of a pass's first timestep above which there is guidance. Late guidance changes little (arXiv:2404.07724)."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the UNet; by default it does everything."""

    guided: bool = True
    """Whether the negative prompt takes part, if the request has guidance at all."""
    features: Features = "none"


def fast_calls(timesteps: Sequence[float]) -> list[Call]:
    """The calls of one pass, at these timesteps and in this order.

    The limits are in timesteps and not in calls: few steps are drawn almost exactly, and features never get older with
    more steps. A sampler that calls the UNet twice for a step needs no rule of its own.
    """
    guided = [timestep >= GUIDED_ABOVE * timesteps[0] for timestep in timesteps]
    reuses, kept = [], 0
    for index, timestep in enumerate(timesteps):
        reused = (
            timestep <= WHOLE_ABOVE * timesteps[0]
            and timesteps[kept] - timestep <= OLDEST
            # Without guidance a call has half the rows: features of one kind do not serve the other.
            and guided[index] == guided[kept]
            and index > 0
        )
        kept = kept if reused else index
        reuses.append(reused)
    whole: Features = "keep" if any(reuses) else "none"
    return [
        Call(guided=is_guided, features="reuse" if reused else whole)
        for is_guided, reused in zip(guided, reuses, strict=True)
    ]
