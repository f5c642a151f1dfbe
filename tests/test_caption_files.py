"""Captions that come with pictures: tables, text files, and the names that connect them."""

from pathlib import Path

import pytest

from dataset_and_utils import ContractError
from sdxl.data.caption_table import read_caption_table


@pytest.mark.parametrize("column", ["image_file", "image_path", "file_name"])
def test_captions_csv_columns(tmp_path: Path, column: str):
    path = tmp_path / "captions.csv"
    path.write_text(f'caption, {column},extra\n"a, TOK",1.png,x\nb TOK , 2.png,y\n', encoding="utf-8-sig")
    assert {row.file: row.caption for row in read_caption_table(path)} == {
        "1.png": "a, TOK",
        "2.png": "b TOK",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,text\n1.png,a\n", "columns image_file and caption"),
        ("image_file,caption\n1.png,\n", "Line 2"),
        ("image_file,caption\n1.png,a\n1.png,b\n", "Line 3"),
        ("", "cannot be read"),
    ],
)
def test_wrong_captions_csv_is_refused_by_line(tmp_path: Path, content: str, message: str):
    path = tmp_path / "captions.csv"
    path.write_text(content)
    with pytest.raises(ContractError, match=message):
        read_caption_table(path)
