"""The names of layers that other programs know at SDXL's size, written down from their published tables of names.

ComfyUI (comfy/lora.py) and AUTOMATIC1111's web UI (extensions-builtin/Lora) know every layer of Stability AI's UNet, its dots
replaced by underscores. kohya's scripts (library/sdxl_original_unet.py) train the same layers. InvokeAI
(sdxl_lora_conversion_utils.py) replaces the beginning of such a name by diffusers' one and wants the layer to exist.
"""

_DEPTHS = {
    "input": {4: 2, 5: 2, 7: 10, 8: 10},
    "output": dict.fromkeys(range(3), 10) | dict.fromkeys(range(3, 6), 2),
}
"""Transformer blocks of each block of the UNet that has any; the middle block has ten."""
_RES, _WIDER = ("in_layers_2", "emb_layers_1", "out_layers_3"), {"input": (4, 7), "output": tuple(range(9))}
"""Layers of a residual block, and the blocks that also have a `skip_connection`."""
_ATTENTION = [f"attn{a}_to_{which}" for a in (1, 2) for which in ("q", "k", "v", "out_0")]
_ENCODER = ["mlp_fc1", "mlp_fc2", *(f"self_attn_{which}_proj" for which in ("k", "q", "v", "out"))]


def _transformer(place: str, depth: int) -> dict[str, str]:
    names = {f"{place}_{end}": "transformer" for end in ("proj_in", "proj_out")}
    for block in range(depth):
        names |= {f"{place}_transformer_blocks_{block}_{end}": "attention" for end in _ATTENTION}
        names |= {
            f"{place}_transformer_blocks_{block}_ff_net_{end}": "transformer" for end in ("0_proj", "2")
        }
    return names


def _unet() -> dict[str, str]:
    names = _transformer("middle_block_1", 10)
    places = {f"middle_block_{index}": False for index in (0, 2)}
    for side, indices in (("input", (1, 2, 4, 5, 7, 8)), ("output", range(9))):
        for index in indices:
            places[f"{side}_blocks_{index}_0"] = index in _WIDER[side]
            if index in _DEPTHS[side]:
                names |= _transformer(f"{side}_blocks_{index}_1", _DEPTHS[side][index])
    for place, is_wider in places.items():
        ends = (*_RES, "skip_connection") if is_wider else _RES
        names |= {f"{place}_{end}": "time" if end == "emb_layers_1" else "all" for end in ends}
    samplers = (
        "input_blocks_3_0_op",
        "input_blocks_6_0_op",
        "output_blocks_2_2_conv",
        "output_blocks_5_2_conv",
    )
    return {f"lora_unet_{name}": targets for name, targets in names.items()} | {
        f"lora_unet_{name}": "all" for name in samplers
    }


UNET = _unet()
"""Name of a layer → the smallest of `lora_targets` that trains it; "time" for layers that a training never changes."""
ENCODERS = {
    f"lora_te{number}_text_model_encoder_layers_{layer}_{end}"
    for number, layers in ((1, 12), (2, 32))
    for layer in range(layers)
    for end in _ENCODER
} | {"lora_te2_text_projection"}
"""The layers of both text encoders."""


def invoke_name(name: str) -> str | None:
    """The layer of diffusers' UNet, its dots replaced by underscores, that InvokeAI takes `name` for; None for none.

    It takes the last of its beginnings, in the order of the alphabet, that does not come after the name.
    """
    flat = name.removeprefix("lora_unet_")
    before = [beginning for beginning in _INVOKE if beginning <= flat]
    return (
        flat.replace(before[-1], _INVOKE[before[-1]], 1) if before and flat.startswith(before[-1]) else None
    )


def _invoke() -> dict[str, str]:
    found = {"middle_block_1": "mid_block_attentions_0"}
    res = {f"middle_block_{2 * index}": f"mid_block_resnets_{index}" for index in range(2)}
    for block in range(3):
        for layer in range(2):
            res[f"input_blocks_{3 * block + layer + 1}_0"] = f"down_blocks_{block}_resnets_{layer}"
            found[f"input_blocks_{3 * block + layer + 1}_1"] = f"down_blocks_{block}_attentions_{layer}"
        for layer in range(3):
            res[f"output_blocks_{3 * block + layer}_0"] = f"up_blocks_{block}_resnets_{layer}"
            found[f"output_blocks_{3 * block + layer}_1"] = f"up_blocks_{block}_attentions_{layer}"
        found[f"input_blocks_{3 * block + 3}_0_op"] = f"down_blocks_{block}_downsamplers_0_conv"
        found[f"output_blocks_{3 * block + 2}_2"] = f"up_blocks_{block}_upsamplers_0"
    ends = {"in_layers_2": "conv1", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj"}
    ends |= {"skip_connection": "conv_shortcut", "in_layers_0": "norm1", "out_layers_0": "norm2"}
    found |= {f"{place}_{end}": f"{own}_{alias}" for place, own in res.items() for end, alias in ends.items()}
    return dict(sorted(found.items()))


_INVOKE = _invoke()
