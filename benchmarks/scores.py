"""What the benches of fidelity share: formulas over vectors and numbers."""

from __future__ import annotations

from torch import Tensor


def cosine_of_different(vectors: Tensor, others: Tensor) -> float:
    """Mean cosine of unit vectors [n, d] to `others` [n, d], a picture and itself (equal rows) left out; n from 2."""
    n = len(vectors)
    return float((vectors @ others.T).fill_diagonal_(0).sum()) / (n * (n - 1))


def fidelity(similarity: float, *, untuned: float, real: float) -> float:
    """`similarity` to real pictures, on a scale from 0 for the untuned base's to 1 for real ones among themselves."""
    return (similarity - untuned) / (real - untuned)
