"""A whole fine-tune as its difference from the base: one byte for each weight instead of two.

Knows how a difference is rounded, named and checked against a base; does not know training or pipelines.

The file is safetensors. The difference of a weight [out, …] is `NAME.steps`, int8 in the same shape, times `NAME.step_size`,
fp32 [out]. That of a bias or norm is `NAME.difference`, in fp16. The metadata names the base by the digest of its weights.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl.errors import WeightsError
from sdxl.files.weight_files import WeightFile
from sdxl.model.weight_changes import Difference, MatrixChange, WeightChange

FORMAT = "sdxl-difference/1"
"""What the metadata of such a file says under `format`."""
_LARGEST = 127
"""The largest number of steps that int8 holds on both sides of 0."""
_LARGEST_CHANGE = 65504.0
"""The largest number of fp16, in which weights are drawn with."""
_DIGESTED = 32
"""Numbers of each weight that the digest of a base reads."""
_STEPS, _SIZES, _EXACT = ".steps", ".step_size", ".difference"
"""How the names of tensors end."""
_UNET = "unet."


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundedDifference(MatrixChange):
    """The change of a weight in whole steps, whose size each output has for itself."""

    steps: Tensor
    """int8, in the weight's shape."""
    sizes: Tensor
    """Of a step, [out], fp32."""

    @property
    def size(self) -> tuple[int, int] | None:
        if self.steps.ndim < 2 or self.sizes.shape != self.steps.shape[:1]:
            return None
        return self.steps.shape[0], self.steps[0].numel()

    def matrix(self, device: torch.device) -> Tensor:
        steps = self.steps.to(device, non_blocking=True).flatten(1).float()
        return steps * self.sizes.to(device, non_blocking=True).float()[:, None]


def is_difference(metadata: Mapping[str, str]) -> bool:
    """Whether a file with this metadata holds a difference."""
    return metadata.get("format") == FORMAT


def base_digest(parameters: Mapping[str, Tensor]) -> str:
    """What identifies the UNet among `parameters` of a base: SHA-256 of the names, shapes and first numbers of its weights.

    Numbers count in fp16, so that the fp16 and the fp32 file of one base are the same base, on every device.
    """
    named = sorted((name, value) for name, value in parameters.items() if name.startswith(_UNET))
    first = [(value[0] if value.ndim > 1 else value).detach().flatten()[:_DIGESTED] for _, value in named]
    total = hashlib.sha256("".join(f"{name} {tuple(value.shape)}\0" for name, value in named).encode())
    total.update(torch.cat([part.half().cpu() for part in first]).numpy().tobytes())
    return total.hexdigest()


def rounded(whole: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a difference file.

    whole, base: parameter, such as "unet.conv_in.weight" → its value after training, and before.
    """
    tensors = {}
    for name, value in whole.items():
        change = value.float() - base[name].float()
        if change.ndim < 2:
            tensors[f"{name}{_EXACT}"] = change.half()
            continue
        sizes = change.flatten(1).abs().amax(1) / _LARGEST
        steps = change.flatten(1) / sizes.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        tensors[f"{name}{_STEPS}"] = steps.round().to(torch.int8).reshape(change.shape)
        tensors[f"{name}{_SIZES}"] = sizes
    return tensors


def metadata_for(base: Mapping[str, Tensor], name: str) -> dict[str, str]:
    """The metadata of the file of a difference from the base with these parameters, which is called `name`."""
    return {"format": FORMAT, "base_sha256": base_digest(base), "base": name}


def read_difference(
    file: WeightFile, parameters: Mapping[str, Tensor], *, pinned: bool = False
) -> dict[str, WeightChange]:
    """Return parameter of the base → its change.

    The header is compared with the base before any weight is read.

    parameters: those of the base, such as "unet.conv_in.weight", with the base's own values.
    pinned: pin the memory if CUDA is available.

    Raises:
        WeightsError: the file is the difference from another base, or is damaged.
    """
    _require_fitting(file, parameters)
    _require_base(file, parameters)
    tensors = file.read(pinned=pinned)
    changes: dict[str, WeightChange] = {}
    for key, value in tensors.items():
        name, ending = _split(key)
        largest = value.abs().max() * (_LARGEST if ending == _SIZES else 1)
        if ending != _STEPS and not largest <= _LARGEST_CHANGE:  # NaN is not either
            raise WeightsError(
                f"{file.name} holds numbers that are too large or none (at {name}): take it from a finished training."
            )
        if ending == _EXACT:
            changes[name] = Difference(value=value)
        elif ending == _STEPS:
            changes[name] = RoundedDifference(steps=value, sizes=tensors[f"{name}{_SIZES}"])
    return changes


def _require_fitting(file: WeightFile, parameters: Mapping[str, Tensor]) -> None:
    """Check names, types and shapes in the header."""
    header = file.beginnings(0)
    for key, (kind, shape, _) in header.items():
        name, ending = _split(key)
        wanted = _wanted(name, ending, parameters)
        if wanted is None:
            raise WeightsError(
                f"{file.name} holds {_short(key)}, which is no difference from a weight of this base: use the base that it was "
                "trained on."
            )
        if (kind, tuple(shape)) != wanted:
            raise WeightsError(
                f"{file.name} does not fit this base (at {name}): use the base that it was trained on."
            )
        other = {_STEPS: _SIZES, _SIZES: _STEPS}.get(ending)
        if other and f"{name}{other}" not in header:
            raise WeightsError(f"{file.name} lacks a part of {name}: take it from a finished training.")


def _split(key: str) -> tuple[str, str]:
    """The parameter of a tensor in the file, and what of its difference the tensor holds."""
    name, dot, ending = key.rpartition(".")
    return name, dot + ending


def _wanted(
    name: str, ending: str, parameters: Mapping[str, Tensor]
) -> tuple[torch.dtype, tuple[int, ...]] | None:
    """Type and shape of the tensor with this ending for the parameter `name`; None if there is no such tensor."""
    if name not in parameters or not name.startswith(_UNET):
        return None
    shape = tuple(parameters[name].shape)
    if len(shape) < 2:
        return (torch.float16, shape) if ending == _EXACT else None
    return {_STEPS: (torch.int8, shape), _SIZES: (torch.float32, shape[:1])}.get(ending)


def _short(text: str) -> str:
    """Text from a file of a stranger, as messages quote it."""
    return text if len(text) <= 100 else f"{text[:60]}…"


def _require_base(file: WeightFile, parameters: Mapping[str, Tensor]) -> None:
    # A training of a LoRA may hold its base in bf16, whose digest is another one. It refuses differences anyway.
    if any(value.dtype == torch.bfloat16 for name, value in parameters.items() if name.startswith(_UNET)):
        return
    if file.metadata.get("base_sha256") != base_digest(parameters):
        name = file.metadata.get("base")
        named = f", {_short(name)}" if name else ""
        raise WeightsError(
            f"{file.name} is the difference from another base than this one: use the base that it was trained on{named}."
        )
