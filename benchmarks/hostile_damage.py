"""Seeded damage for `benchmarks.hostile`: to bytes, headers, texts, names and kinds of files.

Each way of damage changes an `Input` in place. Also makes the small files that damage mixes in.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import random
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save

BASE = Path("base_models/tiny-sdxl")
RANK = 2
COLOURS = [(220, 40, 40), (40, 180, 60), (50, 70, 220), (230, 200, 40)]
"""Colours of the pictures, in order."""
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP"}
HUGE = (0, -1, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, -(2**63))

Files = dict[str, bytes]
"""Name in an archive → content."""


@dataclass
class Input:
    """Something to put through one of the doors."""

    door: str
    """"dataset", "weights" or "request"."""
    name: str
    """File name; for a request that of its picture."""
    content: bytes
    given: dict[str, Any] = field(default_factory=dict)
    """For a request: its inputs. `FILE` stands for the content as a file, `MASK` for a mask that fits."""
    expected: Any = None
    """For a control: captions and masks, or the kind of fine-tune, or the size of the pictures."""
    damage: list[str] = field(default_factory=list)


class Materials:
    """Files that take time to make, shared by all inputs."""

    def __init__(self, trained: bytes) -> None:
        """`trained` is the trained_model.tar of a LoRA."""
        self.matrices = _matrices()
        with tarfile.open(fileobj=io.BytesIO(trained)) as tar:
            self.trained: Files = {
                member.name: tar.extractfile(member).read()  # type: ignore[union-attr]
                for member in tar.getmembers()
            }
        ours, kohya = {}, {}
        for name, (down, up) in self.matrices.items():
            ours |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
            key = "lora_unet_" + name.replace(".", "_")
            kohya |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            kohya[f"{key}.alpha"] = torch.tensor(float(RANK))
        self.ours, self.kohya = save(ours), save(kohya)


def _matrices() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer of the UNet → the two matrices of a LoRA."""
    unet = load_file(BASE / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    dice = torch.Generator().manual_seed(0)
    shapes = {key.removesuffix(".weight"): v.shape for key, v in unet.items() if key.endswith("to_q.weight")}
    return {
        name: (torch.randn(RANK, wide, generator=dice), 0.1 * torch.randn(high, RANK, generator=dice))
        for name, (high, wide) in sorted(shapes.items())
    }


def picture(kind: str, colour: tuple[int, int, int], size: tuple[int, int] = (72, 66)) -> bytes:
    """A picture of one colour with a darker corner."""
    image = Image.new("RGB", size, colour)
    image.paste((20, 20, 20), (0, 0, 9, 9))
    buffer = io.BytesIO()
    image.save(buffer, FORMATS[kind])
    return buffer.getvalue()


def mask(size: tuple[int, int] = (72, 66)) -> bytes:
    """White on black."""
    image = Image.new("L", size)
    image.paste(255, (20, 20, 60, 50))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pack(files: Mapping[str, bytes], packing: str) -> bytes:
    """An archive of `files`; equal contents give equal bytes."""
    buffer = io.BytesIO()
    if packing == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in files.items():
                archive.writestr(zipfile.ZipInfo(name), content)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    compress = {"tar": bytes, "tar.gz": lambda data: gzip.compress(data, mtime=0), "tar.xz": lzma.compress}
    return compress[packing](buffer.getvalue())


# Ways of damage -------------------------------------------------------------------------------------------------------

Damage = Callable[[Input, random.Random, Materials], None]


def damage(made: Input, dice: random.Random, materials: Materials, ways: list[Damage]) -> None:
    """Damage `made` in place, in one of these ways."""
    way = dice.choice(ways)
    way(made, dice, materials)
    made.damage.append(way.__name__)


def flip(made: Input, dice: random.Random, _: Materials) -> None:
    """Flip some bytes; half of the time near the beginning."""
    data = bytearray(made.content or b"\0")
    reach = min(len(data), 600) if dice.random() < 0.5 else len(data)
    for _time in range(dice.choice((1, 3, 30))):
        data[dice.randrange(reach)] ^= dice.randrange(1, 256)
    made.content = bytes(data)


def cut(made: Input, dice: random.Random, _: Materials) -> None:
    """Keep the beginning, or lose it."""
    at = dice.randrange(len(made.content) + 1)
    made.content = made.content[:at] if dice.random() < 0.8 else made.content[at:]


def duplicate(made: Input, dice: random.Random, _: Materials) -> None:
    """Repeat a chunk."""
    data = made.content
    start = dice.randrange(len(data) + 1)
    chunk = data[start : start + dice.choice((8, 512, 5000))]
    made.content = data[:start] + chunk * dice.choice((2, 50)) + data[start:]


def splice(made: Input, dice: random.Random, materials: Materials) -> None:
    """Write a chunk of another file over it."""
    other = dice.choice((*materials.trained.values(), materials.kohya, picture("png", COLOURS[0])))
    at, start = dice.randrange(len(made.content) + 1), dice.randrange(len(other))
    made.content = made.content[:at] + other[start : start + 2000] + made.content[at + 2000 :]


def number(made: Input, dice: random.Random, _: Materials) -> None:
    """Write a huge or negative number, binary or in digits, over one near the beginning or the end."""
    data, value = made.content, dice.choice(HUGE)
    found = list(re.finditer(rb"\d+", data[:4000]))
    if found and dice.random() < 0.6:
        one = dice.choice(found)
        text = dice.choice((str(value), "1e999", "NaN", "9" * 5000, "0.5")).encode()
        data = data[: one.start()] + text + data[one.end() :]
    else:
        size, order = dice.choice((4, 8)), dice.choice("<>")
        packed = struct.pack(f"{order}Q", value % 2**64)
        packed = packed[:size] if order == "<" else packed[-size:]
        at = dice.randrange(min(len(data), 600) + 1)
        at = at if dice.random() < 0.6 else max(0, len(data) - at)
        data = data[:at] + packed + data[at + size :]
    made.content = data


def header(made: Input, dice: random.Random, _: Materials) -> None:
    """Lie in the header of safetensors or of a png, with right lengths and check sums; else `number`."""
    data = made.content
    if data[:4] == b"\x89PNG":
        fields = bytearray(data[12:29])
        fields[4 + dice.randrange(13)] = dice.choice((0, 1, 3, 16, 127, 255))
        made.content = data[:12] + fields + struct.pack(">I", zlib.crc32(fields)) + data[33:]
        return
    length = struct.unpack("<Q", data[:8])[0] if len(data) > 8 else 0
    if not 0 < length < len(data) or data[8:9] != b"{":
        number(made, dice, _)
        return
    try:
        read = json.loads(data[8 : 8 + length])
        key = dice.choice(list(read))
        value = {
            "dtype": ["F16", "F64", "I8", "F8_E4M3", "BOOL", "BF16", "X"],
            "shape": [[], [0], [-1], [2**40, 2**40], [1], "x"],
        }
        value |= {"data_offsets": [[0, 0], [-1, 5], [5, 1], [0, 2**63], [0]]}  # fmt: skip
        if isinstance(read[key], dict) and dice.random() < 0.7:
            name = dice.choice(list(value))
            read[key][name] = dice.choice(value[name])
        else:
            read[dice.choice(("__metadata__", "a\n" * 300, "../x", "", key + "x"))] = dice.choice(
                (
                    read.pop(key),
                    {"lora_adapter_metadata": "[" * 5000},
                    None,
                    {"ss_network_alpha": "1e999"},
                    [[]],
                )
            )
    except (ValueError, IndexError, KeyError):
        number(made, dice, _)
        return
    packed = json.dumps(read).encode()
    made.content = struct.pack("<Q", len(packed)) + packed + data[8 + length :]


def text(made: Input, dice: random.Random, _: Materials) -> None:
    """Put odd text into it, at the beginning, at the end or after a comma, a quote or a line."""
    odd = dice.choice(
        ["\0", "\ufeff", '"', "\n\n,,,,\n", "[" * 20000, '{"a":' * 5000, "=" * 200_000, "\u2028", "TOK TOK", "\x1b[2J", "<s99>"]
    ).encode()  # fmt: skip
    places = [0, len(made.content), *(m.end() for m in re.finditer(rb'[,"\n:]', made.content[:5000]))]
    at = dice.choice(places)
    made.content = made.content[:at] + odd + made.content[at:]


def compress(made: Input, dice: random.Random, _: Materials) -> None:
    """Pack or compress it once more, or put zeros behind it that compress well."""
    data = made.content + bytes(dice.choice((0, 0, 30 << 20)))
    for _time in range(dice.choice((1, 1, 20))):
        ways = (
            lambda data: gzip.compress(data, mtime=0),
            lambda data: lzma.compress(data, preset=1),
            lambda data: pack({"a/b.zip": data}, "zip"),
        )
        data = dice.choice(ways)(data)
    made.content = data


def swap(made: Input, dice: random.Random, materials: Materials) -> None:
    """Another kind of file under this name."""
    empty_page = b"<!DOCTYPE html><html></html>"
    others = [
        picture("webp", COLOURS[1]),
        mask(),
        materials.ours,
        *materials.trained.values(),
        b"",
        b"\0",
        empty_page,
    ]
    others += [
        b"\x80\x04K\x01.",
        b"[" * 100_000,
        b"null",
        b"{}",
        b'{"TOK": "<s0>"}',
        b'{"TOK": "<s999999999999>"}',
    ]
    others += [pack(materials.trained, "tar"), "caption\n".encode("utf-16"), b"GIF89a" + bytes(20)]
    made.content = dice.choice(others)


def suffix(made: Input, dice: random.Random, _: Materials) -> None:
    """A wrong suffix, or none."""
    stem = made.name.partition(".")[0]
    made.name = stem + dice.choice(
        ("", ".zip", ".tar", ".safetensors", ".heic", ".gif", ".csv", ".json", ".txt", ".bin", ".PNG", ".pti", ".mask.png")
    )  # fmt: skip


def rename(made: Input, dice: random.Random, _: Materials) -> None:
    """A name that leads out of the folder, or that no system takes."""
    name = made.name
    made.name = dice.choice(
        [
            f"../{name}",
            f"../../../../{name}",
            f"/tmp/hostile-outside/{name}",
            f"a/../../{name}",
            f"..\\..\\{name}",
            "x" * 300 + name,
            "d/" * 400 + name,
            f"a\n\x1b[31m{name}",
            f"C:\\{name}",
            f"./{name}",
            ".",
            "..",
            "/",
            f"{name}/",
            f"\u202e{name}",
            f"é/{name}",
            f" {name} ",
            f"checkpoints/{name}",
            f"{name}/{name}",
            f".{name}",
            "con",
            f"~/{name}",
        ]
    )


NAMES: list[Damage] = [rename, rename, suffix]
IN_FILES: list[Damage] = [header, header, text, compress, swap, suffix]
IN_BYTES: list[Damage] = [flip, flip, cut, duplicate, splice, number, number]
