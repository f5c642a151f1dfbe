"""Archives of pictures and captions with one oddity each, and the right outcome of each.

Every kind was reported by people who fine-tune models. Picture `i` is one plain colour, so that a test sees which caption
went to which picture. Archives are made anew in every run.
"""

import io
import struct
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = [(200, 40, 40), (40, 180, 60), (50, 70, 200), (210, 190, 40), (150, 60, 170), (60, 180, 190)]
"""Colour of picture `i`, RGB."""

Content = bytes | str
Files = Mapping[str, Content]


def picture(
    index: int, kind: str = "JPEG", size: tuple[int, int] = (80, 72), mode: str = "RGB", **options
) -> bytes:
    """Picture `index` as a file of a format that Pillow calls `kind`; `size` is (width, height)."""
    image = Image.new("RGB", size, COLOURS[index])
    buffer = io.BytesIO()
    (image if mode == "RGB" else image.convert(mode)).save(buffer, kind, **options)
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One archive and what must become of it."""

    name: str
    write: Callable[[Path], Path]
    """Writes the archive into a folder; returns its path."""
    captions: Mapping[int, str] = field(default_factory=dict)
    """Index of a picture → its caption; exactly these pictures are learned. Empty where the archive is refused."""
    says: tuple[str, ...] = ()
    """Parts of the error where the archive is refused, else of the log. Compared without case."""

    @property
    def refused(self) -> bool:
        """Whether the archive must be refused."""
        return not self.captions


def _zip(name: str, files: Files) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / f"{name}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for inner, content in files.items():
                archive.writestr(inner, content)
        return path

    return write


def _without_utf8_flag(name: str, files: Files) -> Callable[[Path], Path]:
    """UTF-8 names without the zip's flag for them, as macOS and many other tools write them."""

    def write(folder: Path) -> Path:
        path = _zip(name, files)(folder)
        data = bytearray(path.read_bytes())
        for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            at = data.find(signature)
            while at >= 0:
                (flags,) = struct.unpack_from("<H", data, at + offset)
                struct.pack_into("<H", data, at + offset, flags & ~0x800)
                at = data.find(signature, at + 4)
        path.write_bytes(data)
        return path

    return write


def _tar(name: str, files: Files, mode: str = "w") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
            for inner, content in files.items():
                data = content.encode() if isinstance(content, str) else content
                entry = tarfile.TarInfo(inner)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        return path

    return write


def _file(name: str, content: Content) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def _inner_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("old.jpg", picture(5))
    return buffer.getvalue()


def _cut_zip(folder: Path) -> Path:
    path = _zip("cut", {"1.jpg": picture(0), "2.jpg": picture(1), "captions.csv": CSV})(folder)
    path.write_bytes(path.read_bytes()[:900])
    return path


TWO: Files = {"1.jpg": picture(0), "2.jpg": picture(1)}
CSV = "image_file,caption\n1.jpg,a photo of TOK\n2.jpg,a photo of TOK outside\n"
GOOD = {0: "a photo of TOK", 1: "a photo of TOK outside"}
PREFIX = "a photo of TOK"
"""What pictures without captions get where no captioner can be fetched."""
ONE_TWO = {0: "TOK one", 1: "TOK two"}


def _csv(
    name: str,
    text: str,
    captions: Mapping[int, str],
    *says: str,
    file: str = "captions.csv",
    encoding="utf-8",
):
    """Two pictures with a table."""
    return Case(
        name=name, write=_zip(name, {**TWO, file: text.encode(encoding)}), captions=captions, says=says
    )


def _set(name: str, files: Files, captions: Mapping[int, str], *says: str) -> Case:
    return Case(name=name, write=_zip(name, files), captions=captions, says=says)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def _deep() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((72, 80), 30000, dtype=np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def _animated(kind: str) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (80, 72), COLOURS[index]) for index in (0, 4)]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


COMPOSED = "café.jpg"

ARCHIVES = [
    Case(
        name="macos",
        write=_zip(
            "macos",
            {
                "set/1.jpg": picture(0),
                "set/2.jpg": picture(1),
                "__MACOSX/set/._1.jpg": b"\0\5\x16\7",
                "set/.DS_Store": b"x",
                "set/captions.csv": CSV,
                "__MACOSX/set/._captions.csv": b"\0\5\x16\7",
            },
        ),
        captions=GOOD,
    ),
    _set(
        "decomposed_names",
        {
            unicodedata.normalize("NFD", COMPOSED): picture(1),
            "2.jpg": picture(0),
            "captions.csv": f"image_file,caption\n{unicodedata.normalize('NFC', COMPOSED)},a photo of TOK outside\n"
            "2.jpg,a photo of TOK\n",
        },
        GOOD,
    ),
    Case(
        name="names_without_utf8_flag",
        write=_without_utf8_flag(
            "umlauts",
            {
                "größe.jpg": picture(0),
                "2.jpg": picture(1),
                "captions.csv": "image_file,caption\ngröße.jpg,a photo of TOK\n2.jpg,a photo of TOK outside\n",
            },
        ),
        captions=GOOD,
    ),
    _set(
        "colon",
        {"Screenshot 2024-01-01 10:30:00.jpg": picture(0), "Screenshot 2024-01-01 10:30:00.txt": PREFIX},
        {0: PREFIX},
    ),
    Case(
        name="tar_that_ends_with_a_zip",
        write=_tar(
            "outer.tar",
            {"1.jpg": picture(0), "2.jpg": picture(1), "captions.csv": CSV, "old.zip": _inner_zip()},
        ),
        captions=GOOD,
        says=("old.zip",),
    ),
    Case(name="tar_gz", write=_tar("set.tar.gz", {**TWO, "captions.csv": CSV}, "w:gz"), captions=GOOD),
    Case(
        name="zip_in_zip",
        write=_zip("outer", {"pictures.zip": _inner_zip()}),
        says=("pictures.zip", "unpack"),
    ),
    Case(name="cut_zip", write=_cut_zip, says=("cut.zip", "incomplete")),
    Case(name="empty_file", write=_file("empty.zip", b""), says=("empty.zip", "empty")),
    Case(
        name="web_page",
        write=_file("page.zip", "<!DOCTYPE html><html><body>Sign in</body></html>"),
        says=("page.zip", "web page"),
    ),
    Case(
        name="lfs_pointer",
        write=_file("data.zip", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        says=("data.zip", "Git LFS"),
    ),
    Case(name="picture_itself", write=_file("dog.jpg", picture(0)), says=("dog.jpg", "picture")),
    Case(
        name="rar",
        write=_file("set.rar", b"Rar!\x1a\x07\x01\x00" + b"x" * 99),
        says=("set.rar", "rar", ".zip"),
    ),
    Case(
        name="seven_zip",
        write=_file("set.zip", b"7z\xbc\xaf\x27\x1c" + b"x" * 99),
        says=("set.zip", "7z", ".zip"),
    ),
]

PICTURES = [
    _set(
        "formats",
        {
            "a.jpg": picture(0),
            "b.avif": picture(1, "AVIF"),
            "c.gif": picture(2, "GIF"),
            "d.tiff": picture(3, "TIFF"),
            "e.jfif": picture(4),
            "f.mp4": b"x",
            "g.txt": "",
        },
        dict.fromkeys(range(5), PREFIX),
        "f.mp4",
    ),
    _csv(
        "unread_picture_in_table",
        "image_file,caption\n1.jpg,TOK\n3.mp4,TOK\n",
        {},
        "3.mp4",
    ),
    _set(
        "avif_in_table",
        {"1.jpg": picture(0), "2.avif": picture(1, "AVIF"), "captions.csv": CSV.replace("2.jpg", "2.avif")},
        GOOD,
    ),
    _set(
        "psd_in_table",
        {**TWO, "3.psd": b"8BPS", "captions.csv": CSV + "3.psd,a photo of TOK\n"},
        {},
        "3.psd",
        "is not read",
    ),
    _set(
        "wrong_suffixes",
        {
            "1.png": picture(0),
            "2.jpg": picture(1, "PNG"),
            "3.jpg": picture(2, "WEBP"),
            "4.jpg": picture(3, "AVIF"),
        },
        dict.fromkeys(range(4), PREFIX),
    ),
    _set(
        "modes",
        {
            "1.png": picture(0, "PNG", mode="RGBA"),
            "2.jpg": picture(1, exif=_exif(6)),
            "3.jpg": picture(2, progressive=True),
            "4.png": picture(3, "PNG", mode="P"),
        },
        dict.fromkeys(range(4), PREFIX),
    ),
    _set(
        "animated",
        {"1.webp": _animated("WEBP"), "2.png": picture(1, "PNG")},
        dict.fromkeys(range(2), PREFIX),
        "1.webp",
        "frame",
    ),
    _set(
        "extreme_shape", {"1.jpg": picture(0), "2.jpg": picture(1, size=(4000, 40))}, {}, "2.jpg", "4000×40"
    ),
    _set("damaged_picture", {"1.jpg": picture(0), "2.jpg": picture(1)[:300]}, {}, "2.jpg"),
    _set("no_pictures", {"notes.txt": "TOK"}, {}, "no pictures"),
]

TABLES = [
    _csv("bom_crlf", CSV.replace("\n", "\r\n"), GOOD, encoding="utf-8-sig"),
    _csv("carriage_returns", CSV.replace("\n", "\r"), GOOD),
    _csv("semicolons", CSV.replace(",", ";"), GOOD),
    _csv("tabs", CSV.replace(",", "\t"), GOOD),
    _csv("tsv", CSV.replace(",", "\t"), GOOD, file="captions.tsv"),
    _csv("utf16", CSV, GOOD, encoding="utf-16"),
    _csv(
        "cp1252",
        "image_file,caption\n1.jpg,a café with TOK\n2.jpg,TOK\n",
        {},
        "captions.csv",
        "UTF-8",
        encoding="cp1252",
    ),
    _csv(
        "quotes",
        'image_file,caption\n1.jpg,"a ""big"" photo of TOK, asleep"\n2.jpg, "TOK, outside"\n',
        {0: 'a "big" photo of TOK, asleep', 1: "TOK, outside"},
    ),
    _csv(
        "line_break_in_quotes",
        'image_file,caption\n1.jpg,"a photo\nof TOK"\n2.jpg,TOK, asleep\n',
        {},
        "line 4",
        "3 cells",
    ),
    _csv(
        "commas",
        "image_file,caption\n1.jpg,a photo of TOK, asleep\n2.jpg,a photo of TOK, outside\n",
        {},
        "line 2",
        "3 cells",
        "quotes",
    ),
    _csv(
        "commas_caption_first",
        "caption,image_file\nasleep, a photo of TOK,1.jpg\noutside, a photo of TOK,2.jpg\n",
        {},
        "line 2",
        "3 cells",
    ),
    _csv("comma_in_one_row", CSV + "\n", GOOD),
    _csv(
        "comma_in_last_row",
        "image_file,caption\n1.jpg,a photo of TOK\n2.jpg,TOK, outside\n",
        {},
        "line 3",
        "3 cells",
    ),
    _csv("short_row", "image_file,caption\n1.jpg\n2.jpg,TOK\n", {}, "line 2"),
    _csv("no_header", "1.jpg,a photo of TOK\n2.jpg,TOK outside\n", {}, "image_file", "caption"),
    _csv("header_in_capitals", CSV.replace("image_file,caption", "Image_File,Caption"), GOOD),
    _csv("text_column", CSV.replace("image_file,caption", "file_name,text"), GOOD),
    _csv("metadata_csv", CSV.replace("image_file,caption", "file_name,text"), GOOD, file="metadata.csv"),
    _csv("stems", CSV.replace(".jpg", ""), GOOD),
    _csv("other_case", CSV.replace("1.jpg", "1.JPG"), GOOD),
    _csv("windows_paths", CSV.replace("1.jpg", "C:\\Users\\me\\1.jpg"), GOOD),
    _csv(
        "more_columns",
        "id,image_file,caption,notes\n1,1.jpg,a photo of TOK,x\n2,2.jpg,a photo of TOK outside,\n",
        GOOD,
    ),
    _csv(
        "same_column_twice",
        "image_file,caption,caption\n1.jpg,TOK one,TOK uno\n2.jpg,TOK two,TOK due\n",
        {},
        "caption",
        "twice",
    ),
    _csv(
        "same_column_with_space",
        "image_file,caption ,caption\n1.jpg,TOK one,TOK uno\n2.jpg,TOK two,TOK due\n",
        {},
        "caption",
        "twice",
    ),
    _csv(
        "two_caption_columns",
        "image_file,caption,text\n1.jpg,TOK one,TOK uno\n2.jpg,TOK two,TOK due\n",
        ONE_TWO,
    ),
    _csv("missing_row", "image_file,caption\n1.jpg,a photo of TOK\n", {}, "2.jpg"),
    _csv("row_twice", CSV + "1.jpg,TOK\n", {}, "line 4", "1.jpg"),
    _csv("empty_rows", CSV + ",\n,\n\n", GOOD),
    _csv("empty_cells", "image_file,caption\n1.jpg,a photo of TOK,\n2.jpg,a photo of TOK outside,,\n", GOOD),
    _csv("empty_caption", "image_file,caption\n1.jpg,\n2.jpg,TOK\n", {}, "line 2"),
    _csv("name_in_capitals", CSV, GOOD, file="CAPTIONS.CSV"),
    _csv(
        "huge_number",
        "image_file,caption,original_height,original_width,crop_top,crop_left\n"
        f"1.jpg,TOK one,{'9' * 5000},1,0,0\n2.jpg,TOK two,72,80,0,0\n",
        {},
        "original_height",
    ),
    _csv("table_of_another_name", CSV, GOOD, file="labels.csv"),
    _csv("unreadable_table", "a,b\n1,2\n", {}, "labels.csv", file="labels.csv"),
    _set(
        "table_above_pictures",
        {"train/1.jpg": picture(0), "train/2.jpg": picture(1), "captions.csv": CSV},
        GOOD,
    ),
]

BESIDE = [
    _set("txt", {**TWO, "1.txt": "TOK one", "2.txt": "TOK two"}, ONE_TWO),
    _set(
        "spaces_and_capitals",
        {
            "my set/IMG 1 (2).JPG": picture(0),
            "my set/Ünïcödé.JPEG": picture(1),
            "my set/IMG 1 (2).TXT": "TOK one",
            "my set/Ünïcödé.txt": "TOK two",
        },
        ONE_TWO,
    ),
    _set("txt_after_the_suffix", {**TWO, "1.jpg.txt": "TOK one", "2.jpg.txt": "TOK two"}, ONE_TWO),
    _set(
        "txt_in_a_folder",
        {
            "images/1.jpg": picture(0),
            "images/2.jpg": picture(1),
            "captions/1.txt": "TOK one",
            "captions/2.txt": "TOK two",
        },
        ONE_TWO,
    ),
    _set("caption_suffix", {**TWO, "1.caption": "TOK one", "2.caption": "TOK two"}, ONE_TWO),
    _set(
        "json_beside",
        {**TWO, "1.json": '{"caption": "TOK one"}', "2.json": '{"caption": "TOK two"}'},
        ONE_TWO,
    ),
    _set(
        "jsonl",
        {
            **TWO,
            "metadata.jsonl": '{"file_name": "1.jpg", "text": "TOK one"}\n{"file_name": "2.jpg", "text": "TOK two"}\n',
        },
        ONE_TWO,
    ),
    _set(
        "damaged_jsonl",
        {**TWO, "metadata.jsonl": '{"file_name": "1.jpg", "text": "TOK one"}\n{"file_na\n'},
        {},
        "metadata.jsonl",
        "line 2",
    ),
    _set("json_without_caption", {**TWO, "1.json": "{}", "2.json": "[]"}, {}, "1.json"),
    _set(
        "kohya_folder",
        {
            "10_tok dog/1.jpg": picture(0),
            "10_tok dog/1.txt": "TOK one",
            "10_tok dog/2.jpg": picture(1),
            "10_tok dog/2.txt": "TOK two",
        },
        ONE_TWO,
    ),
    _set("txt_for_some", {**TWO, "1.txt": "TOK one"}, {}, "2.jpg"),
    _set(
        "txt_cp1252", {"1.jpg": picture(0), "1.txt": "TOK in a café".encode("cp1252")}, {}, "1.txt", "UTF-8"
    ),
    _set("captions_txt_alone", {**TWO, "captions.txt": "1.jpg: TOK"}, {}, "captions.txt"),
    _set(
        "readme", {**TWO, "README.txt": "Made by me.", "license.txt": "CC0"}, dict.fromkeys(range(2), PREFIX)
    ),
    _set(
        "same_stem",
        {"1.jpg": picture(0), "1.png": picture(1, "PNG"), "1.txt": "TOK"},
        dict.fromkeys(range(2), "TOK"),
    ),
    _set(
        "two_folders",
        {"a/1.jpg": picture(0), "b/1.jpg": picture(1), "a/1.txt": "TOK one", "b/1.txt": "TOK two"},
        ONE_TWO,
    ),
]

LONG = "a very detailed photograph " * 30
TEXTS = [
    _set(
        "long_caption",
        {"1.jpg": picture(0), "1.txt": "TOK, " + LONG},
        {0: " ".join(("TOK, " + LONG).split())},
    ),
    _set(
        "punctuation",
        {"1.jpg": picture(0), "1.txt": "TOK's hat, (TOK); TOK-like TOK."},
        {0: "TOK's hat, (TOK); TOK-like TOK."},
    ),
    _set("lower_case", {"1.jpg": picture(0), "1.txt": "a photo of tok"}, {}, "1.jpg", "tok", "case"),
    _set("inside_a_word", {"1.jpg": picture(0), "1.txt": "a photo of TOKs"}, {}, "1.jpg", "TOKs"),
    _set("without_token", {"1.jpg": picture(0), "1.txt": "a photo"}, {}, "1.jpg", "TOK"),
    _set("no_captions", dict(TWO), dict.fromkeys(range(2), PREFIX)),
]

CASES = [*ARCHIVES, *PICTURES, *TABLES, *BESIDE, *TEXTS]
