"""Apply fine-tunes to a pipeline, and restore the base exactly.

A LoRA is added into the weights: a fine-tuned UNet has the same modules, at the same addresses, as the base. Knows
pipelines and fine-tunes; does not know requests, or where fine-tunes come from.
"""

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dataset_and_utils import TokenMap, add_tokens, eos_id, pool_at_eos
from sdxl.errors import WeightsError
from sdxl.model.fine_tune_files import FineTuneFiles
from sdxl.model.layer_names import LayerNames
from sdxl.model.loaded_fine_tune import LoadedFineTune, load
from sdxl.model.noise_schedule import prediction_type
from sdxl.model.weight_changes import WeightChange
from sdxl.speed.memory import free_bytes

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

log = logging.getLogger(__name__)

PUBLISHED_EOS = 2
"""`eos_token_id` of SDXL's published second encoder: transformers then pools at the highest id of a sequence."""
_TOKENIZERS_KEPT = 4
"""Most extended pairs of tokenizers to keep; copying them takes a while."""
_SPARE_ROWS = 64
"""Rows that a copied embedding table has for new tokens, so that it rarely has to grow."""


@dataclass(frozen=True, kw_only=True)
class ScaledFineTune:
    """A fine-tune to apply, and its strength."""

    fine_tune: LoadedFineTune
    scale: float = 1.0
    """Factor of a LoRA's change; ignored for a whole UNet."""
    text_encoder_scale: float | None = None
    """The factor for the text encoders; None for `scale`."""

    def scale_of(self, parameter: str) -> float:
        """The factor for the change of a parameter, such as "unet.conv_in.weight"."""
        own = self.text_encoder_scale
        return self.scale if own is None or not in_text_encoder(parameter) else own


def in_text_encoder(parameter: str) -> bool:
    """Whether a parameter belongs to one of the text encoders."""
    return parameter.startswith("text_encoder")


def require_loras(scaled: Sequence[ScaledFineTune]) -> None:
    """Refuse whole UNets.

    Raises:
        WeightsError: one of them is a whole UNet.
    """
    for one in scaled:
        if one.fine_tune.whole:
            raise WeightsError(
                f"{one.fine_tune.name} is a whole UNet and cannot be added to another fine-tune: give it as "
                "replicate_weights, and only LoRAs as extra_lora."
            )


class TunedPipeline:
    """A pipeline that can take any fine-tunes on top of its base, and give them up again."""

    def __init__(self, pipeline: "StableDiffusionXLPipeline") -> None:
        self.pipeline = pipeline
        self.token_map = TokenMap({})
        self.changes = 0
        """A counter that changes whenever weights may have changed, even by a failed switch. Caches compare it."""
        parts = {
            "unet": pipeline.unet,
            "text_encoder": pipeline.text_encoder,
            "text_encoder_2": pipeline.text_encoder_2,
        }
        self._parameters: dict[str, nn.Parameter] = {
            f"{part}.{name}": parameter
            for part, root in parts.items()
            for name, parameter in root.named_parameters()
        }
        self.layers = [
            f"{part}.{name}"
            for part, root in parts.items()
            for name, module in root.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        ]
        """All linear layers and convolutions, such as "unet.mid_block.attentions.0.proj_in"."""
        self._names = LayerNames({name.rpartition(".")[0] for name in self._parameters}, pipeline.unet.config)
        self._kept: dict[str, Tensor] = {}
        """Base values of the parameters that any fine-tune has changed so far, in host memory or on the GPU."""
        self._room: bool | None = None
        """Whether the GPU has room for them; None until it is measured."""
        self._changed: set[str] = set()
        """The parameters that may differ from the base now."""
        self._active: tuple[ScaledFineTune, ...] | None = ()
        """The fine-tunes that are applied; None while they change."""
        self._tokenizers = {0: (pipeline.tokenizer, pipeline.tokenizer_2)}
        self._tables = tuple(encoder.get_input_embeddings() for encoder in self._encoders)
        tables = [table.weight for table in self._tables]
        self._table_names = [
            next(name for name, parameter in self._parameters.items() if parameter is table)
            for table in tables
        ]
        self._grown: dict[int, nn.Embedding] = {}
        """Number of an encoder → a copy of the base's table with spare rows."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The current values of the parameters that fine-tunes may change."""
        return self._parameters

    @property
    def _encoders(self) -> tuple[Any, Any]:
        return self.pipeline.text_encoder, self.pipeline.text_encoder_2

    def load(self, files: FineTuneFiles) -> LoadedFineTune:
        """Read a fine-tune's files into memory, pinned if there is CUDA. Afterwards the files are not needed any more.

        Raises:
            WeightsError: the fine-tune does not fit this base.
            ContractError: its embeddings are malformed.
        """
        return load(
            files,
            {name: self._base_value(name) for name in self._parameters},
            self._names,
            [self._base_value(name) for name in self._table_names],
            predicted=prediction_type(self.pipeline.scheduler.config),
            pinned=self.pipeline._execution_device.type == "cuda",
        )

    def activate(self, files: FineTuneFiles | None, *, lora_scale: float = 1.0) -> None:
        """Load and `apply` one fine-tune; None restores the base."""
        loaded = None if files is None else self.load(files)
        self.apply(() if loaded is None else (ScaledFineTune(fine_tune=loaded, scale=lora_scale),))

    @torch.no_grad()
    def apply(self, scaled: tuple[ScaledFineTune, ...]) -> None:
        """Make the pipeline the base plus exactly these fine-tunes. If that fails or is interrupted, restore the base.

        Raises:
            WeightsError: a fine-tune after the first is a whole UNet.
        """
        if scaled == self._active:
            return
        require_loras(scaled[1:])
        self.restore()
        self._active = None
        try:
            self._apply_parameters(scaled)
            self._apply_tokens(scaled)
            self._active = scaled
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def restore(self) -> None:
        """Make the pipeline exactly the base again. It may be called, and interrupted, at any time."""
        # Until the end nothing counts as applied, so that an interrupted call is repeated by the next `apply`.
        self._active = None
        self.changes += 1
        self.token_map = TokenMap({})

        # Parameters: copy back the base's values, bit by bit.
        for name in self._changed:
            self._parameters[name].copy_(self._kept[name], non_blocking=True)
        self._changed = set()

        # Tokens: the base's own tokenizers and embedding tables were never changed, only exchanged.
        self.pipeline.tokenizer, self.pipeline.tokenizer_2 = self._tokenizers[0]
        for encoder, tokenizer, table in zip(self._encoders, self._tokenizers[0], self._tables, strict=True):
            encoder.set_input_embeddings(table)
            pool_at_eos(encoder, eos_id(tokenizer))
        self._active = ()

    def _apply_parameters(self, scaled: tuple[ScaledFineTune, ...]) -> None:
        """Replace parameters by those of a whole UNet, then add the changes of all LoRAs."""
        # A whole UNet replaces parameters. Only the first fine-tune may be one.
        for one in scaled[:1]:
            for name, tensor in one.fine_tune.whole.items():
                self._keep(name)
                self._parameters[name].copy_(tensor, non_blocking=True)

        # Collect the changes of all LoRAs by weight, so that each weight is rounded only once.
        changes: dict[str, list[tuple[WeightChange, float]]] = {}
        for one in scaled:
            for name, change in one.fine_tune.lora.items():
                if scale := one.scale_of(name):
                    changes.setdefault(name, []).append((change, scale))

        # Add them in fp32. A DoRA layer also needs the weight before any change.
        for name, parts in changes.items():
            self._keep(name)
            weight = self._parameters[name]
            before = value = weight.float()
            for change, scale in parts:
                value = change.added(value, before, scale)
            weight.copy_(value)

    def _keep(self, name: str) -> None:
        """Copy the base's value before its first change, and mark the parameter as changed."""
        if name not in self._kept:
            value = self._parameters[name].detach()
            self._kept[name] = value.clone() if self._keeps_on_gpu(value) else host_copy(value)
        self._changed.add(name)

    def _base_value(self, name: str) -> Tensor:
        """A parameter's value in the base, whatever is applied now."""
        return self._kept[name] if name in self._changed else self._parameters[name].detach()

    def _keeps_on_gpu(self, value: Tensor) -> bool:
        """Whether to keep base values on the GPU, from where they are restored fastest, instead of in host memory."""
        if value.device.type != "cuda" or getattr(self.pipeline, "_all_hooks", []):
            return False
        if self._room is None:
            whole = sum(parameter.nbytes for parameter in self._parameters.values())
            self._room = free_bytes(value.device) > 3 * whole
        return self._room

    def _apply_tokens(self, scaled: tuple[ScaledFineTune, ...]) -> None:
        """Add the token rows of all fine-tunes, as `<s0>`, `<s1>`, …, to copies of tables and tokenizers."""
        with_rows = [one.fine_tune for one in scaled if one.fine_tune.rows]
        if not with_rows:
            self.token_map = scaled[0].fine_tune.token_map if scaled else TokenMap({})
            return
        rows = [torch.cat([fine_tune.rows[i].float() for fine_tune in with_rows]) for i in range(2)]
        count = len(rows[0])
        tokenizers = self._tokenizers_with(count)
        for index, (encoder, tokenizer) in enumerate(zip(self._encoders, tokenizers, strict=True)):
            ids = tokenizer.convert_tokens_to_ids([f"<s{row}>" for row in range(count)])
            table = self._table_with(index, max(ids) + 1)
            table.weight[ids] = rows[index].to(table.weight)
            encoder.set_input_embeddings(table)
            if not with_rows[0].pooled_at_eos:
                pool_at_eos(encoder, PUBLISHED_EOS)
        self.pipeline.tokenizer, self.pipeline.tokenizer_2 = tokenizers
        self.token_map = join_token_maps(with_rows)

    def _tokenizers_with(self, count: int) -> tuple[Any, Any]:
        """The base's tokenizers with `count` placeholder tokens added."""
        if count not in self._tokenizers:
            if len(self._tokenizers) > _TOKENIZERS_KEPT:
                del self._tokenizers[next(key for key in self._tokenizers if key)]
            first, second = copy.deepcopy(self._tokenizers[0])
            for tokenizer in (first, second):
                add_tokens(tokenizer, [f"<s{row}>" for row in range(count)])
            self._tokenizers[count] = (first, second)
        return self._tokenizers[count]

    def _table_with(self, index: int, size: int) -> nn.Embedding:
        """A copy of an encoder's embedding table with at least `size` rows, reused by later fine-tunes."""
        table = self._tables[index]
        if self._table_names[index] in self._changed:
            return self._grow(table, size)
        if index not in self._grown or self._grown[index].num_embeddings < size:
            self._grown[index] = self._grow(table, size)
        base = table.weight
        assert isinstance(base, Tensor)
        return self._grown[index].to(base.device)

    @staticmethod
    def _grow(table: Any, size: int) -> nn.Embedding:
        """A copy of `table` with spare rows, at least `size` in all."""
        weight = table.weight.detach()
        rows = max(size, len(weight) + _SPARE_ROWS)
        grown = torch.zeros(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        grown[: len(weight)] = weight
        return nn.Embedding.from_pretrained(grown)


def join_token_maps(fine_tunes: Sequence[LoadedFineTune]) -> TokenMap:
    """One map for several fine-tunes; placeholder tokens are numbered across all of them.

    If an earlier fine-tune already has a word, the word gets a number: the TOK of the second fine-tune is TOK_2.
    """
    placeholders: dict[str, str] = {}
    offset = 0
    for number, fine_tune in enumerate(fine_tunes, start=1):
        for word, rows in fine_tune.token_map.placeholders.items():
            shifted = re.sub(r"<s([0-9]+)>", lambda row: f"<s{int(row[1]) + offset}>", rows)  # noqa: B023
            own = word if word not in placeholders else f"{word}_{number}"
            if own != word:
                log.info(
                    "Write %s for the %s of %s: another fine-tune has %s too", own, word, fine_tune.name, word
                )
            placeholders[own] = shifted
        offset += len(fine_tune.rows[0])
    return TokenMap(placeholders)


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory; with CUDA it is pinned, so that it can be copied back faster."""
    copied = torch.empty_like(tensor, device="cpu", pin_memory=torch.cuda.is_available())
    return copied.copy_(tensor)
