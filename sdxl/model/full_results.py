"""A full fine-tune in a smaller form: its difference from the base, or the LoRA that is nearest to it.

Knows what a training of the whole UNet gives and what the base was before; does not know how either is trained.
"""

import dataclasses
import logging

import torch
from torch import nn

from sdxl.model.bases import Base
from sdxl.model.components import load_unet
from sdxl.model.differences import metadata_for, rounded
from sdxl.model.export_forms import peft_tensors
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.model.merging import DEFAULT_RANK, extracted_lora
from sdxl.model.web_ui_metadata import About

log = logging.getLogger(__name__)

_UNET = "unet."


@torch.no_grad()
def in_form(trained: TrainedFineTune, form: str, base: Base) -> TrainedFineTune:
    """`trained` as the input `full_result` wants it; a LoRA stays as it is.

    form: "whole", "difference" or "lora".
    base: what was trained. It is read again, because its weights in memory have changed.

    Raises:
        WeightsError: a LoRA is wanted, but no layer has changed.
    """
    if trained.kind != "unet" or form == "whole":
        return trained
    unet = load_unet(base.folder, torch.float32, torch.device("cpu"))
    before = {f"{_UNET}{name}": value for name, value in unet.named_parameters()}
    after = {f"{_UNET}{name}": value for name, value in trained.weights.items()}
    if form == "difference":
        name = About(words=(), resolution=0, record={"settings": {"base": base.name}}).base
        return dataclasses.replace(
            trained, kind="difference", weights=rounded(after, before), metadata=metadata_for(before, name)
        )
    layers = [
        f"{_UNET}{name}" for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    found, error = extracted_lora(after, before, layers, DEFAULT_RANK)
    half = {layer: change.to(torch.float16) for layer, change in found.items()}
    log.info(
        "The LoRA of rank %d leaves out %.1f %% of what the whole UNet learned.",
        DEFAULT_RANK,
        100 * error.overall,
    )
    return dataclasses.replace(trained, kind="lora", weights=peft_tensors(half))
