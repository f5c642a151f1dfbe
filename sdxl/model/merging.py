"""Add up fine-tunes: LoRAs to one LoRA, anything to a whole SDXL; and find the LoRA nearest to a whole one.

Knows weights and their changes; does not know files or pipelines.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl.errors import WeightsError
from sdxl.model.low_rank import LoraMatrices, concatenated, fit, matrices_of
from sdxl.model.weight_changes import WeightChange

DEFAULT_RANK = 64
"""Rank of a LoRA that stands for something else, unless the user chooses one."""


@dataclass(frozen=True, kw_only=True)
class Summand:
    """A fine-tune to add, and its strength."""

    name: str
    """Its name in messages."""
    whole: Mapping[str, Tensor]
    """Parameter, such as "unet.conv_in.weight" → its new value; empty for a LoRA."""
    lora: Mapping[str, WeightChange]
    """Parameter, such as "unet.mid_block.attentions.0.proj_in.weight" → its change, as it was read."""
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RankError:
    """What a low rank leaves of a change: a Frobenius norm, relative to that of the change."""

    by_layer: Mapping[str, float]
    """Layer → its error, 0 to 1."""
    overall: float
    """The error of all weights together, 0 to 1."""
    elsewhere: float
    """The part of the overall error in weights that no LoRA can hold, such as biases and norms, 0 to 1."""

    @property
    def worst(self) -> str:
        """The layer with the largest error, and that error in percent."""
        layer = max(self.by_layer, key=self.by_layer.__getitem__)
        return f"{layer} {self.by_layer[layer]:.1%}"


@dataclass(frozen=True, kw_only=True)
class MergedLora:
    """One LoRA for several, and what is lost in it."""

    layers: dict[str, LoraMatrices]
    error: RankError | None
    """Of the layers that are fitted; None if all are exact."""
    other_kinds: int
    """Number of layers that stop being DoRA or another kind of change."""
    left_out: int
    """Number of changed biases and norms, which no LoRA holds."""


def merged_lora(
    summands: Sequence[Summand], base: Mapping[str, Tensor], layers: Collection[str], rank: int | None
) -> MergedLora:
    """One LoRA for several.

    Plain LoRAs are joined exactly: their ranks add up. A layer is fitted anew if `rank` is less than that, or if a sum of its
    changes is not the product of two matrices.

    base: parameter → the base's value.
    layers: the layers that can have LoRA matrices: linear ones and convolutions.
    rank: the largest rank of a layer. None: as large as necessary, and `DEFAULT_RANK` for what must be fitted.
    """
    found: dict[str, LoraMatrices] = {}
    errors, norms = {}, {}
    other_kinds = left_out = 0
    for name, parts in _changes(summands).items():
        weight, layer = base[name], name.removesuffix(".weight")
        if layer not in layers:
            left_out += 1
            continue
        matrices = [(matrices_of(change, weight.shape), scale) for change, scale in parts]
        if joined := _joined(matrices, rank):
            found[layer] = joined
            continue
        other_kinds += any(change is None or change.magnitude is not None for change, _ in matrices)
        total = sum_of(parts, weight.float()) - weight.float()
        found[layer], errors[layer] = fit(total, rank or DEFAULT_RANK)
        norms[layer] = float(torch.linalg.norm(total))
    error = _rank_error(errors, norms, 0.0) if errors else None
    return MergedLora(layers=found, error=error, other_kinds=other_kinds, left_out=left_out)


def _joined(parts: Sequence[tuple[LoraMatrices | None, float]], rank: int | None) -> LoraMatrices | None:
    """The exact sum, if it is the product of two matrices of at most `rank`, or a single unchanged DoRA."""
    plain = [change.scaled(scale) for change, scale in parts if change and change.magnitude is None]
    if len(plain) == len(parts):
        joined = (
            concatenated(plain)
            if len(plain) == 1 or sum(c.rank for c in plain) <= (rank or math.inf)
            else None
        )
        return joined if joined and joined.rank <= (rank or math.inf) else None
    if len(parts) == 1 and parts[0][1] == 1 and rank is None:
        return parts[0][0]
    return None


def merged_whole(summands: Sequence[Summand], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that differ from the base's after all of `summands` are added: name → new value, fp32 on the CPU.

    Whole UNets come first: their differences from the base add up. Then LoRAs are added to the result, like in serving.

    base: parameter → the base's value; sums are computed on its device.
    """
    wholes = [summand for summand in summands if summand.whole]
    changes = _changes(summands)
    names = {name: None for summand in wholes for name in summand.whole} | dict.fromkeys(changes)
    found = {}
    for name in names:
        own = value = base[name].float()
        for summand in wholes:
            if name in summand.whole:
                new = summand.whole[name].to(own.device).float()
                alone = len(wholes) == 1 and summand.scale == 1  # then it stays as it is, to the last bit
                value = new if alone else value + summand.scale * (new - own)
        found[name] = sum_of(changes.get(name, []), value).cpu()
    return found


def _changes(summands: Sequence[Summand]) -> dict[str, list[tuple[WeightChange, float]]]:
    """Parameter → its changes by LoRAs, and their strengths."""
    changes: dict[str, list[tuple[WeightChange, float]]] = {}
    for summand in summands:
        for name, change in summand.lora.items() if summand.scale else ():
            changes.setdefault(name, []).append((change, summand.scale))
    return changes


def sum_of(parts: Sequence[tuple[WeightChange, float]], weight: Tensor) -> Tensor:
    """`weight`, in fp32, plus its changes times their strengths."""
    value = weight
    for change, scale in parts:
        value = change.added(value, weight, scale)
    return value


def extracted_lora(
    whole: Mapping[str, Tensor], base: Mapping[str, Tensor], layers: Sequence[str], rank: int
) -> tuple[dict[str, LoraMatrices], RankError]:
    """The LoRA of at most `rank` that is nearest to the difference between `whole` and `base`.

    whole, base: parameter → value; what is missing in `whole` is as in `base`.
    layers: the layers that can have LoRA matrices: linear ones and convolutions.

    Raises:
        WeightsError: no layer differs from the base.
    """
    found: dict[str, LoraMatrices] = {}
    errors, norms, elsewhere = {}, {}, 0.0
    known = {f"{layer}.weight": layer for layer in layers}
    for name, value in whole.items():
        change = value.to(base[name].device).float() - base[name].float()
        norm = float(torch.linalg.norm(change))
        if norm == 0:
            continue
        if name not in known:
            elsewhere += norm**2
            continue
        layer = known[name]
        norms[layer] = norm
        found[layer], errors[layer] = fit(change, rank)
    if not found:
        raise WeightsError(
            "The fine-tune changes no layer of the base, so no LoRA can be made of it: give another."
        )
    return found, _rank_error(errors, norms, elsewhere)


def _rank_error(left: Mapping[str, float], norms: Mapping[str, float], elsewhere: float) -> RankError:
    """left, norms: layer → norm of what is left and of the change; elsewhere: squared norm of changes of no layer."""
    total = math.sqrt(sum(norm**2 for norm in norms.values()) + elsewhere) or 1.0
    missed = math.sqrt(sum(part**2 for part in left.values()) + elsewhere)
    return RankError(
        by_layer={layer: left[layer] / (norms[layer] or 1.0) for layer in left},
        overall=missed / total,
        elsewhere=math.sqrt(elsewhere) / total,
    )
