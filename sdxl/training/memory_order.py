"""Weights as kernels of optimizers see them: rows of 256 numbers, in the order in which they lie in memory.

With rows of one length a few compiled kernels serve all shapes. Kernels read whole rows, so they need no mask. Knows tensors;
does not know what is done with them.
"""

from torch import Tensor, nn

ROW = 256


def as_rows(values: Tensor, weight: nn.Parameter, *, written: bool = True) -> Tensor:
    """`values`, of the shape of `weight`, in its memory order: [rows, 256], or [n] if they do not make whole rows.

    written: whether the caller writes into the result. Then it is a view, never a copy.

    Raises:
        RuntimeError: `values` are to be written, but lie in another order.
    """
    ordered = values.permute(sorted(range(weight.dim()), key=weight.stride, reverse=True))
    row = ordered.view(-1) if written else ordered.reshape(-1)
    return row.view(-1, ROW) if row.numel() % ROW == 0 else row
