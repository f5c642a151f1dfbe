"""Part tables → pixels: signed distances, analytic antialiasing and back-to-front compositing, on CPU or GPU.

The distance formulas come from Inigo Quilez's catalogue of two-dimensional distance functions (exact or first order). Each
slot of the table is drawn for all pictures at once. Parts are grouped by primitive and by the size of the pixel window that
they touch, so small parts cost little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tiny_world import parts as P

EDGE_WIDTH = 2.0
"""Width of a soft edge in pixels, in a picture of 256 pixels. It suits an autoencoder with 8x downsampling."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """images [B, 3, S, S] and masks [B, 2, S, S], the visible alpha of layers 1 and 2; both float32 in 0..1."""

    images: Tensor
    masks: Tensor


def render(table: np.ndarray, *, size: int = 256, device: str | torch.device = "cpu") -> Rendered:
    """Draw a part table float32[B, P, FIELDS] at `size` x `size` pixels.

    The canvas has the channels red, green, blue and the two layers' alphas. Later slots cover earlier ones.
    """
    batch = table.shape[0]
    canvas = torch.zeros(batch * size * size, 5, device=device)
    fields = torch.from_numpy(np.ascontiguousarray(table)).to(device)
    windows = _windows(table, size)
    for slot in range(table.shape[1]):
        primitives = table[:, slot, P.PRIMITIVE].astype(int)
        patterned = table[:, slot, P.PATTERN].astype(int)
        keys = primitives * 1_000_000 + windows[:, slot] * 10 + patterned
        for key in np.unique(keys[primitives >= 0]):
            members = np.flatnonzero(keys == key)
            rows, first = torch.from_numpy(members).to(device), int(members[0])
            _draw(
                canvas,
                fields[rows, slot],
                rows,
                size=size,
                window=int(windows[first, slot]),
                primitive=int(primitives[first]),
                pattern=int(patterned[first]),
                outlined=bool((table[members, slot, P.OUTLINE] > 0).any()),
            )
    canvas = canvas.view(batch, size, size, 5).permute(0, 3, 1, 2)
    return Rendered(images=canvas[:, :3].contiguous(), masks=canvas[:, 3:].contiguous())


def mask_box(mask: Tensor, threshold: float = 0.5) -> tuple[int, int, int, int] | None:
    """The box of a mask [h, w] in pixels: (left, top, right, bottom), the last two exclusive. None for an empty mask."""
    inside = mask > threshold
    columns, rows = inside.any(0).nonzero().flatten(), inside.any(1).nonzero().flatten()
    if not len(columns):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _windows(table: np.ndarray, size: int) -> np.ndarray:
    """The side in pixels of a square window that each part fits into: a power of two, or the whole canvas."""
    reach = np.hypot(table[..., P.HX], table[..., P.HY])
    disc = np.isin(table[..., P.PRIMITIVE], (P.ELLIPSE, P.STAR))
    reach = np.where(disc, np.maximum(table[..., P.HX], table[..., P.HY]), reach)
    reach = np.where(table[..., P.PRIMITIVE] == P.ARC, table[..., P.HX] * (1 + table[..., P.P1]), reach)
    pixels = 2 * (reach * size + 3)
    side = 2 ** np.ceil(np.log2(np.maximum(pixels, 32)))
    return np.where(side >= size, size, side).astype(int)


def _draw(
    canvas: Tensor,
    f: Tensor,
    rows: Tensor,
    *,
    size: int,
    window: int,
    primitive: int,
    pattern: int,
    outlined: bool,
) -> None:
    """Composite parts f [n, FIELDS] of one primitive and pattern onto pictures `rows` [n]."""

    def col(i: int) -> Tensor:
        return f[:, i].view(-1, 1, 1)

    corner = ((f[:, P.X : P.Y + 1] * size).round() - window // 2).clamp(0, size - window).long()
    steps = torch.arange(window, device=f.device)
    xs = corner[:, 0].view(-1, 1, 1) + steps.view(1, 1, -1)
    ys = corner[:, 1].view(-1, 1, 1) + steps.view(1, -1, 1)
    dx, dy = (xs + 0.5) / size - col(P.X), (ys + 0.5) / size - col(P.Y)
    cos, sin = col(P.ROTATION).cos(), col(P.ROTATION).sin()
    x, y = cos * dx + sin * dy, cos * dy - sin * dx
    edge = EDGE_WIDTH / 256

    distance = _DISTANCES[primitive](x, y, col(P.HX), col(P.HY), col(P.P1), col(P.P2))
    distance = torch.maximum(distance, y - col(P.CUT) * col(P.HY))
    cover = (0.5 - distance / edge).clamp(0, 1).unsqueeze(-1)

    colour = f[:, P.R : P.B + 1].view(-1, 1, 1, 3)
    if pattern != P.SOLID:
        amount = _pattern(pattern, x, y, col(P.PERIOD), col(P.ANGLE), col(P.PHASE), edge).unsqueeze(-1)
        colour = torch.lerp(colour, f[:, P.R2 : P.B2 + 1].view(-1, 1, 1, 3), amount)
    if outlined:
        rim = (0.5 + (distance + col(P.OUTLINE)) / edge).clamp(0, 1) * (col(P.OUTLINE) > 0)
        colour = torch.lerp(colour, f[:, P.OUTLINE_R : P.OUTLINE_B + 1].view(-1, 1, 1, 3), rim.unsqueeze(-1))

    layer = f[:, P.LAYER].view(-1, 1, 1, 1)
    alphas = torch.cat([(layer == 1).float(), (layer == 2).float()], -1)
    source = torch.cat([colour.expand(*cover.shape[:3], 3), alphas.expand(*cover.shape[:3], 2)], -1)
    index = (rows.view(-1, 1, 1) * size + ys) * size + xs
    canvas[index] = torch.lerp(canvas[index], source, cover)


def _pattern(
    kind: int, x: Tensor, y: Tensor, period: Tensor, angle: Tensor, phase: Tensor, edge: float
) -> Tensor:
    """Share 0..1 of the second colour at local points."""
    u, v = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x
    if kind == P.GRADIENT:
        return (0.5 + u / period + phase).clamp(0, 1)
    tu = u / period + phase
    if kind == P.DOTS:
        tv = v / period + phase
        # shift every second row by half a period
        tu = tu + 0.5 * tv.floor().remainder(2)
        radius = torch.hypot(tu - tu.floor() - 0.5, tv - tv.floor() - 0.5)
        return (0.5 - (radius - 0.28) * period / edge).clamp(0, 1)
    a = (0.5 + _band(tu) * period / edge).clamp(0, 1)
    if kind == P.STRIPES:
        return a
    b = (0.5 + _band(v / period + phase) * period / edge).clamp(0, 1)
    return a + b - 2 * a * b


def _band(t: Tensor) -> Tensor:
    """The signed distance, in periods, to the nearest edge of bands that are half a period wide."""
    return (t - t.floor() - 0.5).abs() - 0.25


def _ellipse(x: Tensor, y: Tensor, hx: Tensor, hy: Tensor, _a: Tensor, _b: Tensor) -> Tensor:
    k0, k1 = torch.hypot(x / hx, y / hy), torch.hypot(x / hx**2, y / hy**2)
    return torch.where(k0 < 1e-3, -torch.minimum(hx, hy), k0 * (k0 - 1) / k1.clamp_min(1e-6))


def _box(x: Tensor, y: Tensor, hx: Tensor, hy: Tensor, rounding: Tensor, _b: Tensor) -> Tensor:
    radius = rounding * torch.minimum(hx, hy)
    qx, qy = x.abs() - hx + radius, y.abs() - hy + radius
    return torch.hypot(qx.clamp_min(0), qy.clamp_min(0)) + torch.maximum(qx, qy).clamp_max(0) - radius


def _trapezoid(x: Tensor, y: Tensor, hx: Tensor, hy: Tensor, top: Tensor, rounding: Tensor) -> Tensor:
    radius = rounding * torch.minimum(hx, hy)
    upper, lower, height = (hx * top - radius).clamp_min(0), hx - radius, hy - radius
    x = x.abs()
    ax, ay = x - torch.minimum(x, torch.where(y < 0, upper, lower)), y.abs() - height
    kx, ky = lower - upper, 2 * height
    t = (((lower - x) * kx + (height - y) * ky) / (kx * kx + ky * ky).clamp_min(1e-9)).clamp(0, 1)
    bx, by = x - lower + kx * t, y - height + ky * t
    inside = (bx < 0) & (ay < 0)
    length = torch.minimum(ax * ax + ay * ay, bx * bx + by * by).sqrt()
    return torch.where(inside, -length, length) - radius


def _star(x: Tensor, y: Tensor, hx: Tensor, hy: Tensor, points: Tensor, sharpness: Tensor) -> Tensor:
    an, en = math.pi / points, math.pi / sharpness
    y = -y * (hx / hy)
    bend = torch.atan2(x, y).remainder(2 * an) - an
    radius = torch.hypot(x, y)
    px, py = radius * bend.cos() - hx * an.cos(), radius * bend.sin().abs() - hx * an.sin()
    limit = hx * an.sin() / en.sin()
    t = torch.minimum((-(px * en.cos() + py * en.sin())).clamp_min(0), limit)
    px, py = px + en.cos() * t, py + en.sin() * t
    return torch.hypot(px, py) * px.sign()


def _arc(x: Tensor, y: Tensor, hx: Tensor, _hy: Tensor, thickness: Tensor, opening: Tensor) -> Tensor:
    sin, cos = opening.sin(), opening.cos()
    x = x.abs()
    tip = torch.hypot(x - sin * hx, y - cos * hx)
    rim = (torch.hypot(x, y) - hx).abs()
    return torch.where(cos * x > sin * y, tip, rim) - thickness * hx


def _heart(x: Tensor, y: Tensor, hx: Tensor, _hy: Tensor, _a: Tensor, _b: Tensor) -> Tensor:
    scale = hx / 0.604
    x, y = x.abs() / scale, 0.552 - y / scale
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    s = 0.5 * (x + y).clamp_min(0)
    body = torch.minimum(x**2 + (y - 1) ** 2, (x - s) ** 2 + (y - s) ** 2).sqrt() * (x - y).sign()
    return torch.where(x + y > 1, lobe, body) * scale


_DISTANCES = {
    P.ELLIPSE: _ellipse,
    P.BOX: _box,
    P.TRAPEZOID: _trapezoid,
    P.STAR: _star,
    P.ARC: _arc,
    P.HEART: _heart,
}
