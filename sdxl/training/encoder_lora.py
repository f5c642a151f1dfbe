"""LoRA matrices on both text encoders, beside those of the UNet.

They learn what the caption's words mean in these pictures, which the rows of new tokens alone cannot change. Knows the text
encoders' layers; does not know captions or losses.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from sdxl.model.components import Components
from sdxl.model.layer_names import diffusers_key
from sdxl.training.config import TrainingConfig
from sdxl.training.optimizers import Group
from sdxl.training.trainable import LORA_WEIGHT_DECAY, Trainable, add_lora, exported_lora

_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
_TARGETS = {
    "attention": _ATTENTION,
    "transformer": [*_ATTENTION, "fc1", "fc2"],
    "all": [*_ATTENTION, "fc1", "fc2"],
}
"""`lora_targets` → the layers of a text encoder that get matrices. It has no convolutions."""


def with_encoder_lora(trainable: Trainable, components: Components, config: TrainingConfig) -> Trainable:
    """`trainable`, a LoRA of the UNet, with matrices on both text encoders too. They have the same rank and α.

    torch's global generator draws their initial values.
    """
    parameters = []
    for encoder in components.text_encoders:
        # SDXL reads the last but one hidden state, and of the second encoder also the pooled output of the last layer.
        layers = encoder.config.num_hidden_layers - (0 if hasattr(encoder, "text_projection") else 1)
        add_lora(
            encoder,
            config,
            _TARGETS[config.lora_targets],
            layers_to_transform=list(range(layers)),
            layers_pattern="layers",
        )
        parameters += [parameter for name, parameter in encoder.named_parameters() if ".lora_" in name]

    def export() -> dict[str, Tensor]:
        return trainable.export() | _exported(components.text_encoders, config)

    encoders = Group(params=parameters, lr=config.text_encoder_lr, weight_decay=LORA_WEIGHT_DECAY)
    return replace(trainable, encoders=encoders, export=export)


def _exported(text_encoders: tuple[Any, ...], config: TrainingConfig) -> dict[str, Tensor]:
    found = {}
    for part, encoder in zip(("text_encoder", "text_encoder_2"), text_encoders, strict=True):
        found |= {diffusers_key(name): value for name, value in exported_lora(encoder, part, config).items()}
    return found
