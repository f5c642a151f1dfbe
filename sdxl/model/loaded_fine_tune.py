"""A fine-tune in memory: read from its files and checked against one base.

Knows the forms of fine-tunes; does not know pipelines, or what is done with a fine-tune.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dataset_and_utils import TokenMap
from sdxl.errors import WeightsError
from sdxl.model.components import Components
from sdxl.model.differences import RoundedDifference, read_difference
from sdxl.model.fine_tune_files import FineTuneFiles
from sdxl.model.layer_names import LayerNames
from sdxl.model.lora_formats import read_lora
from sdxl.model.lora_metadata import read_config
from sdxl.model.noise_schedule import prediction_type
from sdxl.model.other_models import looks_like
from sdxl.model.token_files import read_rows
from sdxl.model.weight_changes import WeightChange
from sdxl.model.whole_weights import read_whole

_DIGESTED = 256
"""Numbers of each tensor that a digest reads."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedFineTune:
    """A fine-tune, read into memory and checked against one base."""

    name: str
    """The name for messages."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Parameter of the UNet or a text encoder, such as "unet.conv_in.weight" → its new value; empty for a LoRA."""
    lora: dict[str, WeightChange] = field(default_factory=dict)
    """Parameter, such as "unet.mid_block.attentions.0.proj_in.weight" → its change."""
    rows: tuple[Tensor, ...] = ()
    """Token rows [tokens, dim_i] for text encoder i; empty if there are no new tokens."""
    pooled_at_eos: bool = True
    """Whether the rows were trained with prompts pooled at the end of the text."""
    token_map: TokenMap

    @property
    def is_full(self) -> bool:
        """Whether it is a full fine-tune: a whole UNet, or its difference from the base."""
        return bool(self.whole) or any(isinstance(change, RoundedDifference) for change in self.lora.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        parts = (*self.whole.values(), *self.lora.values(), *self.rows)
        return sum(part.nbytes for part in parts)

    def digest(self) -> str:
        """What identifies it among others: SHA-256 of the names, shapes and first numbers of all tensors."""
        total = hashlib.sha256(repr(sorted(self.token_map.placeholders.items())).encode())
        for name, part in _tensors({**self.whole, **self.lora, **dict(enumerate(self.rows))}):
            total.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
            total.update(part.flatten()[:_DIGESTED].contiguous().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()


def _tensors(parts: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """All tensors in `parts` and in the changes of weights there, each with a name."""
    for name, part in parts.items():
        if isinstance(part, Tensor):
            yield str(name), part
        elif isinstance(part, WeightChange):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in _tensors(vars(part)))
        else:
            yield f"{name}={part}", torch.empty(0)


def load(
    files: FineTuneFiles,
    parameters: Mapping[str, Tensor],
    names: LayerNames,
    tables: Sequence[Tensor],
    *,
    predicted: str,
    pinned: bool = False,
) -> LoadedFineTune:
    """Read a fine-tune's files into memory. Afterwards the files are not needed any more.

    parameters: those of the base's UNet and text encoders, such as "unet.conv_in.weight", with the base's own values.
    names: finds layers of the base by their names in any format.
    tables: the base's embedding tables [words, dim_i].
    predicted: what the base predicts, "epsilon" or "v_prediction".
    pinned: pin the memory if CUDA is available.

    Raises:
        WeightsError: the fine-tune does not fit this base.
        ContractError: its embeddings are malformed.
    """
    if files.prediction_type not in (None, predicted):
        raise WeightsError(
            f"{files.name} was trained on a base with {files.prediction_type}, but this base has {predicted}: use the "
            "base that it was trained on, or set SDXL_PREDICTION if the base's files are wrong."
        )
    whole: dict[str, Tensor] = {}
    for part, file in files.whole:
        whole |= read_whole(file.read(pinned=pinned), part, names, parameters, file.name)  # type: ignore[arg-type]
    lora: dict[str, WeightChange] = {}
    tensors: dict[str, Tensor] = {}
    if files.difference is not None:
        lora = read_difference(files.difference, parameters, pinned=pinned)
    if files.lora is not None:
        tensors = files.lora.read(pinned=pinned)
        config = None if files.lora_config is None else read_config(files.lora_config)
        lora = read_lora(tensors, files.lora.metadata, names, files.lora.name, config)
        for name, change in lora.items():
            if name not in parameters or not change.fits(tuple(parameters[name].shape)):
                guess = looks_like({key: tensor.shape for key, tensor in tensors.items()})
                raise WeightsError(
                    f"{files.lora.name} does not fit this base (at {name}){guess}: use the base that it was trained on."
                )
    rows, at_eos, token_map = read_rows(files, tensors, tables)
    widths = [table.shape[1] for table in tables]
    if rows and [row.shape[1] for row in rows] != widths:
        raise WeightsError(
            f"{files.name} was made for text encoders of widths {[row.shape[1] for row in rows]}, but this base has "
            f"{widths}: use the base that it was trained on."
        )
    rows = tuple(row.clone() for row in rows)
    return LoadedFineTune(
        name=files.name, whole=whole, lora=lora, rows=rows, pooled_at_eos=at_eos, token_map=token_map
    )


def load_for(components: Components, files: FineTuneFiles) -> LoadedFineTune:
    """`load` for the base in `components`, which must be as it was loaded.

    Raises:
        WeightsError: the fine-tune does not fit this base.
        ContractError: its embeddings are malformed.
    """
    encoders = components.text_encoders
    parts: dict[str, Any] = {
        "unet": components.unet,
        "text_encoder": encoders[0],
        "text_encoder_2": encoders[1],
    }
    parameters = {
        f"{part}.{name}": value for part, root in parts.items() for name, value in root.named_parameters()
    }
    names = LayerNames({name.rpartition(".")[0] for name in parameters}, components.unet.config)
    tables: list[Any] = [encoder.get_input_embeddings() for encoder in encoders]
    predicted = prediction_type(components.noise_scheduler.config)
    return load(files, parameters, names, [table.weight.detach() for table in tables], predicted=predicted)
