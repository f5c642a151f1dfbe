"""GroupNorm and the SiLU after it: one pass over memory for the statistics, and one for the result (Triton).

torch takes five passes, and computes each group on one multiprocessor: with few groups, most of the GPU is idle. These
kernels cut the picture into tiles instead, which occupy all multiprocessors. They use channels last, as convolutions on
tensor cores do, and compile in seconds for all picture sizes. Knows the function; does not know models.

Forward (arXiv:1803.08494), over a group of M numbers: x̂ = (x + a − mean) · rstd, z = w x̂ + b, and y = z or silu(z).
Here a [n, c] is a number to add to each channel first: the convolution's bias and the time embedding.

Backward, with g = ∂L/∂z: ∂L/∂w = Σ g x̂, ∂L/∂b = Σ g, ∂L/∂x = rstd · (w g − Σ(w g)/M − x̂ · Σ(w g x̂)/M).

Each direction launches three kernels:

1. The grid of tiles: read x (and the gradient) once, and write partial sums for each tile and channel.
2. One program per picture and group: add up the partial sums, two numbers for each channel of 64 pixels.
3. The grid of tiles: read x (and the gradient) again, and write the result.

All statistics are fp32, because half precision would lose them: a group sums up to millions of numbers.
"""

# Triton comes with torch for CUDA only.
# pyright: reportMissingImports=false, reportIndexIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_ROWS, _CHANNELS = 64, 64
"""Pixels and channels of a tile. Neighbouring threads read neighbouring channels, 64 of which fill a cache line in bf16."""
_TILE = 4096
"""Partial sums that a program of the second kernel holds in registers at a time."""


def group_norm(x: Tensor, norm: nn.GroupNorm, *, silu: bool, added: Tensor | None = None) -> Tensor:
    """Apply `norm`, and SiLU if `silu`, to x + `added` on CUDA, for x [n, c, h, w] and added [n, c].

    Computes in fp32. The result has x's dtype and channels last.
    """
    return _GroupNorm.apply(x, norm.weight, norm.bias, added, norm.num_groups, norm.eps, silu)  # type: ignore[return-value]


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        added: Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        grid, pixels, parts = _tiles(x)
        n, channels = x.shape[:2]
        fp32: dict[str, Any] = {"dtype": torch.float32, "device": x.device}

        # First pass over x: mean and squared distances of each tile, by channel.
        means, squares = torch.empty(2, n, parts, channels, **fp32)
        _moments[grid](x, means, squares, pixels, channels, ROWS=_ROWS, CHANNELS=_CHANNELS)

        # The moments of each group. Fold them, `added`, weight and bias into y = scale · x + shift for each channel, so
        # that the last kernel needs only two numbers per channel. `center` and `rstd` give x̂ in the backward.
        scale, shift, center = torch.empty(3, n, channels, **fp32)
        rstd = torch.empty(n, groups, **fp32)
        _finish_forward[(n, groups)](
            means, squares, weight, bias, x if added is None else added.contiguous(), scale, shift, center, rstd,
            pixels, parts, channels, channels // groups, eps,
            ADDED=added is not None, ROWS=_ROWS, **_sizes(channels // groups),
        )  # fmt: skip

        # Second pass over x: the result.
        y = torch.empty_like(x)
        _apply[grid](x, scale, shift, y, pixels, channels, SILU=silu, ROWS=_ROWS, CHANNELS=_CHANNELS)

        # The backward recomputes x̂ and z from x: cheaper than storing and reading them.
        ctx.save_for_backward(x, weight, scale, shift, center, rstd)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale, shift, center, rstd = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grid, pixels, parts = _tiles(x)
        n, channels = x.shape[:2]
        width = channels // rstd.shape[1]

        # First pass over x and the gradient: Σ g and Σ g x̂ of each tile, by channel.
        g_parts, gx_parts = torch.empty(2, n, parts, channels, dtype=torch.float32, device=x.device)
        constants = {"SILU": ctx.silu, "ROWS": _ROWS, "CHANNELS": _CHANNELS}
        _gradient_sums[grid](
            x, grad, scale, shift, center, rstd, g_parts, gx_parts, pixels, channels, width, **constants
        )

        # Add the tiles up: `sums` [2, n, c] for the gradients of bias and weight, `means` [2, n, groups] for that of x.
        sums = torch.empty(2, n, channels, dtype=torch.float32, device=x.device)
        means = torch.empty(2, *rstd.shape, dtype=torch.float32, device=x.device)
        _finish_backward[rstd.shape](
            g_parts, gx_parts, weight, sums[0], sums[1], means[0], means[1], pixels, parts, channels, width,
            **_sizes(width),
        )  # fmt: skip

        # Second pass over x and the gradient: ∂L/∂x.
        dx = torch.empty_like(x)
        _input_gradient[grid](
            x, grad, weight, scale, shift, center, rstd, means[0], means[1], dx,
            pixels, channels, width, **constants,
        )  # fmt: skip

        # ∂L/∂w and ∂L/∂b sum over pictures. ∂L/∂a sums ∂L/∂x over pixels, since a is added to x at each pixel.
        dw, db = (sums[i].sum(0).to(weight.dtype) if ctx.needs_input_grad[2 - i] else None for i in (1, 0))
        added = dx.sum((2, 3), dtype=torch.float32) if ctx.needs_input_grad[3] else None
        return dx, dw, db, added, None, None, None


def _tiles(x: Tensor) -> tuple[tuple[int, int, int], int, int]:
    """The grid [tiles of pixels, tiles of channels, n], the pixels of a picture, and the tiles of these pixels."""
    n, channels, height, width = x.shape
    parts = triton.cdiv(height * width, _ROWS)
    return (parts, triton.cdiv(channels, _CHANNELS), n), height * width, parts


def _sizes(width: int) -> dict[str, int]:
    """Constants of the second kernel for groups of `width` channels.

    PADDED: the width, rounded up to a power of 2 because Triton's blocks need one. PARTS: the tiles to add up at a time.
    """
    padded = triton.next_power_of_2(width)
    return {"PADDED": padded, "PARTS": max(_TILE // padded, 1)}


@triton.jit
def _tile(pixels, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The tile of this program: its picture, its offsets into [n, pixels, channels], their mask, and its channels."""
    n = tl.program_id(2)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    # int64: large batches of large pictures have more than 2³¹ numbers.
    offsets = (n.to(tl.int64) * pixels + rows[:, None]) * channels + cols[None, :]
    mask = (rows[:, None] < pixels) & (cols[None, :] < channels)
    return n, offsets, mask, cols


@triton.jit
def _store_part(out, values, cols, channels):
    """Store one number per channel into out [n, parts, channels], at this program's picture and tile.

    Each tile has its own place, so no atomics are needed and results are deterministic.
    """
    where = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * channels
    tl.store(out + where + cols, values, mask=cols < channels)


@triton.jit
def _moments(x, means, squares, pixels, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """A tile's mean and sum of squared distances from this mean, for each channel.

    Distances from the tile's own mean, not plain squares: E[x²] − E[x]² cancels if the mean is far from 0.
    """
    _, offsets, mask, cols = _tile(pixels, channels, ROWS, CHANNELS)
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(ROWS, pixels - tl.program_id(0) * ROWS)
    mean = tl.sum(values, 0) / count
    distance = tl.where(mask, values - mean[None, :], 0.0)
    _store_part(means, mean, cols, channels)
    _store_part(squares, tl.sum(distance * distance, 0), cols, channels)


@triton.jit
def _finish_forward(
    means, squares, weight, bias, added, scale, shift, center, rstd_out, pixels, parts, channels, width, eps,
    ADDED: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Combine the tiles' moments into a group's (Chan et al. 1983), and fold them into y = scale · x + shift.

    width: channels of a group.
    """
    n, group = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, PADDED)
    cols = group * width + lanes
    inside = lanes < width
    extra = tl.zeros((PADDED,), tl.float32)
    if ADDED:
        extra = tl.load(added + n * channels + cols, mask=inside, other=0.0).to(tl.float32)

    # The group's mean: the tiles' means, weighted by their pixels. The last tile may have fewer. Adding a number to a
    # channel shifts its means by that number, and so x + a never needs to be in memory.
    total = tl.zeros((PARTS, PADDED), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        count = tl.minimum(ROWS, pixels - part * ROWS)
        mask = (part[:, None] < parts) & inside[None, :]
        where = (n.to(tl.int64) * parts + part[:, None]) * channels + cols[None, :]
        value = tl.load(means + where, mask=mask, other=0.0) + extra[None, :]
        total += tl.where(mask, value * count[:, None], 0.0)
    mean = tl.sum(total) / (pixels * width)

    # The squared distances from the group's mean: within each tile, plus the distance of the tile's mean.
    total = tl.zeros((PARTS, PADDED), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        count = tl.minimum(ROWS, pixels - part * ROWS)
        mask = (part[:, None] < parts) & inside[None, :]
        where = (n.to(tl.int64) * parts + part[:, None]) * channels + cols[None, :]
        distance = tl.load(means + where, mask=mask, other=0.0) + extra[None, :] - mean
        square = tl.load(squares + where, mask=mask, other=0.0)
        total += tl.where(mask, square + distance * distance * count[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(total) / (pixels * width) + eps)

    # w (x + a − mean) rstd + b = slope · x + offset, and x̂ = (x − (mean − a)) rstd.
    slope = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32) * rstd
    offset = tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32) + (extra - mean) * slope
    tl.store(scale + n * channels + cols, slope, mask=inside)
    tl.store(shift + n * channels + cols, offset, mask=inside)
    tl.store(center + n * channels + cols, mean - extra, mask=inside)
    tl.store(rstd_out + n * tl.num_programs(1) + group, rstd)


@triton.jit
def _apply(
    x, scale, shift, y, pixels, channels, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """y = scale · x + shift for a tile, and then SiLU."""
    n, offsets, mask, cols = _tile(pixels, channels, ROWS, CHANNELS)
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    inside = cols < channels
    slope = tl.load(scale + n * channels + cols, mask=inside, other=0.0)
    z = values * slope[None, :] + tl.load(shift + n * channels + cols, mask=inside, other=0.0)[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + offsets, z.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _before_silu(
    x, grad, scale, shift, center, rstd, n, offsets, mask, cols, channels, width, SILU: tl.constexpr
):
    """A tile's x̂ and g = ∂L/∂z, recomputed from x and ∂L/∂y."""
    inside = cols < channels
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        slope = tl.load(scale + n * channels + cols, mask=inside, other=0.0)
        z = values * slope[None, :] + tl.load(shift + n * channels + cols, mask=inside, other=0.0)[None, :]
        sigmoid = tl.sigmoid(z)
        g = g * sigmoid * (1 + z * (1 - sigmoid))  # silu′(z) = σ(z) (1 + z (1 − σ(z)))
    group = n * (channels // width) + cols // width
    distance = values - tl.load(center + n * channels + cols, mask=inside, other=0.0)[None, :]
    normed = distance * tl.load(rstd + group, mask=inside, other=0.0)[None, :]
    return tl.where(mask, normed, 0.0), g  # outside the tile's mask, g is 0 already


@triton.jit
def _gradient_sums(
    x, grad, scale, shift, center, rstd, g_parts, gx_parts, pixels, channels, width,
    SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile's Σ g and Σ g x̂ for each channel."""
    n, offsets, mask, cols = _tile(pixels, channels, ROWS, CHANNELS)
    normed, g = _before_silu(
        x, grad, scale, shift, center, rstd, n, offsets, mask, cols, channels, width, SILU
    )
    _store_part(g_parts, tl.sum(g, 0), cols, channels)
    _store_part(gx_parts, tl.sum(g * normed, 0), cols, channels)


@triton.jit
def _finish_backward(
    g_parts, gx_parts, weight, bias_sum, weight_sum, wg_mean, wgx_mean, pixels, parts, channels, width,
    PADDED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Add up the tiles: Σ g and Σ g x̂ for each channel, and the group's means of w g and w g x̂."""
    n, group = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, PADDED)
    cols = group * width + lanes
    inside = lanes < width

    # PARTS tiles at a time, and one sum over them at the end: reductions across threads are slow.
    g_total = tl.zeros((PARTS, PADDED), tl.float32)
    gx_total = tl.zeros((PARTS, PADDED), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part[:, None] < parts) & inside[None, :]
        where = (n.to(tl.int64) * parts + part[:, None]) * channels + cols[None, :]
        g_total += tl.load(g_parts + where, mask=mask, other=0.0)
        gx_total += tl.load(gx_parts + where, mask=mask, other=0.0)
    g_sum, gx_sum = tl.sum(g_total, 0), tl.sum(gx_total, 0)
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(bias_sum + n * channels + cols, g_sum, mask=inside)
    tl.store(weight_sum + n * channels + cols, gx_sum, mask=inside)
    tl.store(wg_mean + n * tl.num_programs(1) + group, tl.sum(w * g_sum) / (pixels * width))
    tl.store(wgx_mean + n * tl.num_programs(1) + group, tl.sum(w * gx_sum) / (pixels * width))


@triton.jit
def _input_gradient(
    x, grad, weight, scale, shift, center, rstd, wg_mean, wgx_mean, dx, pixels, channels, width,
    SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """∂L/∂x = rstd · (w g − mean(w g) − x̂ · mean(w g x̂)) for a tile, with the means of each channel's group."""
    n, offsets, mask, cols = _tile(pixels, channels, ROWS, CHANNELS)
    normed, g = _before_silu(
        x, grad, scale, shift, center, rstd, n, offsets, mask, cols, channels, width, SILU
    )
    inside = cols < channels
    group = n * (channels // width) + cols // width
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    mean_wg = tl.load(wg_mean + group, mask=inside, other=0.0)[None, :]
    mean_wgx = tl.load(wgx_mean + group, mask=inside, other=0.0)[None, :]
    factor = tl.load(rstd + group, mask=inside, other=0.0)[None, :]
    result = factor * (w * g - mean_wg - normed * mean_wgx)
    tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)
