"""Round the rows of a matrix on CUDA to 8-bit floats, each with a scale of its own, in one pass over memory (Triton).

torch would read the matrix twice, first for the largest number of each row. Knows matrices; does not know layers.
"""

# Triton comes with torch for CUDA only.
# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdxl.speed.fp8 import FP8, LARGEST


def rounded_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A contiguous `matrix` [rows, columns] in e4m3, and the scale [rows, 1] in fp32 that each row is multiplied by."""
    rows, columns = matrix.shape
    values = torch.empty_like(matrix, dtype=FP8)
    scales = matrix.new_empty((rows, 1), dtype=torch.float32)
    block = triton.next_power_of_2(columns)
    warps = 4 if block <= 2048 else 8
    _round[(rows,)](matrix, values, scales, columns, BLOCK=block, LARGEST=LARGEST, num_warps=warps)
    return values, scales


@triton.jit
def _round(matrix, values, scales, columns, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """Round one row of at most BLOCK columns."""
    # Rows are int64: a row times the columns can exceed 2³¹ at large batches.
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < columns
    x = tl.load(matrix + row * columns + cols, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-12) / LARGEST
    tl.store(scales + row, scale)
    # Clip, because a quotient may be rounded up to a number that the cast would turn into NaN.
    x = tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST)
    tl.store(values + row * columns + cols, x.to(values.dtype.element_ty), mask=mask)
