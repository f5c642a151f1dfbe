"""Read the LoRA formats of all supported tools into one form: the matrices of each layer of the base.

Supported formats:

- this project and diffusers: `unet.….to_q.lora_A.weight`, and the older `….lora.down.weight` and
  `….processor.to_q_lora.down.weight`;
- the trainer of 2023–24: `….processor.to_q_lora.down.weight` without `unet.`;
- kohya's sd-scripts: `lora_unet_….lora_down.weight` with `.alpha`; blocks have their names from diffusers or from LDM
  (ldm_names.py).

Knows the names of layers; does not know files or pipelines.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdxl.errors import WeightsError, shortened
from sdxl.model.ldm_names import unet_names
from sdxl.model.lora_metadata import read_alphas

_ROLE = re.compile(
    r"(?:\.lora_(?P<peft>[AB])(?:\.default)?\.weight"
    r"|\.lora_(?P<dora>magnitude)_vector(?:\.default)?(?:\.weight)?"
    r"|\.lora_(?P<kohya>down|up)\.weight"
    r"|[._]lora(?:_linear_layer)?\.(?P<old>down|up)\.weight"
    r"|\.(?P<scale>dora_scale)"
    r"|(?P<alpha>\.alpha))$"
)
"""The endings of keys in all formats."""
_PARTS = ("unet", "text_encoder", "text_encoder_2")
_KOHYA_PARTS = {
    "unet": "lora_unet_",
    "text_encoder": "lora_te1_text_model_",
    "text_encoder_2": "lora_te2_text_model_",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraLayer:
    """The low-rank change of one layer: add `scale` · `up` @ `down` to its weight (LoRA, arXiv:2106.09685).

    With a `magnitude`, then rescale each row of the sum to that length (DoRA, arXiv:2402.09353).
    """

    down: Tensor
    """[rank, in]; for a convolution [rank, in, kernel, kernel]."""
    up: Tensor
    """[out, rank]; for a convolution [out, rank, 1, 1]."""
    scale: float
    """alpha / rank."""
    magnitude: Tensor | None = None
    """One number for each output, in any shape; None for a plain LoRA."""

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return self.down.nbytes + self.up.nbytes + (0 if self.magnitude is None else self.magnitude.nbytes)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the matrices match a weight of `shape`."""
        rows, columns = shape[0], 1
        for side in shape[1:]:
            columns *= side
        return (
            self.down[0].numel() == columns
            and self.up.shape[0] == rows
            and self.up[0].numel() == self.down.shape[0]
            and (self.magnitude is None or self.magnitude.numel() == rows)
        )

    def added(self, to: Tensor, base: Tensor, strength: float) -> Tensor:
        """Return `to` + `strength` · (this change of the weight `base`); both are fp32, with the same shape and device."""
        if self.magnitude is not None or base.ndim != 2:
            return to + strength * self.delta(base)
        up, down = self._matrices(base.device)
        return torch.addmm(to, up, down, alpha=strength * self.scale)

    def _matrices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        up, down = (m.to(device, non_blocking=True).float().flatten(1) for m in (self.up, self.down))
        return up, down

    def delta(self, like: Tensor) -> Tensor:
        """The change of the weight `like`, in fp32 with the same shape and device."""
        up, down = self._matrices(like.device)
        change = self.scale * (up @ down)
        if self.magnitude is not None:
            weight = like.float().flatten(1)
            length = self.magnitude.to(like.device).float().reshape(-1, 1)
            change = length * F.normalize(weight + change, dim=1) - weight
        return change.reshape(like.shape)


def is_lora(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is a LoRA, in a supported format or not."""
    return any(
        (_ROLE.search(key) is not None and not key.endswith(".alpha")) or ".hada_" in key or ".lokr_" in key
        for key in keys
    )


class LayerNames:
    """Finds a layer of the base by its name in any format."""

    def __init__(self, layers: Iterable[str], unet_config: Mapping[str, Any]) -> None:
        """`layers`: such as "unet.mid_block.attentions.0.proj_in" or "text_encoder.encoder.layers.0.mlp.fc1"."""
        self._diffusers = {self._normalised(name): name for name in layers}
        self._kohya: dict[str, str] = {}
        for normalised, name in self._diffusers.items():
            part, _, rest = normalised.partition(".")
            self._kohya[_KOHYA_PARTS[part] + rest.replace(".", "_")] = name
        of_unet = [
            name.removeprefix("unet.") for name in self._diffusers.values() if name.startswith("unet.")
        ]
        for name, alias in unet_names(of_unet, unet_config).items():
            self._kohya["lora_unet_" + alias.replace(".", "_")] = f"unet.{name}"

    @staticmethod
    def _normalised(name: str) -> str:
        """Drop the level `text_model`, which transformers uses in only one of the two text encoders."""
        return name.replace(".text_model.", ".", 1)

    def find(self, key: str) -> str | None:
        """The layer that `key`, without its ending, names; None if the base has no such layer."""
        if key.startswith("lora_"):
            return self._kohya.get(key)
        name = key.replace(".processor.", ".")
        if name.partition(".")[0] not in _PARTS:
            name = f"unet.{name}"
        name = self._normalised(name)
        return self._diffusers.get(name) or self._diffusers.get(f"{name}.0")  # to_out.0 may be named to_out


def read_lora(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: LayerNames, file: str
) -> dict[str, LoraLayer]:
    """Read a LoRA file's content; return layer of the base → its change.

    file: its name in errors.

    Raises:
        WeightsError: an unsupported kind of LoRA, or one for another base.
    """
    # Sort the tensors by layer and role: down, up, magnitude, alpha.
    roles_of: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _ROLE.search(key)
        if match is None:
            raise WeightsError(
                f"{file} holds {shortened(key)}, but a plain LoRA has no such key: give a LoRA or a DoRA of peft without LoHa, LoKr or "
                "biases."
            )
        layer = names.find(key[: match.start()])
        if layer is None:
            raise WeightsError(
                f"{file} does not fit this base, which has no layer for {shortened(key)}: use the base that it was trained on."
            )
        role = {"A": "down", "B": "up"}.get(match["peft"]) or match["dora"] or match["kohya"] or match["old"]
        if match["scale"]:
            role = "magnitude"
        roles_of.setdefault(layer, {})[role or "alpha"] = tensor

    # Check each layer. kohya stores alpha as a tensor, diffusers in the metadata; without either, alpha is the rank.
    for layer, roles in roles_of.items():
        _check_matrices(roles, layer, file)
    ranks = {layer: len(roles["down"]) for layer, roles in roles_of.items()}
    alphas = read_alphas(metadata, ranks, file)
    alphas |= {layer: float(roles["alpha"]) for layer, roles in roles_of.items() if "alpha" in roles}
    return {
        layer: LoraLayer(
            down=roles["down"],
            up=roles["up"],
            scale=alphas[layer] / ranks[layer],
            magnitude=roles.get("magnitude"),
        )
        for layer, roles in roles_of.items()
    }


def _check_matrices(roles: Mapping[str, Tensor], layer: str, file: str) -> None:
    if not {"down", "up"} <= roles.keys():
        raise WeightsError(f"{file} holds only half of the LoRA of {layer}: download it again.")
    down, up, alpha = roles["down"], roles["up"], roles.get("alpha")
    if (
        min(down.ndim, up.ndim) < 2
        or not (len(down) and len(up))
        or (alpha is not None and alpha.numel() != 1)
    ):
        raise WeightsError(f"{file} holds no valid LoRA matrices for {layer}: download it again.")
