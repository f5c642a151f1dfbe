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


def _encrypted(folder: Path) -> Path:
    """A zip whose members have the flag of encryption."""
    path = _zip("locked", TWO)(folder)
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.find(signature)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(signature, at + 4)
    path.write_bytes(data)
    return path


def _behind_other_content(folder: Path) -> Path:
    """A zip behind a program, as in archives that unpack themselves."""
    path = _zip("set", {**TWO, "captions.csv": CSV})(folder)
    path.write_bytes(b"MZ" + b"\0" * 600 + path.read_bytes())
    return path


def _latin_tar(folder: Path) -> Path:
    """A tar with a name in Latin-1."""
    path = folder / "set.tar"
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        entry = tarfile.TarInfo("größe.jpg")
        entry.size = len(picture(0))
        archive.addfile(entry, io.BytesIO(picture(0)))
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


def _mask() -> bytes:
    """A mask of a picture of 80×72: its left half is white."""
    mask = Image.new("L", (80, 72))
    mask.paste(255, (0, 0, 40, 72))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
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
    Case(
        name="encrypted",
        write=_encrypted,
        says=("locked.zip", "password"),
    ),
    Case(name="exe_with_zip", write=_behind_other_content, captions=GOOD),
    Case(
        name="name_twice",
        write=_tar("set.tar", {**TWO, "captions.csv": CSV.replace("TOK", "NOT"), "./captions.csv": CSV}),
        captions=GOOD,
        says=("captions.csv more than once",),
    ),
    Case(name="latin_name_in_tar", write=_latin_tar, captions={0: PREFIX}),
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
    _csv("excel_names_the_delimiter", "sep=;\n" + CSV.replace(",", ";"), GOOD),
    _csv("unclosed_quotes", 'image_file,caption\n1.jpg,"TOK one\n2.jpg,TOK two\n', {}, "line 2", "quotes"),
    _csv(
        "quotes_inside_quotes", 'image_file,caption\n1.jpg,"a "big" TOK"\n2.jpg,TOK\n', {}, "line 2", "quotes"
    ),
    _csv("inches", 'image_file,caption\n1.jpg,a 5" TOK\n2.jpg,TOK\n', {0: 'a 5" TOK', 1: "TOK"}),
    _csv("empty_columns", CSV.replace("caption\n", "caption,,\n"), GOOD),
    _csv("converted_pictures", CSV.replace(".jpg", ".png"), GOOD),
    _csv("without_rows", "image_file,caption\n", {}, "no row for 1.jpg"),
    _csv("empty_table", "", {}, "captions.csv", "empty"),
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

BESIDE += [
    _set(
        "txt_and_caption_agree",
        {"1.jpg": picture(0), "1.txt": "TOK one", "1.caption": "TOK one"},
        {0: "TOK one"},
    ),
    _set(
        "txt_and_caption_differ",
        {"1.jpg": picture(0), "1.txt": "TOK one", "1.caption": "TOK uno"},
        {},
        "1.jpg",
        "1.txt",
        "1.caption",
    ),
    _set("captions_in_another_case", {**TWO, "1.TXT": "TOK one", "2.Txt": "TOK two"}, ONE_TWO),
    _set(
        "decomposed_txt",
        {
            unicodedata.normalize("NFC", COMPOSED): picture(0),
            unicodedata.normalize("NFD", "café.txt"): "TOK one",
        },
        {0: "TOK one"},
    ),
    _set("txt_utf16", {"1.jpg": picture(0), "1.txt": "TOK in a café".encode("utf-16")}, {0: "TOK in a café"}),
    _set(
        "ambiguous_captions_folder",
        {
            "a/1.jpg": picture(0),
            "b/1.jpg": picture(1),
            "captions/1.txt": "TOK one",
        },
        {},
        "captions/1.txt",
    ),
    _set(
        "settings_beside_pictures",
        {**TWO, "config.json": "{}", "dataset.toml": "x", "1.txt": "TOK one", "2.txt": "TOK two"},
        ONE_TWO,
    ),
    _set(
        "json_table",
        {
            **TWO,
            "metadata.json": '[{"file_name": "1.jpg", "text": "TOK one"}, {"file_name": "2.jpg", "text": "TOK two"}]',
        },
        ONE_TWO,
    ),
    _set(
        "kohya_metadata",
        {
            **TWO,
            "meta_cap.json": '{"/home/me/set/1": {"caption": "TOK one"}, "/home/me/set/2.jpg": {"caption": "TOK two"}}',
        },
        ONE_TWO,
    ),
    _set(
        "jsonl_in_each_folder",
        {
            "a/1.jpg": picture(0),
            "b/1.jpg": picture(1),
            "a/metadata.jsonl": '{"file_name": "1.jpg", "text": "TOK one"}\n',
            "b/metadata.jsonl": '{"file_name": "1.jpg", "text": "TOK two"}\n\n',
        },
        ONE_TWO,
    ),
    _set(
        "two_tables",
        {**TWO, "captions.csv": CSV, "metadata.csv": CSV},
        {},
        "captions.csv",
        "metadata.csv",
    ),
    _set(
        "table_and_txt",
        {**TWO, "captions.csv": CSV, "1.txt": "TOK uno", "2.txt": "TOK due"},
        GOOD,
        "ignored 1.txt, 2.txt",
    ),
    _set(
        "no_suffix",
        {"IMG_1": picture(0), "IMG_2.jpg_large": picture(1), "IMG_1.txt": "TOK one", "IMG_2.txt": "TOK two"},
        ONE_TWO,
    ),
    _set(
        "masks_folder",
        {**TWO, "masks/1.png": _mask(), "masks/2.png": _mask()},
        dict.fromkeys(range(2), PREFIX),
        "2 of 2",
    ),
    _set(
        "mask_endings",
        {**TWO, "1_mask.png": _mask(), "2-masklabel.png": _mask()},
        dict.fromkeys(range(2), PREFIX),
        "2 of 2",
    ),
    _set(
        "pictures_of_masks",
        {"masks/1.jpg": picture(0), "masks/gas_mask.jpg": picture(1)},
        dict.fromkeys(range(2), PREFIX),
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
    _set("angle_brackets", {"1.jpg": picture(0), "1.txt": "a photo of <TOK>"}, {0: "a photo of <TOK>"}),
    _set("inside_a_word", {"1.jpg": picture(0), "1.txt": "a photo of TOKs"}, {}, "1.jpg", "TOKs"),
    _set("without_token", {"1.jpg": picture(0), "1.txt": "a photo"}, {}, "1.jpg", "TOK"),
    _set("no_captions", dict(TWO), dict.fromkeys(range(2), PREFIX)),
]

CASES = [*ARCHIVES, *PICTURES, *TABLES, *BESIDE, *TEXTS]
