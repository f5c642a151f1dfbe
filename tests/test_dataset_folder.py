"""The dataset folder: what preprocessing writes is what training reads."""

from pathlib import Path

import pytest
from PIL import Image

from dataset_and_utils import ContractError
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.data.caption_table import read_caption_table
from sdxl.data.dataset_folder import (
    FRAMING_COLUMNS,
    TABLE,
    earlier_framings,
    mask_file,
    picture_file,
    read_dataset_folder,
    write_captions,
)
from sdxl.data.framing import Framing
from sdxl.errors import DatasetError
from tests.conftest import png, write_zip


def read_framings(table: Path) -> dict[str, tuple[int, int, int, int]]:
    """The framing numbers of a table's pictures, as preprocessing reads them."""
    rows = {table.parent / row.file: row for row in read_caption_table(table)}
    return {picture.name: numbers for picture, numbers in earlier_framings(rows).items()}


def write_folder(folder: Path, captions: list[str]) -> list[Framing]:
    """A dataset folder of pictures of 96×64 pixels (wide), of which the first has a mask."""
    framings = []
    for index in range(len(captions)):
        picture_file(folder, index).write_bytes(png(index, (96, 64)))
        framings.append(
            Framing(original_size=(200, 300 + index), crop_top_left=(index, 7), target_size=(64, 96))
        )
    Image.new("L", (96, 64), 255).save(mask_file(picture_file(folder, 0)))
    names = [picture_file(folder, index).name for index in range(len(captions))]
    write_captions(folder / TABLE, dict(zip(names, captions, strict=True)), framings)
    return framings


def test_names_are_those_on_disk(tmp_path: Path):
    assert picture_file(tmp_path, 12) == tmp_path / "12.src.png"
    assert mask_file(tmp_path / "12.src.png") == tmp_path / "12.mask.png"
    assert mask_file(tmp_path / "other.png") == tmp_path / "other.png.mask.png"


def test_what_is_written_is_read(tmp_path: Path):
    captions = ['TOK, a "red" ball', "é TOK\nin two lines", "TOK"]
    framings = write_folder(tmp_path, captions)
    pictures = read_dataset_folder(tmp_path)
    assert [picture.caption for picture in pictures] == captions
    assert [picture.framing for picture in pictures] == framings
    assert [picture.picture.name for picture in pictures] == ["0.src.png", "1.src.png", "2.src.png"]
    assert [picture.mask for picture in pictures] == [tmp_path / "0.mask.png", None, None]
    assert {row.file: row.caption for row in read_caption_table(tmp_path / TABLE)} == {
        picture.picture.name: picture.caption for picture in pictures
    }


def test_the_tables_order_counts(tmp_path: Path):
    write_folder(tmp_path, ["TOK a", "TOK b", "TOK c"])
    header, *rows = (tmp_path / TABLE).read_text().splitlines()
    (tmp_path / TABLE).write_text("\n".join([header, *reversed(rows)]))
    assert [picture.caption for picture in read_dataset_folder(tmp_path)] == ["TOK c", "TOK b", "TOK a"]


def test_prepared_pictures_are_read_back(tmp_path: Path):
    archive = write_zip(tmp_path / "x.zip", {"a.png": png(0, (300, 200)), "a.txt": "TOK"})
    folder = prepare_dataset(archive, tmp_path / "dataset", config=PreprocessConfig(target_size=64))
    (picture,) = read_dataset_folder(folder)
    assert picture.caption == "TOK"
    assert picture.framing.time_ids == [200, 300, 0, 16, 64, 64]


def test_spreadsheets_may_write_integers_as_decimals(tmp_path: Path):
    table = tmp_path / TABLE
    table.write_text(f"image_file,caption,{','.join(FRAMING_COLUMNS)}\n0.src.png,TOK, 200.0 ,300,1,2\n")
    assert read_framings(table) == {"0.src.png": (200, 300, 1, 2)}


def test_tables_without_numbers_have_no_framings(tmp_path: Path):
    (tmp_path / TABLE).write_text("image_file,caption\n0.src.png,TOK\n")
    assert read_framings(tmp_path / TABLE) == {}


@pytest.mark.parametrize("numbers", ["0,9,0,0", "9,9,-1,0", "9,9,x,0", "9,9,0,2000000", "9,9,0,"])
def test_wrong_numbers_are_refused(tmp_path: Path, numbers: str):
    table = tmp_path / TABLE
    table.write_text(f"image_file,caption,{','.join(FRAMING_COLUMNS)}\n0.src.png,TOK,{numbers}\n")
    with pytest.raises(DatasetError, match=r"row of 0\.src\.png in captions\.csv has a wrong number"):
        read_framings(table)


def test_damaged_folders_are_refused(tmp_path: Path):
    write_folder(tmp_path, ["TOK", "TOK"])
    picture_file(tmp_path, 1).unlink()
    with pytest.raises(DatasetError, match=r"1\.src\.png is missing or damaged"):
        read_dataset_folder(tmp_path)
    (tmp_path / TABLE).write_text("image_file,caption\n0.src.png,TOK\n")
    with pytest.raises(DatasetError, match="needs the columns original_height"):
        read_dataset_folder(tmp_path)
    (tmp_path / TABLE).unlink()
    with pytest.raises(ContractError, match="cannot be read"):
        read_dataset_folder(tmp_path)
