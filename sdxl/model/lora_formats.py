"""Read the LoRA formats of all supported tools into one form: the change of each parameter of the base.

Supported are the keys of this project, diffusers, peft, kohya's sd-scripts, LyCORIS, OneTrainer, ComfyUI and the trainer of
2023–24: LoRA, LoCon, LoHa, LoKr and DoRA of all of them, and whole differences of weights, biases and norms.

Knows the endings of keys; does not know the names of layers (layer_names.py), formulas (weight_changes.py) or pipelines.
"""

import functools
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from sdxl.errors import WeightsError, shortened
from sdxl.model.layer_names import LayerNames
from sdxl.model.lora_metadata import read_alphas
from sdxl.model.other_models import looks_like
from sdxl.model.weight_changes import (
    Difference,
    Hadamard,
    Kronecker,
    LowRank,
    MatrixChange,
    Replacement,
    Rescaled,
    WeightChange,
)

log = logging.getLogger(__name__)

BUNDLED = "bundle_emb."
"""What the keys of token rows in a LoRA's file begin with (bundled_rows in token_files.py)."""

_ROLE = re.compile(
    r"(?:\.lora_(?P<peft>[AB])(?:\.[^.]+)?\.weight"
    r"|\.lora_(?P<kohya>down|up|mid)\.weight"
    r"|[._]lora(?:_linear_layer)?\.(?P<old>down|up)\.weight"
    r"|\.lora_(?P<dora>magnitude)_vector(?:\.[^.]+)?(?:\.weight)?"
    r"|\.lora_B(?:\.[^.]+)?\.(?P<up_bias>bias)"
    r"|\.(?P<lycoris>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)(?:\.[^.]+)?"
    r"|\.(?P<other>alpha|dora_scale|diff|diff_b|w_norm|b_norm|set_weight))$"
)
"""The endings of keys in all formats. peft puts the name of an adapter, such as "default", into some."""
_PEFT = {"A": "down", "B": "up"}
_OF_PEFT, _OF_WEB_UIS = "base_model.model.", ("lora_", "lycoris_")
_BEGINNINGS = (*_OF_WEB_UIS, _OF_PEFT)
"""Keys that begin so are of a LoRA, even if their ending is of an unsupported kind."""
_MARKERS = {"scaled_fp8", "v_pred", "ztsnr"}
"""Keys without a meaning for a LoRA."""


def is_lora(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is a LoRA, in a supported format or not."""
    return any(
        key.startswith(_BEGINNINGS)
        or ((match := _ROLE.search(key)) is not None and match["other"] != "alpha")
        for key in keys
    )


def is_for_web_uis(keys: Iterable[str]) -> bool:
    """Whether a LoRA with these keys has kohya's or LyCORIS' names of layers."""
    return any(key.startswith(_OF_WEB_UIS) for key in keys)


def read_lora(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    names: LayerNames,
    file: str,
    config: Mapping[str, Any] | None = None,
) -> dict[str, WeightChange]:
    """Read a LoRA file's content; return parameter of the base, such as "unet.conv_in.weight" → its change.

    file: its name in errors.
    config: the content of peft's adapter_config.json, if the file has one beside it.

    Raises:
        WeightsError: an unsupported kind of LoRA, or one for another model.
    """
    roles_of = _by_layer(tensors, names, file)

    # Scales: kohya stores alpha as a tensor, diffusers in the metadata, peft in a file. Without any, alpha is the rank.
    ranks = {layer: rank for layer, roles in roles_of.items() if (rank := _rank(roles)) is not None}
    scales = {
        layer: alpha / (ranks[layer] or 1)
        for layer, alpha in read_alphas(metadata, ranks, file, config).items()
    }
    for layer, roles in roles_of.items():
        if "alpha" in roles and ranks.get(layer):
            scales[layer] = _number(roles["alpha"], layer, file) / ranks[layer]
    if config is None and any(key.startswith(_OF_PEFT) for key in tensors):
        log.warning("%s has no adapter_config.json beside it: each alpha is taken for its rank", file)

    changes: dict[str, WeightChange] = {}
    for layer, roles in roles_of.items():
        scale = scales.get(layer, 1.0)
        weight = _weight_change(roles, scale, layer, file)
        if weight is not None:
            changes[f"{layer}.weight"] = weight
        for role, factor in (("diff_b", 1.0), ("b_norm", 1.0), ("up_bias", scale)):
            if role in roles:
                changes[f"{layer}.bias"] = Difference(value=roles[role], scale=factor)
    return changes


def _by_layer(tensors: Mapping[str, Tensor], names: LayerNames, file: str) -> dict[str, dict[str, Tensor]]:
    """Sort the tensors: layer of the base → role, such as "down" or "hada_w1_a" → tensor."""
    roles_of: dict[str, dict[str, Tensor]] = {}
    find = functools.cache(names.find)  # each layer has several tensors
    for key, tensor in tensors.items():
        if key in _MARKERS or key.startswith(BUNDLED):
            continue
        match = _ROLE.search(key)
        layer = None if match is None else find(key[: match.start()])
        if match is None or layer is None:
            problem = "no part of a LoRA that is read here" if match is None else "for no layer of this base"
            guess = looks_like({key: tensor.shape for key, tensor in tensors.items()})
            raise WeightsError(f"{file} holds {shortened(key)}, {problem}{guess}: give a LoRA of SDXL.")
        name = match.lastgroup or ""
        role = _PEFT.get(match[name], "up_bias" if name == "up_bias" else match[name])
        roles = roles_of.setdefault(layer, {})
        if role in roles:
            raise WeightsError(
                f"{file} holds two LoRAs for {layer} (at {shortened(key)}): give a file with one."
            )
        roles[role] = tensor
    return roles_of


def _rank(roles: Mapping[str, Tensor]) -> int | None:
    """The rank by which alpha is divided; 0 for a Kronecker product of two whole matrices, None for whole differences."""
    for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if role in roles:
            return roles[role].shape[0] if roles[role].ndim else 0
    return 0 if "lokr_w1" in roles else None


def _number(alpha: Tensor, layer: str, file: str) -> float:
    if alpha.numel() != 1:
        raise WeightsError(f"{file} holds no valid LoRA matrices for {layer}: download it again.")
    return float(alpha)


def _weight_change(roles: Mapping[str, Tensor], scale: float, layer: str, file: str) -> WeightChange | None:
    """The change of a layer's weight; None if only its bias changes."""
    try:
        change = _plain_change(roles, scale)
    except KeyError as error:
        raise WeightsError(
            f"{file} holds only half of the LoRA of {layer} (no {error.args[0]}): download it again."
        ) from error
    if isinstance(change, MatrixChange) and change.size is None:
        raise WeightsError(f"{file} holds no valid LoRA matrices for {layer}: download it again.")

    # peft has one length for each output, in any shape. LyCORIS' shape says whether it has one for each output or input.
    if change is not None and "magnitude" in roles:
        return Rescaled(change=change, lengths=roles["magnitude"])
    if change is not None and "dora_scale" in roles:
        lengths = roles["dora_scale"]
        return Rescaled(change=change, lengths=lengths, by_input=lengths.ndim > 1 and lengths.shape[0] == 1)
    return change


def _plain_change(roles: Mapping[str, Tensor], scale: float) -> WeightChange | None:
    """The same without lengths of rows. Raises KeyError with the role that is missing."""
    if roles.keys() & {"down", "up", "mid", "up_bias"}:
        return LowRank(down=roles["down"], up=roles["up"], mid=roles.get("mid"), scale=scale)
    if any(role.startswith("hada_") for role in roles):
        return Hadamard(
            first=_product(roles, "hada_w1", "hada_t1"),
            second=_product(roles, "hada_w2", "hada_t2"),
            scale=scale,
        )
    if any(role.startswith("lokr_") for role in roles):
        left, right = (
            Difference(value=roles[name]) if name in roles else _product(roles, name, middle)
            for name, middle in (("lokr_w1", ""), ("lokr_w2", "lokr_t2"))
        )
        return Kronecker(left=left, right=right, scale=scale)
    for role in ("diff", "w_norm"):
        if role in roles:
            return Difference(value=roles[role])
    if "set_weight" in roles:
        return Replacement(value=roles["set_weight"])
    if roles.keys() & {"diff_b", "b_norm"}:
        return None
    raise KeyError("matrices")


def _product(roles: Mapping[str, Tensor], name: str, middle: str) -> LowRank:
    """A product of two matrices of LyCORIS. If there is a third in the middle, the first is stored transposed."""
    up, down, mid = roles[f"{name}_a"], roles[f"{name}_b"], roles.get(middle)
    return LowRank(up=up.T if mid is not None and up.ndim == 2 else up, down=down, mid=mid)
