"""The changes of weights that a LoRA and its relatives hold, with one interface.

Each change is a few small tensors that make one tensor of a weight's shape. No change takes more memory than a few times
the weight that it changes, whatever shapes a file claims. Knows formulas; does not know files or names.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightChange(ABC):
    """The change of one parameter of the base."""

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(part.nbytes for part in vars(self).values() if isinstance(part, Tensor | WeightChange))

    @abstractmethod
    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether this changes a parameter of `shape`."""

    @abstractmethod
    def delta(self, base: Tensor) -> Tensor:
        """The change of the parameter `base`, in fp32 with the same shape and device. It must fit."""

    def added(self, to: Tensor, base: Tensor, strength: float) -> Tensor:
        """Return `to` + `strength` · (this change of `base`); both are fp32, with the same shape and device."""
        return to + strength * self.delta(base)


@dataclass(frozen=True, kw_only=True, eq=False)
class MatrixChange(WeightChange):
    """A change that does not depend on the base: one matrix, whose rows are the weight's outputs."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int] | None:
        """Rows and columns of the matrix; None if the tensors do not belong together."""

    @abstractmethod
    def matrix(self, device: torch.device) -> Tensor:
        """The matrix in fp32."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.size == (shape[0], math.prod(shape[1:]))

    def delta(self, base: Tensor) -> Tensor:
        return self.matrix(base.device).reshape(base.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank(MatrixChange):
    """`scale` · `up` @ `down` (LoRA, arXiv:2106.09685), for a convolution also with a small one between the two.

    That is the decomposition of arXiv:1412.6553: [out, in, k, k] is a product of 1×1, k×k and 1×1 kernels.
    """

    down: Tensor
    """[rank, in]; for a convolution [rank, in, kernel, kernel]."""
    up: Tensor
    """[out, rank]; for a convolution [out, rank, 1, 1]."""
    mid: Tensor | None = None
    """[rank of up, rank of down, kernel, kernel]."""
    scale: float = 1.0
    """alpha / rank."""

    @property
    def size(self) -> tuple[int, int] | None:
        up, down, mid = self.up, self.down, self.mid
        if min(up.ndim, down.ndim) < 2 or not up.numel() or not down.numel():
            return None
        ranks = (math.prod(up.shape[1:]), down.shape[0])
        kernel = 1 if mid is None else math.prod(mid.shape[2:])
        if (ranks[0] != ranks[1]) if mid is None else (mid.ndim < 2 or tuple(mid.shape[:2]) != ranks):
            return None
        return up.shape[0], math.prod(down.shape[1:]) * kernel

    def matrix(self, device: torch.device) -> Tensor:
        up, down = self._pair(device)
        if self.mid is None:
            return self.scale * (up @ down)
        # Multiply the middle with the side where the result is no larger than the middle or the weight.
        mid = self.scale * _on(self.mid, device).flatten(2)
        if up.shape[1] <= up.shape[0]:
            return torch.einsum("oi,ink->onk", up, torch.einsum("ijk,jn->ink", mid, down)).flatten(1)
        return torch.einsum("ojk,jn->onk", torch.einsum("oi,ijk->ojk", up, mid), down).flatten(1)

    def added(self, to: Tensor, base: Tensor, strength: float) -> Tensor:
        if base.ndim != 2 or self.mid is not None:
            return super().added(to, base, strength)
        up, down = self._pair(base.device)
        return torch.addmm(to, up, down, alpha=strength * self.scale)

    def _pair(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return _on(self.up, device).flatten(1), _on(self.down, device).flatten(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Hadamard(MatrixChange):
    """`scale` · the elementwise product of two low-rank matrices (LoHa: arXiv:2108.06098, as in arXiv:2309.14859)."""

    first: LowRank
    second: LowRank
    scale: float = 1.0

    @property
    def size(self) -> tuple[int, int] | None:
        return self.first.size if self.first.size == self.second.size else None

    def matrix(self, device: torch.device) -> Tensor:
        return self.scale * self.first.matrix(device) * self.second.matrix(device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kronecker(MatrixChange):
    """`scale` · the Kronecker product of two matrices (LoKr: arXiv:2309.14859)."""

    left: MatrixChange
    right: MatrixChange
    scale: float = 1.0

    @property
    def size(self) -> tuple[int, int] | None:
        left, right = self.left.size, self.right.size
        return None if left is None or right is None else (left[0] * right[0], left[1] * right[1])

    def matrix(self, device: torch.device) -> Tensor:
        return torch.kron(self.scale * self.left.matrix(device), self.right.matrix(device))


@dataclass(frozen=True, kw_only=True, eq=False)
class Difference(MatrixChange):
    """`scale` · a tensor of the parameter's own shape, such as a bias."""

    value: Tensor
    scale: float = 1.0

    @property
    def size(self) -> tuple[int, int] | None:
        value = self.value
        return (value.shape[0], math.prod(value.shape[1:])) if value.ndim and value.numel() else None

    def matrix(self, device: torch.device) -> Tensor:
        value = _on(self.value, device)
        return self.scale * value.reshape(value.shape[0], -1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Replacement(WeightChange):
    """The parameter's new value."""

    value: Tensor

    def fits(self, shape: tuple[int, ...]) -> bool:
        return tuple(self.value.shape) == shape

    def delta(self, base: Tensor) -> Tensor:
        return _on(self.value, base.device) - base


@dataclass(frozen=True, kw_only=True, eq=False)
class Rescaled(WeightChange):
    """Another change, after which each row of the sum gets a new length (DoRA, arXiv:2402.09353).

    peft rescales the weights of each output. LyCORIS rescales those of each input, unless it was set to do as peft.
    """

    change: WeightChange
    lengths: Tensor
    """One number for each output, or for each input, in any shape."""
    by_input: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        axis = int(self.by_input)
        return len(shape) > axis and self.lengths.numel() == shape[axis] and self.change.fits(shape)

    def delta(self, base: Tensor) -> Tensor:
        axis = int(self.by_input)
        summed = base.float() + self.change.delta(base)
        others = [other for other in range(base.ndim) if other != axis]
        norms = torch.linalg.vector_norm(summed, dim=others, keepdim=True).clamp_min(1e-12)
        lengths = _on(self.lengths, base.device).reshape(norms.shape)
        return lengths * (summed / norms) - base


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True).float()
