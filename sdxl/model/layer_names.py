"""The names that tools give to the layers of an SDXL, in files of LoRAs and of whole weights.

Knows names; does not know tensors or files.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sdxl.model.ldm_names import unet_names

_PREFIX = re.compile(
    r"(?:base_model\.model\.)?"  # peft
    r"(?:(?P<unet>unet\.|lora_unet_|lycoris_|(?:model\.)?diffusion_model\.)"
    r"|(?P<text_encoder>text_encoder\.|lora_te1_|text_encoders\.clip_l\.transformer\."
    r"|conditioner\.embedders\.0\.transformer\.)"
    r"|(?P<text_encoder_2>text_encoder_2\.|lora_te2_|text_encoders\.clip_g\.transformer\.))?"
)
"""What names begin with: those of diffusers, kohya, LyCORIS, ComfyUI and single-file checkpoints, for each part."""
_INNER = re.compile(r"\.processor(?=\.)|_orig_mod\.")
"""Levels inside names that diffusers once had, or that torch.compile adds."""
_LEVEL = "text_model_"
"""A level that transformers has in only one of the two text encoders."""


class LayerNames:
    """Finds a layer of the base by its name in any format.

    Formats write levels with a dot or with an underscore, and the UNet's blocks as diffusers or as LDM does.
    """

    def __init__(self, layers: Iterable[str], unet_config: Mapping[str, Any]) -> None:
        """`layers`: such as "unet.mid_block.attentions.0.proj_in" or "text_encoder.encoder.layers.0.mlp.fc1"."""
        self._layers: dict[str, dict[str, str]] = {"unet": {}, "text_encoder": {}, "text_encoder_2": {}}
        for name in layers:
            part, _, rest = name.partition(".")
            self._layers[part][rest.replace(".", "_").removeprefix(_LEVEL)] = name
        of_unet = [name.removeprefix("unet.") for name in self._layers["unet"].values()]
        for name, alias in unet_names(of_unet, unet_config).items():
            self._layers["unet"][alias.replace(".", "_")] = f"unet.{name}"

    def find(self, key: str) -> str | None:
        """The layer that `key`, without its ending, names; None if the base has no such layer.

        A name without a part is one of the UNet.
        """
        prefix = _PREFIX.match(key)
        assert prefix is not None  # it may be empty
        rest = _INNER.sub("", key[prefix.end() :]).replace(".", "_").removeprefix(_LEVEL)
        layers = self._layers[prefix.lastgroup or "unet"]
        return layers.get(rest) or layers.get(f"{rest}_0")  # to_out.0 may be named to_out


def diffusers_key(key: str) -> str:
    """peft's key of a LoRA's tensor behind the name of its part, such as "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight",
    as diffusers' files have it.

    In text encoders all versions of transformers find a layer by the level `text_model`. Version 5 reads the lengths of a
    DoRA's rows only if their key ends in `.weight`, and is silent if it does not.
    """
    part, _, name = key.partition(".")
    if part == "unet":
        return key
    if not name.startswith(("text_model.", "text_projection")):
        name = f"text_model.{name}"
    return f"{part}.{name}.weight" if name.endswith(".lora_magnitude_vector") else f"{part}.{name}"
