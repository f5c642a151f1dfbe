"""Whatever bytes strangers send, each parser gives a value or refuses them in one printable sentence."""

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from dataset_and_utils import TokenMap, UserInputError, read_embeddings
from sdxl.data.caption_table import caption_in_json, read_caption_table
from sdxl.data.caption_text import join_caption, require_token
from sdxl.data.mask_reader import read_mask
from sdxl.data.picture_reader import read_image
from sdxl.files.archives import Limits, unpack
from sdxl.files.fetching import decode_data_uri, is_remote, name_of
from sdxl.files.sources import allowed_fine_tune
from sdxl.files.weight_files import WeightFile
from sdxl.model import fine_tune_files
from sdxl.model.lora_metadata import read_alphas

SMALL = Limits(files=20, total_bytes=1 << 16)
SETTINGS = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def said_or_done(call: Callable[..., Any], *arguments: Any) -> None:
    """Run `call`: it may succeed, or refuse its input in a sentence."""
    try:
        call(*arguments)
    except UserInputError as error:
        said = str(error)
        assert said.isprintable(), said
        assert 0 < len(said) <= UserInputError.LONGEST_MESSAGE, said


@st.composite
def damaged(draw: st.DrawFn, examples: list[bytes]) -> bytes:
    """One of `examples` with bytes changed, cut, doubled or put in."""
    content = bytearray(draw(st.sampled_from(examples)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["flip", "cut", "double", "insert", "number"]))
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at : at + draw(st.integers(0, 64))]
        elif kind == "double":
            content[at:at] = content[at : at + draw(st.integers(0, 64))]
        elif kind == "number":
            content[at : at + 8] = draw(
                st.sampled_from([b"\xff" * 8, b"\x80" + b"\0" * 7, b"99999999", b"-1      "])
            )
        else:
            content[at:at] = draw(st.binary(max_size=16))
    return bytes(content)


def picture(kind: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    files = {"a/1.jpg": b"x" * 700, "1.txt": b"TOK", "a" * 120 + "/b": b""}
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
            for name, content in files.items():
                opened.writestr(name, content)
    else:
        with tarfile.open(fileobj=buffer, mode=kind, format=tarfile.PAX_FORMAT) as opened:  # type: ignore[call-overload]
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                opened.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVES = [archive(kind) for kind in ("zip", "w", "w:gz", "w:xz", "w:bz2")]
PICTURES = [
    picture(kind, mode) for kind, mode in (("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "RGB"), ("WEBP", "RGB"))
]
PICTURES += [picture(kind) for kind in ("GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "TGA")]
LORA = {"unet.x.lora_A.weight": torch.ones(2, 4), "unet.x.lora_B.weight": torch.ones(4, 2)}
ROWS = {"text_encoders_0": torch.ones(2, 4), "text_encoders_1": torch.ones(2, 8)}
CONFIG = {"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {".*x": 4}}
WEIGHTS = [
    save(LORA),
    save(LORA, metadata={"lora_adapter_metadata": json.dumps(CONFIG)}),
    save(ROWS, metadata={"pooled_at": "eos"}),
    struct.pack("<Q", 2) + b"{}",
]
TABLES = [
    b'image_file,caption\n1.jpg,"a photo of TOK, asleep"\n2.jpg,TOK\n',
    "image_file;caption\r\n1.jpg;TOK é\r\n".encode("utf-16"),
    b'{"file_name": "1.jpg", "text": "TOK one"}\n',
    b'[{"file_name": "1.jpg", "text": "TOK one"}]',
]
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text("TOK:,_<s>0123456789 ()*\\.", max_size=60),
    st.integers(1, 5000).map(lambda count: "TOK:" + "9" * count),
    st.integers(1, 5000).map(lambda count: "[" * count),
)


@SETTINGS
@given(content=damaged(ARCHIVES))
def test_archives(tmp_path: Path, content: bytes):
    file, out = tmp_path / "set.zip", tmp_path / "out"
    file.write_bytes(content)
    said_or_done(lambda: unpack(file, out, limits=SMALL))
    assert {path.name for path in tmp_path.iterdir()} <= {"set.zip", "out"}
    if out.exists():
        assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) <= 50 * SMALL.total_bytes


@SETTINGS
@given(content=damaged(PICTURES))
def test_pictures_and_masks(tmp_path: Path, content: bytes):
    file = tmp_path / "1.png"
    file.write_bytes(content)
    said_or_done(lambda: read_image(file))
    said_or_done(lambda: read_mask(file))


def rows_of(folder: Path) -> None:
    """Read a fine-tune and its token rows, as serving does."""
    fine_tune_files.read_rows(fine_tune_files.read(folder, folder))


@SETTINGS
@given(content=damaged(WEIGHTS))
def test_weights_and_embeddings(tmp_path: Path, content: bytes):
    folder = tmp_path / "fine-tune"
    folder.mkdir(exist_ok=True)
    for name in ("lora.safetensors", "embeddings.pti"):
        file = folder / name
        file.write_bytes(content)
        said_or_done(WeightFile(file, name).read)
        said_or_done(read_embeddings, file)
        said_or_done(rows_of, folder)
        file.unlink()


@SETTINGS
@given(content=damaged(TABLES), suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".txt"]))
def test_tables_of_captions(tmp_path: Path, content: bytes, suffix: str):
    file = tmp_path / f"captions{suffix}"
    file.write_bytes(content)
    said_or_done(lambda: read_caption_table(file))
    said_or_done(lambda: caption_in_json(file))


@SETTINGS
@given(text=TEXTS, other=TEXTS)
def test_token_maps_and_captions(tmp_path: Path, text: str, other: str):
    token_map = TokenMap.parse("TOK:2,OTHER_TOK:3")
    said_or_done(lambda: TokenMap.parse(text))
    said_or_done(lambda: token_map.parse_init(text))
    said_or_done(lambda: require_token(text, token_map, "The caption"))
    assert isinstance(token_map.substitute(text), str)
    assert isinstance(join_caption(text, other), str)
    file = tmp_path / "special_params.json"
    for content in (text, json.dumps({"TOK": text}), json.dumps({text: "<s0>"})):
        file.write_text(content, errors="replace")
        said_or_done(lambda: TokenMap.read(file))


@SETTINGS
@given(
    settings_of=st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-5, 10**400), st.floats(), TEXTS),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
        max_leaves=6,
    ),
    name=st.sampled_from(["unet.lora_alpha", "unet.r", "unet.use_rslora", "unet.rank_pattern"]),
)
def test_metadata_of_loras(settings_of: Any, name: str):
    try:
        metadata = {"lora_adapter_metadata": json.dumps(CONFIG | {name: settings_of})}
    except ValueError:  # more digits than Python writes
        return
    said_or_done(lambda: read_alphas(metadata, {"unet.x": 2}, "a.safetensors"))


@SETTINGS
@given(
    text=st.one_of(TEXTS, TEXTS.map(lambda text: f"http://{text}"), TEXTS.map(lambda text: f"data:{text}"))
)
def test_sources(tmp_path: Path, text: str):
    name = name_of(text)
    assert name and "/" not in name and name not in (".", "..") and len(name.encode()) <= 255
    assert isinstance(is_remote(text), bool)
    said_or_done(lambda: decode_data_uri(f"data:{text}", tmp_path))
    said_or_done(lambda: allowed_fine_tune(text, "replicate_weights"))


@pytest.mark.parametrize(
    "call",
    [
        lambda folder: TokenMap.parse("TOK:" + "9" * 5000),
        lambda folder: TokenMap.parse(",".join(f"{letter}_TOK:64" for letter in "ABCDEFGHIJKLMNOPQRST")),
        lambda folder: TokenMap.read(folder / "deep.json"),
        lambda folder: TokenMap.read(folder / "digits.json"),
        lambda folder: TokenMap.read(folder / "many.json"),
    ],
    ids=["digits", "rows", "deep", "digits of a placeholder", "many placeholders"],
)
def test_token_maps_have_limits(tmp_path: Path, call: Callable[[Path], Any]):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "digits.json").write_text(json.dumps({"TOK": f"<s{'9' * 5000}>"}))
    (tmp_path / "many.json").write_text(json.dumps({"TOK": "<s0>" * 1001}))
    with pytest.raises(UserInputError):
        call(tmp_path)
