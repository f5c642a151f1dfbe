"""Begin a training with another fine-tune: its token rows, and its LoRA matrices or what it changes in the UNet.

Knows what of a fine-tune fits a run, and refuses in a sentence what does not. Does not know files.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from dataset_and_utils import TokenMap
from sdxl.errors import WeightsError
from sdxl.model.loaded_fine_tune import LoadedFineTune
from sdxl.model.weight_changes import LowRank, Rescaled, WeightChange
from sdxl.training.config import TrainingConfig
from sdxl.training.half_copies import exact, set_exactly
from sdxl.training.sharding import whole
from sdxl.training.token_rows import NewTokens
from sdxl.training.trainable import LORA_TARGETS

log = logging.getLogger(__name__)

_UNET = "unet."
_WEIGHT = ".weight"


@dataclass(frozen=True, kw_only=True, eq=False)
class StartingPoint:
    """A fine-tune that fits the run which begins with it."""

    fine_tune: LoadedFineTune
    config: TrainingConfig

    def __post_init__(self) -> None:
        """Check that it fits.

        Raises:
            WeightsError: the fine-tune cannot be continued with these settings.
        """
        name = self.fine_tune.name
        if self.config.is_lora:
            _require_same_lora(self.fine_tune, self.config)
        elsewhere = [
            key for key in (*self.fine_tune.whole, *self.fine_tune.lora) if not key.startswith(_UNET)
        ]
        if elsewhere:
            log.warning(
                "%s also changes the text encoders, which do not train: that part is left out. Give it as base to keep it.",
                name,
            )
        theirs = self.fine_tune.token_map.placeholders
        if theirs and not self._rows:
            named = ", ".join(list(theirs)[:3])
            log.warning(
                "%s has rows for %s, but token_map names other tokens, which begin anew.", name, named
            )
        if not self.fine_tune.pooled_at_eos and self.fine_tune.rows:
            log.warning(
                "%s was trained with prompts pooled at its tokens. Here they are pooled at their end.", name
            )

    @property
    def digest(self) -> str:
        """What identifies the fine-tune."""
        return self.fine_tune.digest()

    @torch.no_grad()
    def apply(self, unet: UNet2DConditionModel, tokens: NewTokens) -> None:
        """Set what trains: the rows of the tokens that the fine-tune knows, and the UNet's weights or LoRA matrices."""
        for encoder, (place, rows) in ((i, one) for i in (0, 1) for one in self._rows_of(i)):
            own = tokens.parameters[encoder]
            own[place] = rows.to(own)
        if self.config.is_lora:
            for layer, change in _lora_of_unet(self.fine_tune):
                _set_matrices(unet.get_submodule(layer), change)
            return
        parameters = dict(unet.named_parameters())
        for key, value in self.fine_tune.whole.items():
            if key.startswith(_UNET):
                set_exactly(parameters[key.removeprefix(_UNET)], value)
        for key, change in self.fine_tune.lora.items():
            if key.startswith(_UNET):
                weight = parameters[key.removeprefix(_UNET)]
                before = whole(exact(weight)).float()
                set_exactly(weight, change.added(before, before, 1.0))

    @property
    def _rows(self) -> list[tuple[list[int], list[int]]]:
        """For each token that the run and the fine-tune share, its rows in the run and in the fine-tune.

        Raises:
            WeightsError: a token has other numbers of rows.
        """
        ours, theirs = TokenMap.parse(self.config.token_map), self.fine_tune.token_map.placeholders
        shared = []
        for word, placeholders in ours.placeholders.items():
            if word not in theirs or not self.fine_tune.rows:
                continue
            places = [_numbers(one) for one in (placeholders, theirs[word])]
            if len(places[0]) != len(places[1]):
                raise WeightsError(
                    f"{self.fine_tune.name} has {len(places[1])} rows for {word}, but token_map asks for {len(places[0])}: "
                    f"write {word}:{len(places[1])}."
                )
            shared.append((places[0], places[1]))
        return shared

    def _rows_of(self, encoder: int) -> Iterator[tuple[list[int], Tensor]]:
        """Numbers of rows of the run, and the fine-tune's values for them [rows, dim]."""
        for place, source in self._rows:
            yield place, self.fine_tune.rows[encoder][source]


def _numbers(placeholders: str) -> list[int]:
    """The rows that placeholder tokens such as "<s0><s1>" name."""
    return [int(part) for part in placeholders.replace("<s", "").split(">") if part]


def _lora_of_unet(fine_tune: LoadedFineTune) -> Iterator[tuple[str, WeightChange]]:
    """Layer of the UNet → its change; biases too, by their own name."""
    for key, change in fine_tune.lora.items():
        if key.startswith(_UNET):
            yield key.removeprefix(_UNET).removesuffix(_WEIGHT), change


def _require_same_lora(fine_tune: LoadedFineTune, config: TrainingConfig) -> None:
    """Refuse what matrices of this run cannot hold exactly.

    To add the rest to the base instead would be wrong: the result is drawn with the base as it is.
    """
    name = fine_tune.name
    if fine_tune.is_full:
        raise WeightsError(
            f"{name} is a whole UNet, with which a LoRA cannot begin: set is_lora=false, or export it as a single file and "
            "give that as base."
        )
    for layer, change in _lora_of_unet(fine_tune):
        plain = (
            change.change
            if isinstance(change, Rescaled) and config.use_dora and not change.by_input
            else change
        )
        if not isinstance(plain, LowRank) or plain.mid is not None or (config.use_dora and plain is change):
            kind = "no DoRA of this kind" if config.use_dora else "no plain LoRA"
            raise WeightsError(
                f"{name} is {kind} (at {layer}), so that its matrices cannot go on: convert it with export.py, or set "
                "is_lora=false to add it to the whole UNet."
            )
        if plain.down.shape[0] > config.lora_rank:
            raise WeightsError(
                f"{name} has rank {plain.down.shape[0]} (at {layer}), but lora_rank is {config.lora_rank}: set lora_rank to "
                f"{plain.down.shape[0]} or more."
            )
        if not any(f".{layer}".endswith(f".{target}") for target in LORA_TARGETS[config.lora_targets]):
            raise WeightsError(
                f"{name} changes {layer}, which lora_targets={config.lora_targets} does not train: set lora_targets to one "
                "with that layer, such as all."
            )


def _set_matrices(layer: nn.Module, change: WeightChange) -> None:
    """Set the LoRA matrices of one of peft's layers; what a lower rank leaves over stays as it is, with no effect."""
    wrapped: Any = layer
    (adapter,) = wrapped.active_adapters
    plain = change
    if isinstance(change, Rescaled):
        plain = change.change
        lengths = wrapped.lora_magnitude_vector[adapter].weight
        lengths.copy_(change.lengths.reshape(lengths.shape))
    assert isinstance(plain, LowRank)
    down, up = wrapped.lora_A[adapter].weight, wrapped.lora_B[adapter].weight
    rank = plain.down.shape[0]
    down[:rank] = plain.down.to(down).reshape(rank, *down.shape[1:])
    up[:, :rank] = plain.up.to(up).reshape(len(up), rank, *up.shape[2:]) * (
        plain.scale / wrapped.scaling[adapter]
    )
