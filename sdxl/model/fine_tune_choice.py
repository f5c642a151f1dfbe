"""Choose the files of a fine-tune among those of a folder or an archive, as trainers and people leave them.

Knows what each file is by its name, or by the names and shapes of its tensors; does not read tensors.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdxl.errors import WeightsError, some_of
from sdxl.files.weight_files import WeightFile
from sdxl.model.differences import is_difference
from sdxl.model.lora_formats import is_for_web_uis, is_lora
from sdxl.model.other_models import looks_like
from sdxl.model.token_files import is_clip_embedding, is_learned_embedding
from sdxl.model.whole_weights import has_unet

log = logging.getLogger(__name__)

UNET, LORA, DIFFERENCE, EMBEDDINGS = (
    "unet.safetensors",
    "lora.safetensors",
    "difference.safetensors",
    "embeddings.pti",
)
"""Files of this project."""
WEB_UI = "web_ui"
"""The folder of a training's result that holds the same fine-tune once more, for other programs."""

_PARTS = ("unet", "text_encoder", "text_encoder_2")
"""Folders of a pipeline in diffusers' layout with weights that a fine-tune may change."""
_COMPONENT = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?(?:-(?P<shard>\d{5})-of-(?P<shards>\d{5}))?\.safetensors"
)
"""The weights of one part, as diffusers and transformers save them."""
_VARIANTS = ("fp16", "", "bf16")
"""Variants that are taken first, if a folder has several: drawing is in fp16."""
_STEP = re.compile(r"(?:checkpoint|step|epoch)s?[-_]?(\d*)")
"""The folder of an earlier training step."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The files of one fine-tune."""

    root: Path
    """The folder that they are in."""
    whole: tuple[tuple[str, WeightFile], ...]
    """Part, such as "unet", and a file with its whole weights."""
    lora: WeightFile | None
    difference: WeightFile | None
    """A whole fine-tune's difference from its base (differences.py)."""
    embeddings: WeightFile | None
    token_files: tuple[WeightFile, ...]
    """Embeddings of other tools."""


def belongs(path: Path) -> bool:
    """Whether a file, by its path, may be of the fine-tune: not hidden, not a copy for web UIs, and safetensors."""
    hidden = any(part.startswith((".", "__MACOSX")) or part == WEB_UI for part in path.parts)
    return not hidden and (path.suffix == ".safetensors" or path.name == EMBEDDINGS)


def choose(name: str, files: Mapping[Path, WeightFile]) -> Chosen:
    """Take the folder with weights or embeddings that is least deep, and of earlier steps of a training the last.

    files: path in the folder or archive `name` → file; at least one.

    Raises:
        WeightsError: no folder has any, or the first that has some holds several LoRAs or whole UNets.
    """
    folders = {path.parent for path in files}
    folders |= {folder.parent for folder in folders if folder.name == "unet"}  # pipelines
    for root in sorted(folders, key=_order):
        chosen = _chosen_in(root, name, files)
        if chosen is not None:
            others = {path.parent for path in files if path.parent != root and path.parent.name not in _PARTS}
            if others:
                log.info("%s: the fine-tune in %s is used, not those in other folders", name, root)
            return chosen
    first = files[min(files)]
    raise WeightsError(
        f"{name} holds no UNet, LoRA or embeddings of SDXL{looks_like(first.shapes)}: give a fine-tune's file."
    )


def _order(folder: Path) -> tuple[bool, int, int, str]:
    """Sorts folders: those of training steps last, the latest step first of these; else by depth and name."""
    steps = [int(match[1] or 0) for part in folder.parts if (match := _STEP.fullmatch(part))]
    return bool(steps), -max(steps, default=0), len(folder.parts), str(folder)


def _chosen_in(root: Path, name: str, files: Mapping[Path, WeightFile]) -> Chosen | None:
    """The fine-tune whose files are directly in `root`, or of whose pipeline `root` is the folder; None if there is none."""
    in_root = [files[path] for path in sorted(files) if path.parent == root]
    roles = {file: _role(file) for file in in_root}

    def of(role: str) -> list[WeightFile]:
        return [file for file in in_root if roles[file] == role]

    unets, loras, differences = of("unet"), _one_form(of("lora")), of("difference")
    if unets and all(_COMPONENT.fullmatch(file.name) for file in unets):
        unets = unets[:1]  # in several variants
        whole = [("unet", file) for file in _one_variant(in_root)]
    else:
        whole = [("unet", file) for file in unets]
    if len(of_unet := unets + loras + differences) > 1:
        listed = some_of(sorted(file.name for file in of_unet))
        raise WeightsError(f"{name} holds {listed}: keep only the one that you trained.")
    if not of_unet:
        whole = _of_pipeline(root, files)
    embeddings, token_files = of("embeddings"), of("tokens")
    if not (whole or of_unet or embeddings or token_files):
        return None
    return Chosen(
        root=root,
        whole=tuple(whole),
        lora=next(iter(loras), None),
        difference=next(iter(differences), None),
        embeddings=next(iter(embeddings), None),
        token_files=() if embeddings else tuple(token_files),
    )


def _role(file: WeightFile) -> str | None:
    """What a file is in a fine-tune: "unet", "difference", "lora", "embeddings", "tokens", or nothing that is known."""
    shapes = file.shapes
    if not shapes:
        raise WeightsError(f"{file.name} holds no tensors: take it from a finished training.")
    if is_difference(file.metadata):
        return "difference"
    if file.name == UNET or has_unet(shapes.keys()):
        return "unet"
    if file.name == EMBEDDINGS or "text_encoders_0" in shapes:
        if file.size is not None:
            raise WeightsError(f"{file.name} is too large for token rows: take it from a finished training.")
        return "embeddings"
    if is_clip_embedding(shapes.keys()):
        return "tokens"
    if file.name == LORA or is_lora(shapes.keys()):
        return "lora"
    return "tokens" if is_learned_embedding(shapes) else None


def _one_form(loras: list[WeightFile]) -> list[WeightFile]:
    """Without those that hold the LoRA of another file once more, with names for web UIs."""
    ours = [file for file in loras if not is_for_web_uis(file.keys)]
    if len(ours) != 1:
        return loras
    return ours + [file for file in loras if file is not ours[0] and _sizes(file) != _sizes(ours[0])]


def _sizes(file: WeightFile) -> list[tuple[int, ...]]:
    return sorted(shape for key, shape in file.shapes.items() if key.endswith(".weight"))


def _of_pipeline(root: Path, files: Mapping[Path, WeightFile]) -> list[tuple[str, WeightFile]]:
    """The weights of a pipeline in diffusers' layout, each with its part; none if there is no UNet."""
    parts = {
        part: [
            files[path]
            for path in sorted(files)
            if path.parent == root / part and _COMPONENT.fullmatch(path.name)
        ]
        for part in _PARTS
    }
    if not any(has_unet(file.keys) for file in parts["unet"]):
        return []
    return [(part, file) for part, found in parts.items() for file in _one_variant(found)]


def _one_variant(files: Iterable[WeightFile]) -> list[WeightFile]:
    """The files of a part in one of its variants; several if it is sharded."""
    variants: dict[str, dict[str, WeightFile]] = {}
    for file in files:
        if match := _COMPONENT.fullmatch(file.name):
            variants.setdefault(match["variant"] or "", {})[match["shard"] or ""] = file
    if not variants:
        return []
    chosen = variants[
        min(variants, key=lambda name: (_VARIANTS.index(name) if name in _VARIANTS else 9, name))
    ]
    if "" in chosen:
        return [chosen[""]]
    first = next(iter(chosen.values()))
    count = int(first.name.rpartition("-of-")[2].removesuffix(".safetensors"))
    if len(chosen) != count:
        raise WeightsError(
            f"{first.name} is one of {count} files, of which only {len(chosen)} are here: add the others."
        )
    return list(chosen.values())
