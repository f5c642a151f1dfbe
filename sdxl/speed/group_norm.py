"""GroupNorm with the SiLU behind it, in one pass over memory for its statistics and one for its result (Triton).

torch takes five passes, and gives each of the few groups to one multiprocessor. These kernels want channels last, as
convolutions do on tensor cores, and compile in seconds for all sizes of pictures. Knows the function; does not know models.

With x̂ = (x + a − mean) · rstd over a group of M numbers and z = w x̂ + b (arXiv:1803.08494), y = z or silu(z), where a is
what a picture's channel has added to it before: the convolution's bias and the time's embedding. Backward, with
g = ∂L/∂z: ∂L/∂w = Σ g x̂, ∂L/∂b = Σ g, ∂L/∂x = rstd · (w g − Σ(w g)/M − x̂ · Σ(w g x̂)/M).
"""

# Triton comes with torch for CUDA only.
# pyright: reportMissingImports=false, reportIndexIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_ROWS, _CHANNELS = 64, 64
"""Pixels and channels of a program's tile."""
_TILE = 4096
"""Partial results that a program holds at once when it adds them up."""


def group_norm(x: Tensor, norm: nn.GroupNorm, *, silu: bool, added: Tensor | None = None) -> Tensor:
    """`norm` of x + `added` on CUDA, x [n, c, h, w] and added [n, c], through SiLU if asked for; sums are fp32, the result
    has x's dtype and channels last."""
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
        floats: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
        first, second = torch.empty(2, n, parts, channels, **floats)
        _moments[grid](x, first, second, pixels, channels, ROWS=_ROWS, CHANNELS=_CHANNELS)
        scale, shift, center = torch.empty(3, n, channels, **floats)
        rstd = torch.empty(n, groups, **floats)
        _finish_forward[(n, groups)](
            first, second, weight, bias, x if added is None else added.contiguous(), scale, shift, center, rstd,
            pixels, parts, channels, channels // groups, eps,
            ADDED=added is not None, ROWS=_ROWS, **_sizes(channels // groups),
        )  # fmt: skip
        y = torch.empty_like(x)
        _apply[grid](x, scale, shift, y, pixels, channels, SILU=silu, ROWS=_ROWS, CHANNELS=_CHANNELS)
        ctx.save_for_backward(x, weight, scale, shift, center, rstd)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, shift, center, rstd = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grid, pixels, parts = _tiles(x)
        n, channels = x.shape[:2]
        width = channels // rstd.shape[1]
        first, second = torch.empty(2, n, parts, channels, dtype=torch.float32, device=x.device)
        common = {"SILU": ctx.silu, "ROWS": _ROWS, "CHANNELS": _CHANNELS}
        _gradient_sums[grid](
            x, grad, scale, shift, center, rstd, first, second, pixels, channels, width, **common
        )
        sums = torch.empty(2, n, channels, dtype=torch.float32, device=x.device)
        means = torch.empty(2, *rstd.shape, dtype=torch.float32, device=x.device)
        _finish_backward[rstd.shape](
            first, second, weight, sums[0], sums[1], means[0], means[1], pixels, parts, channels, width,
            **_sizes(width),
        )  # fmt: skip
        dx = torch.empty_like(x)
        _input_gradient[grid](
            x,
            grad,
            weight,
            scale,
            shift,
            center,
            rstd,
            means[0],
            means[1],
            dx,
            pixels,
            channels,
            width,
            **common,
        )
        dw, db = (sums[i].sum(0).to(weight.dtype) if ctx.needs_input_grad[2 - i] else None for i in (1, 0))
        added = dx.sum((2, 3), dtype=torch.float32) if ctx.needs_input_grad[3] else None
        return dx, dw, db, added, None, None, None


def _tiles(x: Tensor) -> tuple[tuple[int, int, int], int, int]:
    """The grid of programs, pixels of a picture, and tiles of its pixels."""
    n, channels, height, width = x.shape
    parts = triton.cdiv(height * width, _ROWS)
    return (parts, triton.cdiv(channels, _CHANNELS), n), height * width, parts


def _sizes(width: int) -> dict[str, int]:
    """How the programs that add up a group of `width` channels go through its partial results."""
    padded = triton.next_power_of_2(width)
    return {"PADDED": padded, "PARTS": max(_TILE // padded, 1)}


@triton.jit
def _tile(pixels, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's picture, its offsets into [n, pixels, channels], which of them are there, and its channels."""
    n = tl.program_id(2)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    offsets = (n.to(tl.int64) * pixels + rows[:, None]) * channels + cols[None, :]
    there = (rows[:, None] < pixels) & (cols[None, :] < channels)
    return n, offsets, there, cols


@triton.jit
def _store_part(out, values, cols, channels):
    """Into [n, parts, channels], at this program's picture and part."""
    where = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * channels
    tl.store(out + where + cols, values, mask=cols < channels)


@triton.jit
def _moments(x, means, squares, pixels, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """A tile's mean and sum of squared distances from it, for each channel."""
    _, offsets, there, cols = _tile(pixels, channels, ROWS, CHANNELS)
    values = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
    count = tl.minimum(ROWS, pixels - tl.program_id(0) * ROWS)
    mean = tl.sum(values, 0) / count
    distance = tl.where(there, values - mean[None, :], 0.0)
    _store_part(means, mean, cols, channels)
    _store_part(squares, tl.sum(distance * distance, 0), cols, channels)


@triton.jit
def _finish_forward(
    means, squares, weight, bias, added, scale, shift, center, rstd_out, pixels, parts, channels, width, eps,
    ADDED: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A group's moments from its tiles' (Chan et al. 1983), and with the parameters the line that a channel follows."""
    n, group = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, PADDED)
    cols = group * width + lanes
    inside = lanes < width
    extra = tl.zeros((PADDED,), tl.float32)
    if ADDED:
        extra = tl.load(added + n * channels + cols, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((PARTS, PADDED), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        count = tl.minimum(ROWS, pixels - part * ROWS)
        there = (part[:, None] < parts) & inside[None, :]
        where = (n.to(tl.int64) * parts + part[:, None]) * channels + cols[None, :]
        value = tl.load(means + where, mask=there, other=0.0) + extra[None, :]
        total += tl.where(there, value * count[:, None], 0.0)
    mean = tl.sum(total) / (pixels * width)
    total = tl.zeros((PARTS, PADDED), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        count = tl.minimum(ROWS, pixels - part * ROWS)
        there = (part[:, None] < parts) & inside[None, :]
        where = (n.to(tl.int64) * parts + part[:, None]) * channels + cols[None, :]
        away = tl.load(means + where, mask=there, other=0.0) + extra[None, :] - mean
        square = tl.load(squares + where, mask=there, other=0.0)
        total += tl.where(there, square + away * away * count[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(total) / (pixels * width) + eps)
    slope = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32) * rstd
    start_at = tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32) + (extra - mean) * slope
    tl.store(scale + n * channels + cols, slope, mask=inside)
    tl.store(shift + n * channels + cols, start_at, mask=inside)
    tl.store(center + n * channels + cols, mean - extra, mask=inside)
    tl.store(rstd_out + n * tl.num_programs(1) + group, rstd)


@triton.jit
def _apply(
    x, scale, shift, y, pixels, channels, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    n, offsets, there, cols = _tile(pixels, channels, ROWS, CHANNELS)
    values = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
    known = cols < channels
    slope = tl.load(scale + n * channels + cols, mask=known, other=0.0)
    z = values * slope[None, :] + tl.load(shift + n * channels + cols, mask=known, other=0.0)[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + offsets, z.to(y.dtype.element_ty), mask=there)


@triton.jit
def _before_silu(
    x, grad, scale, shift, center, rstd, n, offsets, there, cols, channels, width, SILU: tl.constexpr
):
    """A tile's x̂ and ∂L/∂z."""
    known = cols < channels
    values = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
    g = tl.load(grad + offsets, mask=there, other=0.0).to(tl.float32)
    if SILU:
        slope = tl.load(scale + n * channels + cols, mask=known, other=0.0)
        z = values * slope[None, :] + tl.load(shift + n * channels + cols, mask=known, other=0.0)[None, :]
        half = tl.sigmoid(z)
        g = g * half * (1 + z * (1 - half))
    group = n * (channels // width) + cols // width
    distance = values - tl.load(center + n * channels + cols, mask=known, other=0.0)[None, :]
    normed = distance * tl.load(rstd + group, mask=known, other=0.0)[None, :]
    return tl.where(there, normed, 0.0), g


@triton.jit
def _gradient_sums(
    x, grad, scale, shift, center, rstd, firsts, seconds, pixels, channels, width,
    SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile's Σ g and Σ g x̂, for each channel."""
    n, offsets, there, cols = _tile(pixels, channels, ROWS, CHANNELS)
    normed, g = _before_silu(
        x, grad, scale, shift, center, rstd, n, offsets, there, cols, channels, width, SILU
    )
    _store_part(firsts, tl.sum(g, 0), cols, channels)
    _store_part(seconds, tl.sum(g * normed, 0), cols, channels)


@triton.jit
def _finish_backward(
    firsts, seconds, weight, bias_sum, weight_sum, first_mean, second_mean, pixels, parts, channels, width,
    PADDED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A picture's sums for each channel, and its group's means of w g and w g x̂."""
    n, group = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, PADDED)
    cols = group * width + lanes
    inside = lanes < width
    one = tl.zeros((PARTS, PADDED), tl.float32)
    two = tl.zeros((PARTS, PADDED), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        there = (part[:, None] < parts) & inside[None, :]
        where = (n.to(tl.int64) * parts + part[:, None]) * channels + cols[None, :]
        one += tl.load(firsts + where, mask=there, other=0.0)
        two += tl.load(seconds + where, mask=there, other=0.0)
    first, second = tl.sum(one, 0), tl.sum(two, 0)
    slope = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(bias_sum + n * channels + cols, first, mask=inside)
    tl.store(weight_sum + n * channels + cols, second, mask=inside)
    tl.store(first_mean + n * tl.num_programs(1) + group, tl.sum(slope * first) / (pixels * width))
    tl.store(second_mean + n * tl.num_programs(1) + group, tl.sum(slope * second) / (pixels * width))


@triton.jit
def _input_gradient(
    x, grad, weight, scale, shift, center, rstd, first_mean, second_mean, dx, pixels, channels, width,
    SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n, offsets, there, cols = _tile(pixels, channels, ROWS, CHANNELS)
    normed, g = _before_silu(
        x, grad, scale, shift, center, rstd, n, offsets, there, cols, channels, width, SILU
    )
    known = cols < channels
    group = n * (channels // width) + cols // width
    slope = tl.load(weight + cols, mask=known, other=0.0).to(tl.float32)[None, :]
    first = tl.load(first_mean + group, mask=known, other=0.0)[None, :]
    second = tl.load(second_mean + group, mask=known, other=0.0)[None, :]
    factor = tl.load(rstd + group, mask=known, other=0.0)[None, :]
    result = factor * (slope * g - first - normed * second)
    tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=there)
