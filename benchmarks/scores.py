"""The formula that the quality benchmarks share."""

from __future__ import annotations


def fidelity(similarity: float, *, untuned: float, real: float) -> float:
    """`similarity` to real pictures, scaled: 0 is the untuned base's, 1 is that of real pictures among themselves."""
    return (similarity - untuned) / (real - untuned)
