"""What other programs show about a file: the metadata of LoRAs, embeddings and checkpoints.

The keys `modelspec.*` are those of Stability AI's model metadata standard (https://github.com/Stability-AI/ModelSpec), the
keys `ss_*` those of kohya's sd-scripts. All values are text. Knows keys; does not know tensors or files.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdxl.settings import SDXL

_ARCHITECTURE = "stable-diffusion-xl-v1-base"
_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
_LICENSE = "CreativeML Open RAIL++-M"


@dataclass(frozen=True, kw_only=True)
class About:
    """What there is to say about a fine-tune."""

    words: tuple[str, ...]
    """The words of its token map."""
    resolution: int
    """The side of the base's pictures in pixels."""
    v_prediction: bool = False
    """Whether the base predicts v instead of noise."""
    zero_snr: bool = False
    """Whether its last step has no signal at all."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The record of the training, `training.json`; empty if there is none."""
    more: Mapping[str, str] = field(default_factory=dict)
    """Further metadata, such as the error of a rank."""

    @classmethod
    def of(
        cls, scheduler: Mapping[str, Any], resolution: int, words: Sequence[str], record: Mapping[str, Any]
    ) -> "About":
        """What there is to say about a fine-tune with these words and this record.

        scheduler: the configuration of the base's scheduler in diffusers.
        """
        return cls(
            words=tuple(words),
            resolution=resolution,
            v_prediction=scheduler.get("prediction_type") == "v_prediction",
            zero_snr=bool(scheduler.get("rescale_betas_zero_snr")),
            record=record,
        )

    @property
    def title(self) -> str:
        """A short name."""
        return ", ".join(self.words) or "SDXL fine-tune"

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the training."""
        settings = self.record.get("settings")
        return settings if isinstance(settings, Mapping) else {}

    @property
    def base(self) -> str:
        """The base's name on the hub, or the name of its folder: where a folder is on this machine concerns nobody."""
        base = self.settings.get("base")
        if not isinstance(base, str) or not base:
            return SDXL
        is_path = base.startswith(("/", "~", ".")) or base.count("/") > 1 or Path(base).exists()
        return Path(base).name if is_path else base


def lora_metadata(
    about: About, *, ranks: Sequence[int], alphas: Sequence[float], dora: bool
) -> dict[str, str]:
    """Metadata of a LoRA whose layers have these ranks and alphas."""
    settings, pictures = about.settings, about.record.get("dataset_files", 0)
    shown = {
        "ss_network_module": "lycoris.kohya" if dora else "networks.lora",
        "ss_network_dim": _common(ranks),
        "ss_network_alpha": _common(alphas),
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_sd_model_name": about.base,
        "ss_output_name": about.title,
        "ss_v2": "False",
        "ss_zero_terminal_snr": str(about.zero_snr),
        "ss_tag_frequency": json.dumps({"training": dict.fromkeys(about.words, max(1, int(pictures)))}),
        "ss_steps": settings.get("max_train_steps"),
        "ss_max_train_steps": settings.get("max_train_steps"),
        "ss_unet_lr": settings.get("lora_lr"),
        "ss_text_encoder_lr": settings.get(
            "text_encoder_lr" if settings.get("text_encoder_lora") else "ti_lr"
        ),
        "ss_optimizer": settings.get("optimizer"),
        "ss_lr_scheduler": settings.get("lr_scheduler"),
        "ss_seed": settings.get("seed"),
        "ss_batch_size_per_device": settings.get("train_batch_size"),
        "ss_resolution": f"({about.resolution}, {about.resolution})",
    }
    if dora:
        algorithm = {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}
        shown["ss_network_args"] = json.dumps(algorithm)
    return (
        _model_spec(about, f"{_ARCHITECTURE}/lora", about.words)
        | {key: str(value) for key, value in shown.items() if value is not None}
        | dict(about.more)
    )


def embedding_metadata(about: About, word: str) -> dict[str, str]:
    """Metadata of the token rows of one word."""
    return _model_spec(about, f"{_ARCHITECTURE}/textual-inversion", (word,)) | {"modelspec.title": word}


def checkpoint_metadata(about: About) -> dict[str, str]:
    """Metadata of a single-file checkpoint."""
    return _model_spec(about, _ARCHITECTURE, about.words) | dict(about.more)


def _model_spec(about: About, architecture: str, words: Sequence[str]) -> dict[str, str]:
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": _IMPLEMENTATION,
        "modelspec.title": about.title,
        "modelspec.date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "modelspec.resolution": f"{about.resolution}x{about.resolution}",
        "modelspec.prediction_type": "v" if about.v_prediction else "epsilon",
        "modelspec.license": _LICENSE,
    } | ({"modelspec.trigger_phrase": ", ".join(words)} if words else {})


def _common(numbers: Sequence[float]) -> str:
    """The number that all layers share, as kohya's scripts write it."""
    if not numbers or any(number != numbers[0] for number in numbers):
        return "Dynamic"
    return f"{numbers[0]:g}" if numbers[0] == int(numbers[0]) else str(numbers[0])
