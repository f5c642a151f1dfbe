"""Guess from names and shapes which other model a stranger's weights are for, so that messages can name it.

Knows what is typical of each; the guess is only ever part of a message.
"""

import re
from collections.abc import Mapping, Sequence

_BY_NAME = (
    (r"double_blocks|single_blocks|single_transformer_blocks", "Flux"),
    (r"joint_blocks|lora_te3_", "SD 3"),
    (r"(^|_|\.)transformer(_|\.)transformer_blocks", "a transformer model such as SD 3 or PixArt"),
    (r"^lora_prior_|^lora_te_text_projection", "Stable Cascade"),
    (r"lllite|controlnet|control_model|zero_conv|input_hint_block", "a ControlNet"),
    (r"ip_adapter|image_proj|to_k_ip", "an IP-Adapter"),
    (r"motion_modules|temporal_transformer", "a video model such as AnimateDiff"),
    (r"oft_blocks|oft_diag|oft_R", "OFT, which is no sum of small matrices"),
    (r"\.on_input$|ia3_l", "IA3, which is no sum of small matrices"),
    (r"\.base_layer\.", "a UNet saved together with its LoRA"),
    (r"scale_weight$|\.absmax|quant_state", "quantised weights"),
    (r"^cond_stage_model\.|^lora_te_|^emb_params$|string_to_param", "SD 1.5 or SD 2"),
    (r"^first_stage_model\.|^(encoder|decoder)\.(conv_in|down|up|mid)", "an autoencoder (VAE)"),
)
"""What a key matches, and what it then belongs to."""
_CONTEXTS = {768: "SD 1.5", 1024: "SD 2", 1280: "SDXL's refiner", 2048: "SDXL", 4096: "Flux or SD 3"}
"""Width of the texts that cross attention reads → the model."""
_CROSS = re.compile(r"attn2[._]to_[kv](_lora)?\.(lora_A.*\.weight|(lora[._])?down\.weight|hada_w1_b|weight)$")
"""The keys of matrices whose second side is that width."""


def looks_like(shapes: Mapping[str, Sequence[int]]) -> str:
    """What a message adds about a file with these tensors (name → shape), such as " (the file looks like SD 1.5)".

    Empty if nothing is typical.
    """
    for key, shape in shapes.items():
        if _CROSS.search(key) and len(shape) > 1 and shape[1] in _CONTEXTS:
            return f" (the file looks like {_CONTEXTS[shape[1]]})"
    for pattern, model in _BY_NAME:
        expression = re.compile(pattern)
        if any(expression.search(key) for key in shapes):
            return f" (the file looks like {model})"
    return ""
