"""LoRA files of every known writer → one form: the matrices of each layer of the base.

Read are: this project's files and diffusers' (`unet.….to_q.lora_A.weight`, the older `….lora.down.weight` and
`….processor.to_q_lora.down.weight`), the attention processors of the trainer of 2023–24 (the last without `unet.`), and
kohya's (`lora_unet_….lora_down.weight` with `.alpha`; its blocks named as in diffusers or in SDXL's first code).
Knows names of layers; does not know files or pipelines.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdxl.errors import WeightsError

_ROLE = re.compile(
    r"(?:\.lora_(?P<peft>[AB])(?:\.default)?\.weight"
    r"|\.lora_(?P<dora>magnitude)_vector(?:\.default)?(?:\.weight)?"
    r"|\.lora_(?P<kohya>down|up)\.weight"
    r"|[._]lora(?:_linear_layer)?\.(?P<old>down|up)\.weight"
    r"|(?P<alpha>\.alpha))$"
)
"""How a key ends, for each kind of writer."""
_PARTS = ("unet", "text_encoder", "text_encoder_2")
_KOHYA_PARTS = {
    "unet": "lora_unet_",
    "text_encoder": "lora_te1_text_model_",
    "text_encoder_2": "lora_te2_text_model_",
}
_SGM_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
}
"""Layers of a residual block: diffusers' name → that of SDXL's first code."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraLayer:
    """The low-rank change of one layer: `scale` · `up` @ `down` is added to its weight (arXiv:2106.09685); with a
    `magnitude`, each row of the sum is then brought to that length (DoRA, arXiv:2402.09353)."""

    down: Tensor
    """[rank, in], or of a convolution [rank, in, kernel, kernel]."""
    up: Tensor
    """[out, rank], or of a convolution [out, rank, 1, 1]."""
    scale: float
    """alpha / rank."""
    magnitude: Tensor | None = None
    """As many numbers as there are outputs, in any shape; None for a plain LoRA."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.down.nbytes + self.up.nbytes + (0 if self.magnitude is None else self.magnitude.nbytes)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it changes a weight of `shape`."""
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
        """`to` with `strength` times this change of the weight `base` added; both fp32, of one shape and device."""
        if self.magnitude is not None or base.ndim != 2:
            return to + strength * self.delta(base)
        up, down = self._matrices(base.device)
        return torch.addmm(to, up, down, alpha=strength * self.scale)

    def _matrices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        up, down = (m.to(device, non_blocking=True).float().flatten(1) for m in (self.up, self.down))
        return up, down

    def delta(self, like: Tensor) -> Tensor:
        """What is added to the weight `like`, in its shape and on its device, in fp32."""
        up, down = self._matrices(like.device)
        added = self.scale * (up @ down)
        if self.magnitude is not None:
            weight = like.float().flatten(1)
            length = self.magnitude.to(like.device).float().reshape(-1, 1)
            added = length * F.normalize(weight + added, dim=1) - weight
        return added.reshape(like.shape)


def is_lora(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is a LoRA, of a kind that is read or not."""
    return any(
        (_ROLE.search(key) is not None and not key.endswith(".alpha")) or ".hada_" in key or ".lokr_" in key
        for key in keys
    )


class LayerNames:
    """The layers of a base, found by any writer's name."""

    def __init__(self, layers: Iterable[str], unet_config: Mapping[str, Any]) -> None:
        """`layers`: such as "unet.mid_block.attentions.0.proj_in" or "text_encoder.encoder.layers.0.mlp.fc1"."""
        self._known = {self._plain(name): name for name in layers}
        self._kohya: dict[str, str] = {}
        for plain, name in self._known.items():
            part, _, rest = plain.partition(".")
            self._kohya[_KOHYA_PARTS[part] + rest.replace(".", "_")] = name
        for name, alias in sgm_names(self._known, unet_config).items():
            self._kohya["lora_unet_" + alias.replace(".", "_")] = name

    @staticmethod
    def _plain(name: str) -> str:
        """Without the level that transformers has in one text encoder and not in the other."""
        return name.replace(".text_model.", ".", 1)

    def find(self, written: str) -> str | None:
        """The layer that a key names, without its ending; None for none of this base."""
        if written.startswith("lora_"):
            return self._kohya.get(written)
        name = written.replace(".processor.", ".")
        if name.partition(".")[0] not in _PARTS:
            name = f"unet.{name}"
        plain = self._plain(name)
        return self._known.get(plain) or self._known.get(f"{plain}.0")  # to_out is a list with one layer


def read_lora(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: LayerNames, file: str
) -> dict[str, LoraLayer]:
    """Layer of the base → its change, from a file's content; `file` is its name for errors.

    Raises:
        WeightsError: a kind of LoRA that is not read, or made for another base.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _ROLE.search(key)
        if match is None:
            raise WeightsError(
                f"{file} holds {key}, which no plain LoRA has: give a LoRA or a DoRA of peft without LoHa, LoKr or biases."
            )
        layer = names.find(key[: match.start()])
        if layer is None:
            raise WeightsError(
                f"{file} does not fit this base, which has no layer for {key}: load it into the base it was trained on."
            )
        role = {"A": "down", "B": "up"}.get(match["peft"]) or match["dora"] or match["kohya"] or match["old"]
        role = role or "alpha"
        found.setdefault(layer, {})[role] = tensor
    alphas = _alphas(metadata)
    layers = {}
    for layer, matrices in found.items():
        if not {"down", "up"} <= matrices.keys():
            raise WeightsError(f"{file} holds only half of the LoRA of {layer}: download it again.")
        down, up, told = matrices["down"], matrices["up"], matrices.get("alpha")
        if (
            min(down.ndim, up.ndim) < 2
            or not (len(down) and len(up))
            or (told is not None and told.numel() != 1)
        ):
            raise WeightsError(f"{file} holds no LoRA's matrices for {layer}: download it again.")
        rank = len(down)
        alpha = float(told) if told is not None else alphas.of(layer, rank)
        layers[layer] = LoraLayer(
            down=down,
            up=up,
            scale=alpha / rank,
            magnitude=matrices.get("magnitude"),
        )
    return layers


@dataclass(frozen=True)
class _Alphas:
    """What the metadata of diffusers' files says of alpha, part by part."""

    configs: Mapping[str, Any]

    def of(self, layer: str, rank: int) -> float:
        part, _, name = layer.partition(".")
        alpha = self.configs.get(f"{part}.lora_alpha", rank)
        patterns = self.configs.get(f"{part}.alpha_pattern") or {}
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if name == pattern or name.endswith(f".{pattern}"):
                alpha = value
        if not isinstance(alpha, int | float):
            return float(rank)
        return float(alpha) * (rank**0.5 if self.configs.get(f"{part}.use_rslora") else 1.0)


def _alphas(metadata: Mapping[str, str]) -> _Alphas:
    try:
        configs = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        configs = {}
    return _Alphas(configs if isinstance(configs, dict) else {})


def sgm_names(layers: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Layer of the UNet, such as "unet.down_blocks.1.attentions.0.proj_in" → its name in SDXL's first code, such as
    "input_blocks.4.1.proj_in", for a UNet of the diffusers configuration `config`."""
    prefixes = _sgm_prefixes(config)
    names = {}
    for layer in layers:
        part, _, name = layer.partition(".")
        for known, alias in prefixes.items() if part == "unet" else ():
            if name == known or name.startswith(f"{known}."):
                rest = name[len(known) :].removeprefix(".")
                inner = _SGM_RESNET.get(rest, rest) if ".resnets." in known else rest
                names[layer] = f"{alias}.{inner}".removesuffix(".")
    return names


def _sgm_prefixes(config: Mapping[str, Any]) -> dict[str, str]:
    """Block of diffusers → block of SDXL's first code, which counts all residual blocks and samplers in one row."""
    blocks, layers = len(config["block_out_channels"]), config["layers_per_block"]
    prefixes = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    row = 1
    for block in range(blocks):
        for layer in range(layers):
            prefixes[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{row}.0"
            prefixes[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{row}.1"
            row += 1
        prefixes[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{row}.0.op"
        row += 1
    row = 0
    for block, kind in enumerate(config["up_block_types"]):
        for layer in range(layers + 1):
            prefixes[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{row}.0"
            prefixes[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{row}.1"
            row += 1
        place = 2 if "Attn" in kind else 1
        prefixes[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{row - 1}.{place}.conv"
    return prefixes
