"""Archives of all kinds, captions in all layouts, and how pictures are decoded."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmarks.photographs import photograph
from dataset_and_utils import ContractError, TokenMap
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.data.framing import cut, place_crop
from sdxl.data.picture_reader import read_image
from sdxl.errors import ArchiveError, UserInputError
from sdxl.files.archives import Limits, pack_tar, unpack
from tests.conftest import REPOSITORY, exchanged_profile, png, write_zip

TOK = TokenMap.parse("TOK:2")


def prepare(tmp_path: Path, source: Path, **settings) -> pd.DataFrame:
    config = PreprocessConfig(**{"target_size": 64, "token_map": TOK, **settings})
    folder = prepare_dataset(source, tmp_path / "dataset", config=config)
    table = pd.read_csv(folder / "captions.csv")
    for name in table["image_file"]:
        with Image.open(folder / name) as picture:
            assert picture.size == (config.target_size, config.target_size)
            assert picture.mode == "RGB"
    return table


def test_captions_are_matched_by_file_name_not_by_order(tmp_path: Path):
    files = {"b.png": png(1), "sub/a.jpg": png(2), "10.png": png(3), "captions.csv": ""}
    files["captions.csv"] = "image_file,caption\na.jpg,TOK a\n10.png,TOK ten\nb.png,TOK b\n"
    table = prepare(tmp_path, write_zip(tmp_path / "x.zip", files))
    assert sorted(table["caption"]) == ["TOK a", "TOK b", "TOK ten"]
    with Image.open(
        tmp_path / "dataset" / table.loc[table["caption"] == "TOK b", "image_file"].item()
    ) as picture:
        raw = read_image_bytes(png(1))
        whole = cut(raw, place_crop((raw.height, raw.width), (64, 64), None))
        assert np.array_equal(np.array(picture), np.array(whole))


def read_image_bytes(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def test_text_files_next_to_the_pictures(tmp_path: Path):
    files = {"1.png": png(1), "1.txt": "TOK  one\n", "2.PNG": png(2), "2.txt": "TOK two"}
    assert list(prepare(tmp_path, write_zip(tmp_path / "x.zip", files))["caption"]) == ["TOK one", "TOK two"]


def test_global_caption_and_prefix_are_for_pictures_without_captions(tmp_path: Path):
    bare = write_zip(tmp_path / "x.zip", {"1.png": png(1), "2.png": png(2)})
    assert set(prepare(tmp_path, bare, global_caption="this TOK")["caption"]) == {"this TOK"}
    assert set(prepare(tmp_path, bare)["caption"]) == {"a photo of TOK"}


def test_files_of_operating_systems_are_ignored(tmp_path: Path):
    files = {
        "1.png": png(1),
        "__MACOSX/._1.png": b"x",
        ".DS_Store": b"x",
        "Thumbs.db": b"x",
        "notes.pdf": b"x",
    }
    assert len(prepare(tmp_path, write_zip(tmp_path / "x.zip", files))) == 1


def test_a_finished_dataset_keeps_its_masks(tmp_path: Path):
    mask = Image.fromarray(np.array([[0, 255], [0, 255]], dtype=np.uint8)).resize(
        (64, 64), Image.Resampling.NEAREST
    )
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    files = {"0.src.png": png(1, (64, 64)), "0.mask.png": buffer.getvalue()}
    files["captions.csv"] = b"image_file,caption\n0.src.png,TOK\n"
    assert len(prepare(tmp_path, write_zip(tmp_path / "x.zip", files))) == 1
    with Image.open(tmp_path / "dataset" / "0.mask.png") as kept:
        assert np.array_equal(np.array(kept), np.array(mask))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2"])
def test_tars_and_folders_give_what_zips_give(tmp_path: Path, mode: str):
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "1.png").write_bytes(png(1))
    (folder / "1.txt").write_text("TOK")
    with tarfile.open(tmp_path / "raw.tar", mode) as tar:  # type: ignore[call-overload]
        tar.add(folder, "raw")
    from_folder = prepare(tmp_path, folder)
    assert prepare(tmp_path, tmp_path / "raw.tar").equals(from_folder)


def test_pictures_are_turned_upright_and_transparency_becomes_white(tmp_path: Path):
    turned = Image.new("RGB", (40, 20), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg")[0].size == (20, 40)
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png")[0].getpixel((0, 0)) == (255, 255, 255)
    Image.new("I;16", (4, 4), 65535).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0].mode == "RGB"


def test_pictures_of_phones_are_read_upright():
    picture, size = read_image(REPOSITORY / "tests" / "data" / "turned.heic")
    assert size == (96, 64) and picture.size == (64, 96) and picture.mode == "RGB"
    lying = photograph("astronaut").resize((96, 64))
    turned = np.array(lying.transpose(Image.Transpose.ROTATE_270), dtype=float)
    assert np.corrcoef(turned.ravel(), np.array(picture, dtype=float).ravel())[0, 1] > 0.98


def test_deep_and_wide_colours_become_those_of_a_screen(tmp_path: Path):
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert np.array(read_image(tmp_path / "deep.png")[0])[0, 0].tolist() == [127] * 3
    # The profile of a screen with red and green exchanged.
    other = exchanged_profile("r", "g")
    red = Image.new("RGB", (8, 8), (200, 100, 50))
    red.save(tmp_path / "plain.png")
    red.save(tmp_path / "broken.png", icc_profile=b"no profile")
    red.save(tmp_path / "wide.png", icc_profile=other)
    plain, broken, wide = (
        np.array(read_image(tmp_path / f"{name}.png")[0])[0, 0].tolist()
        for name in ("plain", "broken", "wide")
    )
    assert plain == broken == [200, 100, 50]
    assert np.allclose(wide, [100, 200, 50], atol=2)


def test_the_framing_describes_the_crop():
    framing = place_crop((200, 300), (100, 100), None)
    assert cut(Image.new("RGB", (300, 200)), framing).size == (100, 100)
    assert framing.time_ids == [200, 300, 0, 25, 100, 100]


ROWS = "image_file,caption\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.txt": "x"}, "holds no pictures"),
        ({"1.png": b"not a picture"}, r"1\.png cannot be read"),
        ({"1.png": png(1)[:-40]}, r"1\.png cannot be read"),
        ({"1.png": png(1), "captions.csv": ROWS + "1.png,TOK\n2.png,TOK\n"}, r"names 2\.png"),
        ({"1.png": png(1), "2.png": png(2), "captions.csv": ROWS + "1.png,TOK\n"}, r"no row for 2\.png"),
        ({"1.png": png(1), "captions.csv": ROWS + "1.png,a dog\n"}, r"caption of 1\.png.*no token"),
        ({"1.png": png(1), "captions.csv": ROWS + "1.png,a stocky tok\n"}, "no token"),
        (
            {"a/1.png": png(1), "b/1.png": png(2), "captions.csv": ROWS + "1.png,TOK\n"},
            "several of that name",
        ),
        ({"1.png": png(1), "captions.csv": ROWS, "more captions.csv": ROWS}, "several captions files"),
        ({"1.png": png(1), "1.txt": ""}, r"1\.txt is empty"),
        ({"1.png": png(1), "2.png": png(2), "1.txt": "TOK"}, r"2\.png has no \.txt"),
    ],
)
def test_bad_data_sets_are_refused_by_name(tmp_path: Path, files: dict, message: str):
    with pytest.raises(UserInputError, match=message):
        prepare(tmp_path, write_zip(tmp_path / "x.zip", files))


@pytest.mark.parametrize("size", [0, 7, 65, 4096])
def test_bad_sizes_are_refused(size: int):
    with pytest.raises(UserInputError, match="multiple of 8"):
        PreprocessConfig(target_size=size)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"PK\x03\x04broken"])
def test_other_files_than_archives_are_refused(tmp_path: Path, content: bytes):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ArchiveError, match=r"x\.tar"):
        unpack(tmp_path / "x.tar", tmp_path / "out")


def test_empty_and_truncated_archives_are_refused(tmp_path: Path):
    with pytest.raises(ArchiveError, match="is empty"):
        unpack(write_zip(tmp_path / "empty.zip", {}), tmp_path / "out")
    whole = write_zip(tmp_path / "whole.zip", {"1.png": png(1)}).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArchiveError, match=r"cut\.zip"):
        unpack(tmp_path / "cut.zip", tmp_path / "out")


@pytest.mark.parametrize("kind", ["zip", "gz", "bz2", "xz"])
def test_damaged_archives_are_refused(tmp_path: Path, kind: str):
    noise = np.random.default_rng(0).integers(0, 8, 50_000, dtype=np.uint8).tobytes()
    file = tmp_path / f"x.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("1.png", noise)
    else:
        with tarfile.open(file, f"w:{kind}") as archive:  # pyright: ignore[reportCallIssue]
            entry = tarfile.TarInfo("1.png")
            entry.size = len(noise)
            archive.addfile(entry, io.BytesIO(noise))
    content = bytearray(file.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 400):
        content[place] ^= 0xA5
    file.write_bytes(content)
    with pytest.raises(ArchiveError, match=r"x\.\w+ (cannot be unpacked|is neither)"):
        unpack(file, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["../evil.png", "/evil.png", "a/../../evil.png", "C:/evil.png", "..\\evil.png"]
)
def test_paths_never_leave_the_folder(tmp_path: Path, name: str):
    with pytest.raises(ArchiveError, match="unsafe path"):
        unpack(write_zip(tmp_path / "x.zip", {name: b"x"}), tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil.png"))


def test_links_are_not_followed(tmp_path: Path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        entry = tarfile.TarInfo("1.png")
        entry.size = 3
        tar.addfile(entry, io.BytesIO(b"abc"))
    assert [path.name for path in unpack(tmp_path / "x.tar", tmp_path / "out")] == ["1.png"]


def test_limits_hold_whatever_the_headers_say(tmp_path: Path):
    bomb = write_zip(tmp_path / "x.zip", {f"{i}.bin": bytes(1000) for i in range(5)})
    with pytest.raises(ArchiveError, match="more than"):
        unpack(bomb, tmp_path / "a", limits=Limits(total_bytes=4999))
    with pytest.raises(ArchiveError, match="more than 4 files"):
        unpack(bomb, tmp_path / "b", limits=Limits(files=4))
    assert len(unpack(bomb, tmp_path / "c", limits=Limits(files=5, total_bytes=5000))) == 5


def test_packing_is_deterministic_and_atomic(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    pack_tar({"b": tmp_path / "b", "a": tmp_path / "a"}, tmp_path / "one.tar")
    (tmp_path / "a").touch()
    pack_tar({"a": tmp_path / "a", "b": tmp_path / "b"}, tmp_path / "two.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    with pytest.raises(FileNotFoundError):
        pack_tar({"x": tmp_path / "missing"}, tmp_path / "three.tar")
    assert not list(tmp_path.glob("*three*"))


def test_unreadable_text_is_refused(tmp_path: Path):
    with pytest.raises(ContractError, match=r"1\.txt is not UTF-8"):
        prepare(tmp_path, write_zip(tmp_path / "x.zip", {"1.png": png(1), "1.txt": b"\xff\x00TOK"}))
