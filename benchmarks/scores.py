"""The formulas that the quality benchmarks share."""

from __future__ import annotations

from torch import Tensor


def cosine_of_different(vectors: Tensor, others: Tensor) -> float:
    """The mean cosine between unit vectors [n, d] and `others` [n, d] in other rows, for n of at least 2.

    Equal rows belong to the same picture and do not count.
    """
    n = len(vectors)
    return float((vectors @ others.T).fill_diagonal_(0).sum()) / (n * (n - 1))


def fidelity(similarity: float, *, untuned: float, real: float) -> float:
    """`similarity` to real pictures, scaled: 0 is the untuned base's, 1 is that of real pictures among themselves."""
    return (similarity - untuned) / (real - untuned)
