"""Put fine-tunes into a pipeline, and take them out again without a trace.

A LoRA is added into the weights, so that a tuned UNet is the same modules at the same addresses as the base's. Knows
pipelines and fine-tunes; does not know requests, or where fine-tunes come from.
"""

import copy
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dataset_and_utils import TokenMap, add_tokens, eos_id, pool_at_eos
from sdxl.errors import WeightsError
from sdxl.model.fine_tune_files import FineTuneFiles, read_rows
from sdxl.model.lora_formats import LayerNames, LoraLayer, read_lora
from sdxl.speed.memory import free_bytes

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

log = logging.getLogger(__name__)

PUBLISHED_EOS = 2
"""`eos_token_id` of SDXL's published second encoder: pools at the highest id of a sequence."""
_TOKENIZERS_KEPT = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedFineTune:
    """A fine-tune in memory, read for one base."""

    name: str
    """What messages call it."""
    unet: dict[str, Tensor] = field(default_factory=dict)
    """Parameter of the UNet, such as "unet.conv_in.weight" → its tensor; empty for a LoRA."""
    lora: dict[str, LoraLayer] = field(default_factory=dict)
    """Layer, such as "unet.mid_block.attentions.0.proj_in" → its change."""
    rows: tuple[Tensor, ...] = ()
    """Rows of the new tokens [tokens, dim_i] for text encoder i; empty for none."""
    pooled_at_eos: bool = True
    """Whether the rows were trained with the pooled prompt taken at the end of the text."""
    token_map: TokenMap

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        parts = (*self.unet.values(), *self.lora.values(), *self.rows)
        return sum(part.nbytes for part in parts)


Layers = tuple[tuple[LoadedFineTune, float], ...]
"""Fine-tunes and their LoRA scales, in order; at most the first is a whole UNet."""


def require_loras(layers: Layers) -> None:
    """Refuse whole UNets.

    Raises:
        WeightsError: one of `layers` is.
    """
    for weights, _ in layers:
        if weights.unet:
            raise WeightsError(
                f"{weights.name} is a whole UNet, which replaces all others: give it as replicate_weights, and "
                "only LoRAs beside it."
            )


class TunedPipeline:
    """A pipeline whose base weights are kept, and any fine-tunes on top of them."""

    def __init__(self, pipeline: "StableDiffusionXLPipeline") -> None:
        self.pipeline = pipeline
        self.token_map = TokenMap({})
        self.changes = 0
        """Rises whenever weights may have changed, also where that failed: who keeps what was made of them compares it."""
        parts = {
            "unet": pipeline.unet,
            "text_encoder": pipeline.text_encoder,
            "text_encoder_2": pipeline.text_encoder_2,
        }
        modules = {f"{part}.{name}": m for part, root in parts.items() for name, m in root.named_modules()}
        self._parameters: dict[str, nn.Parameter] = {
            f"{part}.{name}": parameter
            for part, root in parts.items()
            for name, parameter in root.named_parameters()
        }
        self._names = LayerNames(
            [name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)],
            pipeline.unet.config,
        )
        self._kept: dict[str, Tensor] = {}
        """Base values of the parameters that any fine-tune has changed so far, in host memory or beside them."""
        self._room: bool | None = None
        """Whether the GPU has room for them; None before it is asked."""
        self._changed: set[str] = set()
        """The parameters that may differ from the base now."""
        self._active: Layers | None = ()
        """What is applied; None while it is being changed."""
        self._tokenizers = {0: (pipeline.tokenizer, pipeline.tokenizer_2)}
        self._tables = tuple(encoder.get_input_embeddings() for encoder in self._encoders)
        self._grown: list[nn.Embedding] = []

    @property
    def _encoders(self) -> tuple[Any, Any]:
        return self.pipeline.text_encoder, self.pipeline.text_encoder_2

    def load(self, fine_tune: FineTuneFiles) -> LoadedFineTune:
        """Read a fine-tune's files into memory of their own, pinned where there is CUDA: the files may go afterwards.

        Raises:
            WeightsError: it does not fit this base.
            ContractError: its embeddings are malformed.
        """
        unet, lora = {}, {}
        pinned = self.pipeline._execution_device.type == "cuda"
        if fine_tune.unet is not None:
            unet = {f"unet.{name}": tensor for name, tensor in fine_tune.unet.read(pinned=pinned).items()}
            for name, tensor in unet.items():
                if name not in self._parameters or self._parameters[name].shape != tensor.shape:
                    raise WeightsError(
                        f"{fine_tune.unet.name} does not fit this base (at {name.removeprefix('unet.')}): load it into "
                        "the base model it was trained on."
                    )
        if fine_tune.lora is not None:
            tensors = fine_tune.lora.read(pinned=pinned)
            lora = read_lora(tensors, fine_tune.lora.metadata, self._names, fine_tune.lora.name)
            for name, layer in lora.items():
                if not layer.fits(tuple(self._parameters[f"{name}.weight"].shape)):
                    raise WeightsError(
                        f"{fine_tune.lora.name} does not fit this base (at {name}): load it into the base it was "
                        "trained on."
                    )
        rows, at_eos, token_map = read_rows(fine_tune)
        widths = [table.weight.shape[1] for table in self._tables]  # type: ignore[union-attr]
        if rows and [row.shape[1] for row in rows] != widths:
            raise WeightsError(
                f"{fine_tune.name} was made for text encoders of widths {[row.shape[1] for row in rows]}, these have "
                f"{widths}: load it into the base model it was trained on."
            )
        rows = tuple(row.clone() for row in rows)
        return LoadedFineTune(
            name=fine_tune.name, unet=unet, lora=lora, rows=rows, pooled_at_eos=at_eos, token_map=token_map
        )

    def activate(self, fine_tune: FineTuneFiles | None, *, lora_scale: float = 1.0) -> None:
        """`apply` one fine-tune from its files, or with None the base alone."""
        self.apply(() if fine_tune is None else ((self.load(fine_tune), lora_scale),))

    @torch.no_grad()
    def apply(self, layers: Layers) -> None:
        """Make the pipeline the base with exactly `layers` on top; whatever fails or interrupts it, the base remains.

        Raises:
            WeightsError: a whole UNet is not the first of them.
        """
        if layers == self._active:
            return
        require_loras(layers[1:])
        self.restore()
        self._active = None
        try:
            self._apply_tokens(layers)
            self._apply_parameters(layers)
            self._active = layers
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back as the base has it; may be called, and interrupted, at any time."""
        self._active = None
        self.changes += 1
        self.token_map = TokenMap({})
        for name in self._changed:
            self._parameters[name].copy_(self._kept[name], non_blocking=True)
        self._changed = set()
        self.pipeline.tokenizer, self.pipeline.tokenizer_2 = self._tokenizers[0]
        for encoder, tokenizer, table in zip(self._encoders, self._tokenizers[0], self._tables, strict=True):
            encoder.set_input_embeddings(table)
            pool_at_eos(encoder, eos_id(tokenizer))
        self._active = ()

    def _apply_parameters(self, layers: Layers) -> None:
        """Whole tensors first, then for each weight the sum of all LoRAs' changes, added in fp32."""
        for weights, _ in layers[:1]:
            for name, tensor in weights.unet.items():
                self._keep(name)
                self._parameters[name].copy_(tensor, non_blocking=True)
        changes: dict[str, list[tuple[LoraLayer, float]]] = {}
        for weights, scale in layers:
            for name, layer in weights.lora.items() if scale else ():
                changes.setdefault(f"{name}.weight", []).append((layer, scale))
        for name, parts in changes.items():
            self._keep(name)
            weight = self._parameters[name]
            before = value = weight.float()
            for layer, scale in parts:
                value = layer.added(value, before, scale)
            weight.copy_(value)

    def _keep(self, name: str) -> None:
        """Remember the base's value before it is changed; what was kept once is the base's for good."""
        if name not in self._kept:
            value = self._parameters[name].detach()
            self._kept[name] = value.clone() if self._keeps_beside(value) else host_copy(value)
        self._changed.add(name)

    def _keeps_beside(self, value: Tensor) -> bool:
        """Whether the base's values stay on the GPU, where they come back in no time, rather than in host memory."""
        if value.device.type != "cuda" or getattr(self.pipeline, "_all_hooks", []):
            return False
        if self._room is None:
            whole = sum(parameter.nbytes for parameter in self._parameters.values())
            self._room = free_bytes(value.device) > 3 * whole
        return self._room

    def _apply_tokens(self, layers: Layers) -> None:
        """The rows of all fine-tunes in one line of tokens `<s0>`, `<s1>`, …, in copies of tables and tokenizers."""
        tuned = [weights for weights, _ in layers if weights.rows]
        if not tuned:
            self.token_map = layers[0][0].token_map if layers else TokenMap({})
            return
        rows = [torch.cat([weights.rows[i].float() for weights in tuned]) for i in range(2)]
        count = len(rows[0])
        tokenizers = self._tokenizers_with(count)
        for index, (encoder, tokenizer) in enumerate(zip(self._encoders, tokenizers, strict=True)):
            ids = tokenizer.convert_tokens_to_ids([f"<s{row}>" for row in range(count)])
            table = self._table_with(index, max(ids) + 1)
            table.weight[ids] = rows[index].to(table.weight)
            encoder.set_input_embeddings(table)
            if not tuned[0].pooled_at_eos:
                pool_at_eos(encoder, PUBLISHED_EOS)
        self.pipeline.tokenizer, self.pipeline.tokenizer_2 = tokenizers
        self.token_map = join_token_maps(tuned)

    def _tokenizers_with(self, count: int) -> tuple[Any, Any]:
        """The base's tokenizers with `count` tokens more."""
        if count not in self._tokenizers:
            if len(self._tokenizers) > _TOKENIZERS_KEPT:
                del self._tokenizers[next(key for key in self._tokenizers if key)]
            first, second = copy.deepcopy(self._tokenizers[0])
            for tokenizer in (first, second):
                add_tokens(tokenizer, [f"<s{row}>" for row in range(count)])
            self._tokenizers[count] = (first, second)
        return self._tokenizers[count]

    def _table_with(self, index: int, size: int) -> nn.Embedding:
        """A copy of an encoder's table with at least `size` rows, kept from one fine-tune to the next."""
        if not self._grown:
            self._grown = [self._grow(table, 0) for table in self._tables]
        if self._grown[index].num_embeddings < size:
            self._grown[index] = self._grow(self._tables[index], size)
        base = self._tables[index].weight
        assert isinstance(base, Tensor)
        return self._grown[index].to(base.device)

    @staticmethod
    def _grow(table: Any, size: int) -> nn.Embedding:
        weight = table.weight.detach()
        rows = max(size, len(weight) + 64)
        grown = torch.zeros(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        grown[: len(weight)] = weight
        return nn.Embedding.from_pretrained(grown)


def join_token_maps(tuned: Sequence[LoadedFineTune]) -> TokenMap:
    """One map for fine-tunes whose rows lie one behind another.

    A word that an earlier one has already gets the number of its fine-tune: the second TOK is TOK_2.
    """
    placeholders: dict[str, str] = {}
    offset = 0
    for number, weights in enumerate(tuned, start=1):
        for word, rows in weights.token_map.placeholders.items():
            shifted = re.sub(r"<s([0-9]+)>", lambda row: f"<s{int(row[1]) + offset}>", rows)  # noqa: B023
            own = word if word not in placeholders else f"{word}_{number}"
            if own != word:
                log.info(
                    "%s of %s is written %s, since another fine-tune has it too", word, weights.name, own
                )
            placeholders[own] = shifted
        offset += len(weights.rows[0])
    return TokenMap(placeholders)


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned where CUDA is there to copy from it faster."""
    copied = torch.empty_like(tensor, device="cpu", pin_memory=torch.cuda.is_available())
    return copied.copy_(tensor)
