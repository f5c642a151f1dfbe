"""Captions that come with pictures: tables, text files, and the names that connect them."""

from pathlib import Path

import pytest

from dataset_and_utils import ContractError, TokenMap
from sdxl.data.caption_files import find_captions
from sdxl.data.caption_table import read_caption_table
from sdxl.data.caption_text import require_token
from sdxl.data.picture_names import PictureNames
from sdxl.data.source_folder import Source, open_source
from sdxl.errors import DatasetError
from tests.conftest import png


def source_of(folder: Path, files: dict[str, str]) -> Source:
    """A folder with text files, and a picture for every name that ends in .png."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(1) if name.endswith(".png") else text.encode())
    return open_source(folder, folder)


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


def test_line_numbers_are_those_of_the_file(tmp_path: Path):
    """Empty rows and line breaks in quotes count, as in an editor."""
    path = tmp_path / "captions.csv"
    path.write_text('image_file,caption\n\n1.png,"two\nlines"\n,\n2.png,a, b\n')
    with pytest.raises(ContractError, match=r"Line 6 of captions\.csv has 3 cells for 2 columns"):
        read_caption_table(path)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_leave_commas_to_the_captions(tmp_path: Path, delimiter: str):
    path = tmp_path / "captions.csv"
    path.write_text(f"image_file{delimiter}caption\n1.png{delimiter}TOK, asleep\n")
    assert [row.caption for row in read_caption_table(path)] == ["TOK, asleep"]


def test_a_table_of_rows_in_json_may_have_numbers(tmp_path: Path):
    path = tmp_path / "metadata.json"
    path.write_text('{"1": "TOK one", "2": {"caption": "TOK two", "score": 0.5}}')
    assert [(row.file, row.caption) for row in read_caption_table(path)] == [
        ("1", "TOK one"),
        ("2", "TOK two"),
    ]
    path.write_text('{"1": ' + "[" * 100_000)
    with pytest.raises(ContractError, match="cannot be read as JSON"):
        read_caption_table(path)


def test_the_best_match_of_a_name_wins(tmp_path: Path):
    images = [tmp_path / name for name in ("a.png", "A.png", "sub/a.png", "b.jpg", "sub/c.png", "d/c.png")]
    names = PictureNames(images, tmp_path)

    def found(name: str, folder: str = "") -> list[str]:
        return sorted(str(path.relative_to(tmp_path)) for path in names.named(name, tmp_path / folder))

    assert found("a.png") == ["a.png"]
    assert found("a.png", "sub") == ["a.png"]  # a path from the root comes before one from the folder
    assert found("A.png") == ["A.png"]
    assert found("sub\\A.PNG") == ["sub/a.png"]
    assert found("b") == found("B.png") == found("C:\\Users\\me\\b.jpg") == ["b.jpg"]
    assert found("c.png", "sub") == ["sub/c.png"]
    assert found("c.png") == ["d/c.png", "sub/c.png"]
    assert found("e.png") == []


def test_global_caption_is_told_when_it_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    files = source_of(tmp_path, {"1.png": "", "1.txt": "TOK one"})
    given = find_captions(files, global_caption="a TOK")
    assert given is not None
    assert list(given.texts.values()) == ["TOK one"]
    assert "global_caption is not used" in caplog.text


def test_files_that_may_hold_captions_do_not_stop_a_global_caption(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    files = source_of(tmp_path, {"1.png": "", "notes.txt": "TOK one"})
    given = find_captions(files, global_caption="a TOK")
    assert given is not None
    assert list(given.texts.values()) == ["a TOK"]
    assert "Ignored notes.txt" in caplog.text


def test_rows_that_name_other_files_are_told_apart_from_missing_ones(tmp_path: Path):
    files = source_of(
        tmp_path, {"1.png": "", "2.psd": "8BPS", "captions.csv": "image_file,caption\n1.png,TOK\n2.psd,TOK\n"}
    )
    with pytest.raises(
        DatasetError, match=r"names 2\.psd, which is there, but this kind of file is not read"
    ):
        find_captions(files, global_caption=None)


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a photo", 'global_caption, "a photo", names no token of token_map: add TOK as a separate word'),
        ("a photo of Tok", 'has "Tok", but TOK must be a separate word and in the same case'),
        ("a photo of TOKs", 'has "TOKs", but TOK must be a separate word\\.'),
        ("a photo of my_tok", 'has "my_tok", but TOK must be a separate word and in the same case'),
        ("x" * 5000, "x{120}…"),
    ],
)
def test_captions_without_a_token_are_refused_with_what_they_have(caption: str, message: str):
    with pytest.raises(DatasetError, match=message):
        require_token(caption, TokenMap.parse("TOK:2"), "global_caption")
