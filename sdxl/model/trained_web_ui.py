"""What a training writes for other programs, in the folder `web_ui` of its result.

Knows what a training gives; does not know how it is trained.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sdxl.model import web_ui_files
from sdxl.model.bases import Base
from sdxl.model.components import Components
from sdxl.model.export_forms import DORA_ELSEWHERE
from sdxl.model.fine_tune_files import WEB_UI, TrainedFineTune
from sdxl.model.layer_names import diffusers_key
from sdxl.model.low_rank import LoraMatrices
from sdxl.model.single_file import write_checkpoint
from sdxl.model.web_ui_metadata import About

log = logging.getLogger(__name__)

_DOWN, _UP, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


def write_for_web_uis(
    trained: TrainedFineTune,
    output: Path,
    record: Mapping[str, Any],
    components: Components,
    *,
    checkpoint_of: Base | None = None,
) -> None:
    """Write the token rows, and a LoRA in fp16, into the folder `web_ui` of a training's `output`.

    record: the record of the run.
    components: those that were trained.
    checkpoint_of: write a whole UNet too, as a single-file checkpoint with the other parts of this base.
    """
    words = web_ui_files.rows_by_word(trained.token_rows, trained.token_map)
    resolution, folder = record["settings"]["resolution"], output / WEB_UI
    about = About.of(components.noise_scheduler.config, resolution, list(words), record)
    folder.mkdir()
    web_ui_files.write_embeddings(folder, words, about)
    if trained.kind == "lora":
        layers = {name: change.to(torch.float16) for name, change in trained_layers(trained, about).items()}
        if any(change.magnitude is not None for change in layers.values()):
            log.info("%s", DORA_ELSEWHERE)
        web_ui_files.write_lora(folder, layers, words, components.unet.config, about)
    elif checkpoint_of is not None:
        path = folder / f"{web_ui_files.weights_stem(list(words), 'checkpoint')}.safetensors"
        base = checkpoint_of
        write_checkpoint(path, trained.weights, components.unet.config, base.folder, about, vae=base.vae)


def trained_layers(trained: TrainedFineTune, about: About) -> dict[str, LoraMatrices]:
    """Layer → its change, with the alpha with which it was trained.

    The weights of a training have alpha / rank multiplied into the second matrix; here it is taken out again.
    """
    weights, alpha = trained.weights, about.settings.get("lora_alpha")
    layers = {}
    for layer in (name.removesuffix(_DOWN) for name in weights if name.endswith(_DOWN)):
        magnitude = weights.get(diffusers_key(layer + _MAGNITUDE))
        down = weights[layer + _DOWN]
        change = LoraMatrices(
            down=down,
            up=weights[layer + _UP],
            alpha=float(len(down)),
            magnitude=None if magnitude is None else magnitude.flatten(),
        )
        layers[layer] = change.with_alpha(float(alpha)) if alpha else change
    return layers
