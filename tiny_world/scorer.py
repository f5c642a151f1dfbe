"""The scorer: it judges what a picture shows (attributes) and which creature it is (identity).

It has two small networks. `train_scorer` trains them on the renderer's pictures, never on generated ones. Knows pictures;
does not know training or diffusion.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tiny_world.words import COLOURS, KINDS, POSITIONS, TEXTURES

WEIGHTS = Path(__file__).parent / "scorer"
CREATURE = "creature"
THINGS = (*KINDS, CREATURE)
"""What the attribute network looks for: the 16 kinds, and any subject."""

SIDE = 128
"""Side of the networks' input in pixels."""

EMBEDDING = 128
CROP_MARGIN = 1.25
"""The identity network sees the square around the creature's box, enlarged by this factor."""


class Backbone(nn.Module):
    """[n, 3, 128, 128] in 0..1 → [n, 192, 4, 4]: five strided convolutions, each with a residual block after it."""

    widths = (24, 48, 96, 160, 192)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        previous = 3
        for width in self.widths:
            layers += [nn.Conv2d(previous, width, 3, stride=2, padding=1), Residual(width)]
            previous = width
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images * 2 - 1)


class Residual(nn.Module):
    """Two 3x3 convolutions with group normalisation, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """Logits for n pictures and T = 17 `THINGS`.

    presence: [n, T]. colour: [n, T, 12]; several may apply. box: [n, T, 4], left, top, right and bottom in 0..1.
    background: [n, 12]. texture: [n, 5]. position: [n, 9], of a single thing.
    """

    presence: Tensor
    colour: Tensor
    box: Tensor
    background: Tensor
    texture: Tensor
    position: Tensor


class AttributeNet(nn.Module):
    """Pictures [n, 3, 128, 128] in 0..1 → `Attributes`."""

    sizes = (len(THINGS), len(THINGS) * 4, len(COLOURS), len(TEXTURES), len(POSITIONS))

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.reduce = nn.Conv2d(192, 64, 1)
        self.hidden = nn.Linear(64 * 16, 512)
        self.heads = nn.Linear(512, sum(self.sizes))
        self.attention = nn.Conv2d(192, len(THINGS), 1)
        self.colour = nn.Linear(192, len(COLOURS))

    def forward(self, images: Tensor) -> Attributes:
        features = self.backbone(images)
        out = self.heads(F.silu(self.hidden(F.silu(self.reduce(features)).flatten(1))))
        presence, box, background, texture, position = out.split(self.sizes, 1)
        # Read a thing's colour where the network looks for that thing: this keeps the colours of two things apart.
        places = self.attention(features).flatten(2).softmax(2)
        return Attributes(
            presence=presence,
            colour=self.colour(F.silu(places @ features.flatten(2).transpose(1, 2))),
            box=box.view(-1, len(THINGS), 4),
            background=background,
            texture=texture,
            position=position,
        )


class IdentityNet(nn.Module):
    """Crops of creatures [n, 3, 128, 128] in 0..1 → unit vectors [n, 128]."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Linear(192, EMBEDDING)

    def forward(self, crops: Tensor) -> Tensor:
        x = F.silu(self.backbone(crops)).mean((2, 3))
        return F.normalize(self.head(x).float(), dim=-1)


def shrink(images: Tensor) -> Tensor:
    """Resize square pictures to `SIDE`, with antialiasing."""
    if images.shape[-1] == SIDE:
        return images
    return F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)


def crop(images: Tensor, boxes: Tensor, margin: float | Tensor = CROP_MARGIN) -> Tensor:
    """Cut the square around each box, enlarged by `margin`, as [n, 3, 128, 128].

    boxes: [n, 4], left, top, right and bottom in 0..1. Outside the picture its border repeats.
    """
    centre = (boxes[:, :2] + boxes[:, 2:]) - 1
    half = ((boxes[:, 2:] - boxes[:, :2]).amax(1).clamp_min(0.08) * margin).view(-1, 1)
    scale = half.expand(-1, 2)
    theta = torch.cat([torch.diag_embed(scale), centre.unsqueeze(2)], 2)
    grid = F.affine_grid(theta, [len(images), 3, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)


class Scorer:
    """Both networks with the weights of this repository, in fp32.

    Raises FileNotFoundError if the weights are missing.
    """

    def __init__(self, folder: Path = WEIGHTS, *, device: str = "cpu") -> None:
        self.device = device
        self.attribute_net = _load(AttributeNet(), folder / "attributes.safetensors", device)
        self.identity_net = _load(IdentityNet(), folder / "identity.safetensors", device)

    @torch.no_grad()
    def attributes(self, images: Tensor) -> Attributes:
        """What pictures [n, 3, h, h] in 0..1 show, as logits on the CPU."""
        parts = [self.attribute_net(shrink(part.to(self.device).float())) for part in images.split(64)]
        names = Attributes.__dataclass_fields__
        return Attributes(**{name: torch.cat([getattr(p, name) for p in parts]).cpu() for name in names})

    @torch.no_grad()
    def identity(self, images: Tensor) -> Tensor:
        """Unit vectors [n, 128] on the CPU for the creatures in pictures [n, 3, h, h] in 0..1.

        The attribute network finds the creature, and the identity network sees its crop.
        """
        boxes = self.attributes(images).box[:, THINGS.index(CREATURE)].clamp(0, 1)
        out = []
        for part, box in zip(images.split(64), boxes.split(64), strict=True):
            crops = crop(part.to(self.device).float(), box.to(self.device))
            out.append(self.identity_net(crops).cpu())
        return torch.cat(out)


def _load(net: nn.Module, file: Path, device: str):
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: run `python -m tiny_world.train_scorer`")
    net.load_state_dict({name: value.float() for name, value in load_file(file).items()})
    return net.to(device).eval().requires_grad_(False)
