"""`python -m tiny_world.train_scorer`: train the scorer's two networks and measure their limits.

The attribute network learns scenes, creatures and both together, by cross-entropies and box distances. The identity network
learns thousands of creatures by supervised contrastive learning (Khosla et al., 2020), with several pictures of each in a
batch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_world.parts import pad
from tiny_world.raster import render
from tiny_world.scorer import CREATURE, THINGS, WEIGHTS, AttributeNet, IdentityNet, Scorer, crop, shrink
from tiny_world.scorer_data import SHOTS, Labels, Order, augment, picture_bank
from tiny_world.subjects import random_shot, shot_parts, subject
from tiny_world.training import Run, Trainer, save_half_weights

TEMPERATURE = 0.1
VIEWS = 4
"""Pictures of each identity in a batch."""


def main() -> None:
    """Train both networks and write their weights and `ceilings.json`."""
    parser = argparse.ArgumentParser(prog="python -m tiny_world.train_scorer", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="training time of each network")
    parser.add_argument("--workdir", type=Path, default=Path("runs/scorer"))
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="full", choices=("smoke", "full"))
    parser.add_argument("--only", choices=("attributes", "identity"), help="train one of the two")
    parser.add_argument("--ceilings-only", action="store_true", help="measure the existing weights")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.backends.cudnn.benchmark = True
    smoke = args.size == "smoke"
    minutes = 0.05 if smoke else args.minutes
    workers = 0 if smoke else min(os.cpu_count() or 1, 16)
    run = Run(
        workdir=args.workdir,
        device=args.device,
        smoke=smoke,
        minutes=minutes,
        this_call=minutes,
        workers=workers,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.ceilings_only:
        images, labels = picture_bank(training_orders(smoke), workers, args.device)
        run.record("scorer bank", pictures=len(images))
        for name, train in (("attributes", train_attributes), ("identity", train_identity)):
            if args.only in (None, name):
                save_half_weights(train(run, images, labels), args.output / f"{name}.safetensors")
        del images, labels
    numbers = ceilings(Scorer(args.output, device=args.device), smoke=smoke, workers=workers)
    run.record("scorer ceilings", **numbers)
    (args.output / "ceilings.json").write_text(json.dumps(numbers, indent=2) + "\n")


def training_orders(smoke: bool) -> list[Order]:
    """20,000 scenes, 3,000 identities alone and 10,000 creatures with an object."""
    if smoke:
        return [Order("scenes", 0, 8), Order("creatures", 0, 4 * SHOTS), Order("company", 0, 8)]
    scenes = [Order("scenes", i, 500) for i in range(0, 20_000, 500)]
    creatures = [Order("creatures", i, 50 * SHOTS) for i in range(0, 3_000, 50)]
    return scenes + creatures + [Order("company", 10_000 + i, 500) for i in range(0, 10_000, 500)]


def train_attributes(run: Run, images: Tensor, labels: Labels) -> nn.Module:
    """Returns the network with the averaged weights."""
    torch.manual_seed(11)
    net = AttributeNet().to(run.device)
    trainer = Trainer(modules={"net": net}, run=run, peak=1e-3, warmup=200, ema_decay=0.998)
    batch = 8 if run.smoke else 256

    def loss() -> Tensor:
        index = torch.randint(len(images), (batch,), device=images.device)
        pictures = augment(shrink(images[index].float() / 255))
        return attribute_loss(net(pictures.to(run.dtype)), labels.rows(index))

    trainer.train(loss, stage="attributes")
    result = AttributeNet().to(run.device)
    trainer.load_ema({"net": result})
    return result


def attribute_loss(found, labels: Labels) -> Tensor:
    """The sum of the heads' losses. Colours and boxes count only for things that are there, positions only for single
    things."""
    present = labels.presence
    coloured = labels.colour.amax(2)
    colour = F.binary_cross_entropy_with_logits(found.colour.float(), labels.colour, reduction="none")
    boxed = (~labels.box[..., 0].isnan()).float()
    distance = (found.box.float() - labels.box.nan_to_num()).abs().mean(2)
    position = F.cross_entropy(found.position.float(), labels.position.clamp_min(0), reduction="none")
    alone = (labels.position >= 0).float()
    return (
        10 * F.binary_cross_entropy_with_logits(found.presence.float(), present)
        + 20 * (colour.mean(2) * coloured).sum() / coloured.sum().clamp_min(1)
        + 10 * (distance * boxed).sum() / boxed.sum().clamp_min(1)
        + F.cross_entropy(found.background.float(), labels.background)
        + F.cross_entropy(found.texture.float(), labels.texture)
        + (position * alone).sum() / alone.sum().clamp_min(1)
    )


def train_identity(run: Run, images: Tensor, labels: Labels) -> nn.Module:
    """Returns the network with the averaged weights. The SHOTS pictures of each identity must be in a row."""
    torch.manual_seed(12)
    thing = THINGS.index(CREATURE)
    rows = ((labels.who >= 0) & (labels.position >= 0)).nonzero().flatten().view(-1, SHOTS)
    assert (labels.who[rows] == labels.who[rows[:, :1]]).all()
    net = IdentityNet().to(run.device)
    trainer = Trainer(modules={"net": net}, run=run, peak=1e-3, warmup=200, ema_decay=0.998)
    batch = 3 if run.smoke else 96

    def loss() -> Tensor:
        who = torch.rand(len(rows), device=images.device).topk(batch).indices
        views = torch.rand(batch, SHOTS, device=images.device).argsort(1)[:, :VIEWS]
        index = rows[who].gather(1, views).flatten()
        boxes = labels.box[index, thing]
        jitter = torch.randn_like(boxes) * 0.02
        margin = 1.1 + 0.3 * torch.rand(len(index), device=images.device)
        pictures = augment(crop(images[index].float() / 255, boxes + jitter, margin))
        return contrastive_loss(net(pictures.to(run.dtype)), batch)

    trainer.train(loss, stage="identity")
    result = IdentityNet().to(run.device)
    trainer.load_ema({"net": result})
    return result


def contrastive_loss(embeddings: Tensor, identities: int) -> Tensor:
    """The supervised contrastive loss of unit vectors [identities * views, d], with the views of one identity in a row."""
    views = len(embeddings) // identities
    who = torch.arange(identities, device=embeddings.device).repeat_interleave(views)
    itself = torch.eye(len(who), dtype=torch.bool, device=embeddings.device)
    logits = (embeddings @ embeddings.T / TEMPERATURE).masked_fill(itself, -1e4)
    same = (who.view(-1, 1) == who) & ~itself
    return -(logits.log_softmax(1) * same).sum(1).div(views - 1).mean()


@torch.no_grad()
def ceilings(scorer: Scorer, *, smoke: bool, workers: int) -> dict[str, float]:
    """The scorer's limits: its accuracies on new renders, and similarities of identities that it was not trained on.

    The identities are the even seeds below 200. The similarities are those within one subject, to any other subject and
    to the nearest other subject.
    """
    n = 8 if smoke else 2_000
    images, labels = picture_bank([Order("scenes", 900_000, n)], workers, scorer.device)
    found = scorer.attributes(images.float() / 255)
    labels = Labels(**{name: getattr(labels, name).cpu() for name in Labels.__dataclass_fields__})
    present = labels.presence.bool()
    alone = labels.position >= 0
    right_colour = ((found.colour > 0) == labels.colour.bool()).all(2)[present]
    numbers = {
        "kind": _share(((found.presence > 0) == present).all(1)),
        "colour": _share(right_colour),
        "background": _share(found.background.argmax(1) == labels.background),
        "texture": _share(found.texture.argmax(1) == labels.texture),
        "position": _share((found.position.argmax(1) == labels.position)[alone]),
    }
    identities, shots = (4, 2) if smoke else (100, 12)
    pictures = []
    for seed in range(identities):
        pictures.append(_shots_of(2 * seed, shots, scorer.device))
    embeddings = torch.stack([scorer.identity(p) for p in pictures])
    return numbers | similarity_ceilings(embeddings)


def similarity_ceilings(embeddings: Tensor) -> dict[str, float]:
    """Mean similarities of one subject's pictures to each other, to other subjects' and to the nearest other subject's.

    Also how often the nearest subject of a picture is its own. vectors: unit vectors [identities, shots, d].
    """
    n, shots, _ = embeddings.shape
    means = embeddings.mean(1)
    to_means = torch.einsum("ikd,jd->ikj", embeddings, means)
    own = to_means[torch.arange(n), :, torch.arange(n)]
    itself = (embeddings**2).sum(-1)
    same = (own * shots - itself) / (shots - 1)
    other = torch.where(torch.eye(n, dtype=torch.bool).unsqueeze(1), -2.0, to_means)
    return {
        "same_subject": round(float(same.mean()), 4),
        "other_subject": round(float((to_means.sum(2) - own).mean() / (n - 1)), 4),
        "nearest_other_subject": round(float(other.amax(2).mean()), 4),
        "identified": _share(same > other.amax(2)),
    }


def _shots_of(seed: int, n: int, device: str) -> Tensor:
    """n pictures of one subject, float [n, 3, 256, 256] in 0..1."""
    rng = np.random.default_rng((seed, 5150))
    cast = {CREATURE: subject(seed)}
    table = pad([shot_parts(random_shot(CREATURE, rng), cast, seed=7000 + i) for i in range(n)])
    return render(table, device=device).images


def _share(right: Tensor) -> float:
    return round(float(right.float().mean()), 4)


if __name__ == "__main__":
    main()
