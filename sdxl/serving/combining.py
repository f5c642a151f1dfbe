"""Read fine-tunes for one base, and make one of them in the form that a file needs.

Knows which form holds what, and says what is lost; does not know how a form is written.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdxl import settings
from sdxl.model.export_forms import ONLY_LORA, Exported, LoadedBase
from sdxl.model.fine_tune_files import FineTuneFiles, read_record
from sdxl.model.low_rank import LoraMatrices
from sdxl.model.merging import (
    DEFAULT_RANK,
    MergedLora,
    RankError,
    Summand,
    extracted_lora,
    merged_lora,
    merged_whole,
)
from sdxl.model.web_ui_metadata import About
from sdxl.serving.fine_tune_cache import FineTuneCache
from sdxl.serving.tuned_pipeline import LoadedFineTune, TunedPipeline, join_token_maps

log = logging.getLogger(__name__)

_PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class ReadFineTune:
    """A fine-tune in memory, the record of its training, and how strongly to add it."""

    fine_tune: LoadedFineTune
    record: dict[str, Any]
    scale: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.fine_tune.nbytes


def read_all(sources: Sequence[str], scales: Sequence[float], tuned: TunedPipeline) -> list[ReadFineTune]:
    """The fine-tunes at `sources`: paths, http(s) URLs, `data:` URIs or names of hub repositories.

    Raises:
        UserInputError: one cannot be fetched, is no fine-tune, or does not fit the base.
    """

    def load(files: FineTuneFiles) -> ReadFineTune:
        return ReadFineTune(
            fine_tune=tuned.load(files),
            record=read_record(files.embeddings.parent) if files.embeddings else {},
        )

    cache = FineTuneCache(settings.cache_folder(), settings.cache_limits(), load)
    read = [cache.get(source) for source in sources]
    return [dataclasses.replace(one, scale=scale) for one, scale in zip(read, scales, strict=True)]


@torch.no_grad()
def combine(
    read: Sequence[ReadFineTune],
    base: LoadedBase,
    tuned: TunedPipeline,
    *,
    form: str,
    rank: int | None = None,
    precision: str = "keep",
) -> tuple[Exported, list[str]]:
    """The sum of all fine-tunes as `form` needs it, and a sentence for each thing that is lost on the way.

    form: a key of `export_forms.FORMS`.
    rank: the largest rank of a LoRA. None: what is exact, and `DEFAULT_RANK` for what is not.
    precision: "keep", "fp16" or "fp32": the numbers of a LoRA's matrices.

    Raises:
        WeightsError: the form needs a LoRA, and nothing differs from the base.
    """
    fine_tunes = [one.fine_tune for one in read]
    summands = [
        Summand(name=one.fine_tune.name, whole=one.fine_tune.whole, lora=one.fine_tune.lora, scale=one.scale)
        for one in read
    ]
    whole: dict[str, torch.Tensor] = {}
    lora: dict[str, LoraMatrices] = {}
    if form != "single_file" and not any(one.is_full for one in fine_tunes):
        merged = merged_lora(summands, base.parameters, base.layers, rank)
        lora, error, lost = merged.layers, merged.error, _lost_by_merging(merged)
    else:
        whole, error, lost = merged_whole(summands, base.parameters), None, []
        if form in ONLY_LORA:
            lora, error = extracted_lora(whole, base.parameters, base.layers, rank or DEFAULT_RANK)
            whole = {}
            lost = _lost_by_extraction(error, rank or DEFAULT_RANK)
    if precision != "keep":
        lora = {layer: change.to(_PRECISIONS[precision]) for layer, change in lora.items()}

    with_rows = [one for one in fine_tunes if one.rows]
    token_map = join_token_maps(with_rows)
    pipeline = tuned.pipeline
    side = pipeline.default_sample_size * pipeline.vae_scale_factor
    record = read[0].record if len(read) == 1 else _joint_record(read)
    about = About.of(pipeline.scheduler.config, side, list(token_map.placeholders), record)
    exported = Exported(
        whole=whole,
        lora=lora,
        rows=[torch.cat([one.rows[i] for one in with_rows]) for i in (0, 1)] if with_rows else [],
        pooled_at_eos=with_rows[0].pooled_at_eos if with_rows else True,
        token_map=token_map,
        about=dataclasses.replace(about, more=_as_metadata(error) if error else {}),
    )
    return exported, lost + _lost_words(with_rows, exported)


def _joint_record(read: Sequence[ReadFineTune]) -> dict[str, Any]:
    """A record for a sum: what all records say alike, and what was added."""
    first = read[0].record
    shared = {key: value for key, value in first.items() if all(one.record.get(key) == value for one in read)}
    return shared | {"merged": [{"name": one.fine_tune.name, "scale": one.scale} for one in read]}


def _lost_by_merging(merged: MergedLora) -> list[str]:
    lost, error = [], merged.error
    if merged.other_kinds:
        kinds = "layers that are no plain LoRA, such as those of a DoRA, became plain LoRA."
        lost.append(f"{merged.other_kinds} {kinds}")
    if merged.left_out:
        lost.append(
            f"The changes of {merged.left_out} biases and norms are left out: a LoRA has only layers."
        )
    if error:
        lost.append(
            f"The rank leaves {error.overall:.2%} of the change of {len(error.by_layer)} layers, most in {error.worst}."
        )
    return lost


def _lost_by_extraction(error: RankError, rank: int) -> list[str]:
    return [
        f"A LoRA of rank {rank} leaves {error.overall:.2%} of the change, most in {error.worst}. {error.elsewhere:.2%} is in "
        "biases, norms and other weights that no LoRA has."
    ]


def _lost_words(with_rows: Sequence[LoadedFineTune], exported: Exported) -> list[str]:
    before = {word for one in with_rows for word in one.token_map.placeholders}
    lost = [
        f"Two fine-tunes have one word: that of the later one is now {word}."
        for word in exported.token_map.placeholders
        if word not in before
    ]
    if len({one.pooled_at_eos for one in with_rows}) > 1:
        lost.append("The fine-tunes pool prompts at different places: all do so as the first one now.")
    return lost


def _as_metadata(error: RankError) -> dict[str, str]:
    """The error of a rank as metadata of the file; the log lists it by layer at the level of debugging."""
    for layer, part in sorted(error.by_layer.items(), key=lambda entry: -entry[1]):
        log.debug("The rank leaves %.2f %% of the change of %s", 100 * part, layer)
    by_layer = {layer: round(part, 6) for layer, part in error.by_layer.items()}
    return {"rank_error": f"{error.overall:.6f}", "rank_error_by_layer": json.dumps(by_layer)}
