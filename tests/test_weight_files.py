"""This project's safetensors reader gives the library's result and checks every claim of a header."""

import json
import shutil
import struct
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from dataset_and_utils import read_embeddings, write_embeddings
from sdxl.errors import UserInputError, WeightsError
from sdxl.files.archives import in_place, pack_tar
from sdxl.files.checksums import checksum
from sdxl.files.weight_files import WeightFile
from sdxl.files.weight_image import StoppedError, WeightImage
from sdxl.model import fine_tune_files
from sdxl.model.components import load_components, load_unet
from sdxl.model.token_files import read_rows
from sdxl.serving.pipeline import load_pipeline
from tests.conftest import TINY_BASE

TENSORS = {
    "a": torch.randn(3, 5),
    "half": torch.randn(7).half(),
    "b16": torch.randn(2, 2).bfloat16(),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "nothing": torch.zeros(0, 4),
    "number": torch.tensor(3.0),
    "large": torch.randn(3000, 3001),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_a_file_is_read_as_the_library_reads_it(file: Path):
    weights = WeightFile(file, file.name)
    assert weights.keys == TENSORS.keys() and weights.metadata == {"format": "pt"}
    read = weights.read(pinned=True)
    file.unlink()
    assert same(read, TENSORS)
    assert all(tensor.is_contiguous() for tensor in read.values())


def test_a_file_is_read_directly_from_a_tar(file: Path, tmp_path: Path):
    (tmp_path / "before.txt").write_text("x" * 700)
    tar = tmp_path / "x.tar"
    pack_tar({"a.txt": tmp_path / "before.txt", "sub/x.safetensors": file}, tar)
    places = in_place(tar)
    assert places is not None
    start, size = places[Path("sub/x.safetensors")]
    assert same(WeightFile(tar, "x", start, size).read(), load_file(file))
    assert in_place(file) is None


def test_unaligned_tensors_are_read(tmp_path: Path):
    values = torch.randn(4)
    header = json.dumps(
        {
            "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "floats": {"dtype": "F32", "shape": [4], "data_offsets": [1, 17]},
        }
    ).encode()
    path = tmp_path / "odd"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\7" + values.numpy().tobytes())
    read = WeightFile(path, "odd").read()
    assert torch.equal(read["floats"], values) and read["byte"].item() == 7


def entry(**changes: object) -> dict:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    "header",
    [
        entry(dtype="F33"),
        entry(shape=[3]),
        entry(shape=[-1, -2]),
        entry(shape="ab"),
        entry(data_offsets=[0, 80]),
        entry(data_offsets=[8, 0]),
        entry(data_offsets=[-8, 0]),
        entry(data_offsets=[0.0, 8.0]),
        entry(data_offsets=[0, 4], shape=[1]),
        entry() | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        entry(data_offsets=[4, 8], shape=[1]),
        entry(shape=""),
        entry(shape={}),
        entry(shape=[True, 2]),
        entry(shape=[2**70, 0], data_offsets=[0, 0]),
        entry(shape=[2**39] * 9 + [0], data_offsets=[0, 0]),
        {"a": 3},
        ["a"],
        None,
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object):
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(WeightsError, match=r"x\.safetensors is damaged"):
        WeightFile(path, path.name).read()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"abc", "is a text file: give a .safetensors file"),
        (b"<html>", "is a web page"),
        (struct.pack("<Q", 2**60) + b"{}", "is damaged or not a safetensors file"),
        (struct.pack("<Q", 5) + b"\xff\xff{}}", "is damaged or not a safetensors file"),
        (struct.pack("<Q", 5) + b"{\xff\xff{}", "is damaged: download it again"),
        (struct.pack("<Q", 500) + b'{"a": ', "has only 14 of 508 bytes: download or copy it again"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        WeightFile(path, path.name).read()


def test_cut_off_files_and_foreign_numbers_are_named(file: Path):
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(WeightsError, match=f"has only {len(whole) - 7:,} of {len(whole):,} bytes"):
        _ = WeightFile(file, file.name).keys
    save_file({"a": torch.zeros(3, dtype=torch.uint16)}, file)
    with pytest.raises(WeightsError, match=r"^x\.safetensors holds U16 numbers, which cannot be read here"):
        _ = WeightFile(file, file.name).keys


def test_metadata_is_text(tmp_path: Path):
    text = json.dumps({"__metadata__": {"a": 3, "b": "c"}}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text)
    assert WeightFile(tmp_path / "x", "x").metadata == {"b": "c"}


def test_a_file_that_shrinks_is_refused(file: Path):
    weights = WeightFile(file, file.name)
    assert weights.keys
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="damaged"):
        weights.read()


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "several"])
def test_a_unet_is_loaded_as_diffusers_loads_it(tmp_path: Path, shards: bool):
    theirs = UNet2DConditionModel.from_pretrained(TINY_BASE / "unet", variant="fp16", dtype=torch.bfloat16)
    folder = TINY_BASE
    if shards:
        folder = tmp_path
        theirs.half().save_pretrained(folder / "unet", max_shard_size="1MB", variant="fp16")
        assert len(list((folder / "unet").glob("*.safetensors"))) > 2
        theirs.bfloat16()
    ours = load_unet(folder, torch.bfloat16, torch.device("cpu"))
    assert same(ours.state_dict(), theirs.state_dict())
    assert dict(ours.config).keys() >= dict(theirs.config).keys() - {"_name_or_path"}
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())


def test_a_damaged_unet_of_the_base_is_named(tmp_path: Path):
    shutil.copytree(TINY_BASE, tmp_path / "base")
    file = next((tmp_path / "base" / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    for load in (load_pipeline, partial(load_components, is_lora=True)):
        with pytest.raises(WeightsError, match=r"diffusion_pytorch_model.fp16.safetensors is damaged"):
            load(tmp_path / "base", device=torch.device("cpu"))
    shutil.rmtree(tmp_path / "base" / "unet")
    for load in (load_pipeline, partial(load_components, is_lora=True)):
        with pytest.raises(WeightsError, match="is not a complete UNet"):
            load(tmp_path / "base", device=torch.device("cpu"))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae"])
def test_other_damaged_parts_of_the_base_are_named(tmp_path: Path, part: str):
    shutil.copytree(TINY_BASE, tmp_path / "base")
    file = next((tmp_path / "base" / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    for load in (load_pipeline, partial(load_components, is_lora=True)):
        with pytest.raises(WeightsError, match="is not a complete SDXL"):
            load(tmp_path / "base", device=torch.device("cpu"))


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "several"])
@pytest.mark.parametrize("wrong", ["widened", "missing"])
def test_another_models_unet_is_refused(tmp_path: Path, wrong: str, shards: bool):
    unet = UNet2DConditionModel.from_pretrained(TINY_BASE / "unet", variant="fp16")
    shutil.copytree(TINY_BASE, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    if wrong == "widened":
        unet.conv_in.weight = torch.nn.Parameter(torch.zeros(*unet.conv_in.weight.shape[:1], 9, 3, 3))
    else:
        unet.conv_in.bias = None
    config = (TINY_BASE / "unet" / "config.json").read_text()
    unet.save_pretrained(tmp_path / "base" / "unet", max_shard_size="1MB" if shards else "10GB")
    (tmp_path / "base" / "unet" / "config.json").write_text(config)
    with pytest.raises(WeightsError, match="base/unet is not a complete UNet") as refused:
        load_unet(tmp_path / "base", torch.float32, torch.device("cpu"))
    assert "\n" not in str(refused.value)


def test_messages_about_embeddings_do_not_tell_the_servers_folders(tmp_path: Path):
    save_file({"text_encoders_1": torch.zeros(2, 4)}, tmp_path / "embeddings.pti")
    with pytest.raises(UserInputError, match=r"^embeddings\.pti holds no token embeddings"):
        read_embeddings(tmp_path / "embeddings.pti")
    save_file({"text_encoders_0": torch.zeros(2)}, tmp_path / "embeddings.pti")
    with pytest.raises(UserInputError, match=r"^embeddings\.pti must hold"):
        read_embeddings(tmp_path / "embeddings.pti")


def test_words_without_rows_are_refused(tmp_path: Path):
    write_embeddings(tmp_path / "embeddings.pti", [torch.zeros(2, 8), torch.zeros(2, 8)])
    for rows, fits in (("<s0><s1>", True), ("<s1><s2>", False), ("<s7>", False)):
        (tmp_path / "special_params.json").write_text(json.dumps({"TOK": rows}))
        files = fine_tune_files.read(tmp_path, tmp_path)
        if fits:
            read_rows(files)
            continue
        with pytest.raises(WeightsError, match=r"has words for other rows than the 2 in embeddings\.pti"):
            read_rows(files)


def test_an_image_in_memory_is_the_file_that_the_library_reads(tmp_path: Path):
    tensors = {
        "b": torch.arange(6, dtype=torch.uint8),
        "a": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "none": torch.empty(0),
        "number": torch.tensor(3.5),
    }
    image = WeightImage(tensors)
    for name, value in tensors.items():
        image.tensors[name].copy_(value)
    assert image.write(tmp_path / "x.safetensors", threading.Event()) == checksum(tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_size == image.nbytes
    for read in (load_file(tmp_path / "x.safetensors"), WeightFile(tmp_path / "x.safetensors", "x").read()):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], value) for name, value in tensors.items())
    assert image.is_for(tensors) and not image.is_for({**tensors, "a": torch.randn(5, 3)})
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        image.write(tmp_path / "y", stop)
