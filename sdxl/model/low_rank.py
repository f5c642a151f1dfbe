"""The two matrices of a weight's low-rank change, as LoRA files store them, and the best two for any change.

Knows linear algebra and the shapes of layers; does not know names of layers or files.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl.model.weight_changes import LowRank, Rescaled, WeightChange

_EXACT_UP_TO = 512
"""A matrix whose shorter side is at most this long is decomposed exactly. The exact way takes minutes for large ones."""
_SPARE, _POWERS = 16, 4
"""Further singular vectors that a random decomposition looks for, and its power iterations (arXiv:0909.4061)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraMatrices:
    """The change of a weight by `alpha` / rank · `up` @ `down`; with a `magnitude` it is a DoRA (arXiv:2402.09353)."""

    down: Tensor
    """[rank, in]; for a convolution [rank, in, kernel, kernel]."""
    up: Tensor
    """[out, rank]; for a convolution [out, rank, 1, 1]."""
    alpha: float
    magnitude: Tensor | None = None
    """[out]; None for a plain LoRA."""

    @property
    def rank(self) -> int:
        """The length of what the two matrices share."""
        return len(self.down)

    def with_alpha(self, alpha: float) -> "LoraMatrices":
        """The same change with another alpha: `up` is multiplied by what makes up for it."""
        if alpha == self.alpha:
            return self
        up = (self.up.float() * (self.alpha / alpha)).to(self.up.dtype)
        return dataclasses.replace(self, up=up, alpha=alpha)

    def folded(self) -> "LoraMatrices":
        """The same change with alpha = rank, for formats without an alpha."""
        return self.with_alpha(float(self.rank))

    def scaled(self, factor: float) -> "LoraMatrices":
        """`factor` times the change. Not for DoRA."""
        assert self.magnitude is None
        return dataclasses.replace(self, alpha=self.alpha * factor)

    def to(self, dtype: torch.dtype) -> "LoraMatrices":
        """The matrices in `dtype`, unless their numbers are too large for it. A magnitude is as large as a weight's row,
        so it stays in fp32."""
        down, up = (within(matrix, dtype) for matrix in (self.down, self.up))
        magnitude = None if self.magnitude is None else self.magnitude.float()
        return dataclasses.replace(self, down=down, up=up, magnitude=magnitude)


def within(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`, or in fp32 if a number would overflow."""
    return tensor.to(dtype) if tensor.abs().max() <= torch.finfo(dtype).max else tensor.float()


def matrices_of(change: WeightChange, shape: torch.Size) -> LoraMatrices | None:
    """The matrices of a layer's change as it was read; None if it is not the product of two.

    shape: of the layer's weight.
    """
    magnitude = None
    if isinstance(change, Rescaled) and not change.by_input:
        magnitude, change = change.lengths.flatten(), change.change
    if not isinstance(change, LowRank) or change.mid is not None:
        return None
    rank, kernel = len(change.down), shape[2:]
    return LoraMatrices(
        down=change.down.reshape(rank, *shape[1:]),
        up=change.up.reshape(shape[0], rank, *(1 for _ in kernel)),
        alpha=change.scale * rank,
        magnitude=magnitude,
    )


def concatenated(changes: list[LoraMatrices]) -> LoraMatrices:
    """The exact sum of changes of one layer; its rank is the sum of theirs. Not for DoRA."""
    assert all(change.magnitude is None for change in changes)
    if len(changes) == 1:
        return changes[0]
    folded = [dataclasses.replace(change, up=change.up.float()).folded() for change in changes]
    return LoraMatrices(
        down=torch.cat([change.down.float() for change in folded]),
        up=torch.cat([change.up for change in folded], dim=1),
        alpha=float(sum(change.rank for change in folded)),
    )


def fit(change: Tensor, rank: int) -> tuple[LoraMatrices, float]:
    """The matrices of at most `rank` whose product is nearest to `change`, and the Frobenius norm of what they leave.

    The singular value decomposition gives them (Eckart and Young, 1936). Large matrices are decomposed by random
    projections, always the same, which find nearly the best.

    change: [out, in] or [out, in, kernel, kernel], in any dtype.
    """
    matrix = change.float().flatten(1)
    rank = min(rank, *matrix.shape)
    wanted = rank + _SPARE
    if min(matrix.shape) <= max(_EXACT_UP_TO, wanted):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        right = right.T
    else:
        devices = [matrix.device] if matrix.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, q=wanted, niter=_POWERS)
    # Both get the root of each value, so that both are of a size that half precision can hold.
    roots = values[:rank].sqrt()
    up, down = left[:, :rank] * roots, (right[:, :rank] * roots).T
    left_over = float(torch.linalg.norm(matrix - up @ down))
    kernel = [1] * (change.ndim - 2)
    found = LoraMatrices(
        down=down.reshape(rank, *change.shape[1:]).contiguous().cpu(),
        up=up.reshape(len(matrix), rank, *kernel).contiguous().cpu(),
        alpha=float(rank),
    )
    return found, left_over
