"""Which files hold the weights of one part of a model, and whether all of them are there.

A part may be there in several variants, such as fp16, and each variant in one file or in several shards with an index.
Knows the names that diffusers and transformers give to these files; does not read weights.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_FILE = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)(?:\.(?P<variant>[a-z]\w*))?(?P<shard>-\d{5}-of-\d{5})?"
    r"(?:\.(?P<old>[a-z]\w*))?\.safetensors"
)
"""Older versions of diffusers wrote the variant of a shard behind its number."""
_PREFERRED = ("fp16", None)
"""Half precision is smallest; None is a part without variant."""


@dataclass(frozen=True, kw_only=True)
class PartFiles:
    """The files of one variant of a part."""

    variant: str | None
    """diffusers' and transformers' `variant`, such as "fp16"; None for names without one."""
    weights: tuple[str, ...]
    """Names of the files of weights: one, or all shards."""
    index: str | None
    """Name of the file that lists the shards; None without shards."""

    @property
    def names(self) -> list[str]:
        """The names of all files."""
        return [*self.weights, *([self.index] if self.index else [])]


def variants(names: Iterable[str]) -> list[PartFiles]:
    """What the file names in a part's folder offer, best first: fp16, then without variant, then others.

    Files with other names than diffusers and transformers read are ignored.
    """
    whole: dict[str | None, PartFiles] = {}
    shards: dict[tuple[str | None, str], list[str]] = {}
    for name in sorted(names):
        if (match := _FILE.fullmatch(name)) is None:
            continue
        variant = match["variant"] or match["old"]
        if match["shard"]:
            shards.setdefault((variant, match["stem"]), []).append(name)
        else:
            whole[variant] = PartFiles(variant=variant, weights=(name,), index=None)
    for (variant, stem), parts in shards.items():
        index = f"{stem}.safetensors.index.{f'{variant}.' if variant else ''}json"
        whole.setdefault(variant, PartFiles(variant=variant, weights=tuple(parts), index=index))
    order = [variant for variant in _PREFERRED if variant in whole]
    order += sorted(variant for variant in whole if variant not in _PREFERRED and variant is not None)
    return [whole[variant] for variant in order]


def present(part: Path) -> PartFiles | None:
    """The best variant in the folder `part` of which every file is there; None if there is none.

    An interrupted download or copy leaves an index whose shards are missing, or shards without an index.
    """
    names = {path.name for path in part.glob("*") if path.is_file()}
    return next((files for files in variants(names) if _is_whole(part, files, names)), None)


def _is_whole(part: Path, files: PartFiles, names: set[str]) -> bool:
    if files.index is None:
        return True
    try:
        listed = json.loads((part / files.index).read_text())["weight_map"].values()
        return set(listed) <= names  # all are names of files in this folder, so none leads out of it
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
