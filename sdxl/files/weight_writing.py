"""Write safetensors so that equal contents give equal bytes, and a file appears complete or not at all.

Knows the format (https://huggingface.co/docs/safetensors); does not know what the tensors are.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from sdxl.files.archives import atomic_path


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors`, from any device, with `metadata` to `path`."""
    own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as partial:
        save_file(own, partial, dict(metadata))
        _sort_metadata(partial)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata by key: the library writes it in another order in each process."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        metadata = dict(sorted(header.pop("__metadata__").items()))
        text = json.dumps(
            {"__metadata__": metadata, **header}, separators=(",", ":"), ensure_ascii=False
        ).encode()
        assert len(text) <= length, "the same entries in another order take the same space"
        file.seek(8)
        file.write(text.ljust(length))
