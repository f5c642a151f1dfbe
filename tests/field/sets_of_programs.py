"""What programs and systems leave in archives, and how they write tables, texts and names.

In the style of `tests.field.sets`: one oddity in each archive, and its right outcome.
"""

import io
import json
import tarfile
import zipfile
from pathlib import Path

from tests.field.sets import CSV, GOOD, ONE_TWO, PREFIX, TWO, Case, _csv, _mask, _set, picture

H = "image_file,caption\n"
BOTH = dict.fromkeys(range(2), PREFIX)
NOT_READ = "not in a way that is read"


def _one(name: str, files: dict[str, bytes | str], caption: str | None, *says: str) -> Case:
    """One picture, 1.jpg, with other files; refused if it has no caption."""
    return _set(name, {"1.jpg": picture(0), **files}, {} if caption is None else {0: caption}, *says)


def _named(name: str, file: str, written: str) -> Case:
    """A picture whose name is written differently in a table."""
    return _set(name, {file: picture(0), "captions.csv": f"{H}{written},TOK one\n"}, {0: "TOK one"})


TABLES = [
    _csv("all_cells_in_quotes", '"image_file","caption"\n"1.jpg","TOK one"\n"2.jpg","TOK two"\n', ONE_TWO),
    _csv("quotes_and_semicolons", '"image_file";"caption"\n"1.jpg";"TOK one"\n"2.jpg";"TOK two"\n', ONE_TWO),
    _csv("index_of_pandas", ",image_file,caption\n0,1.jpg,TOK one\n1,2.jpg,TOK two\n", ONE_TWO),
    _csv("unnamed_index", "Unnamed: 0,image_file,caption\n0,1.jpg,TOK one\n1,2.jpg,TOK two\n", ONE_TWO),
    _csv("empty_first_lines", "\n,,\nimage_file,caption\n1.jpg,TOK one\n2.jpg,TOK two\n", ONE_TWO),
    _csv("double_mark", "\ufeff\ufeff" + H + "1.jpg,TOK one\n2.jpg,TOK two\n", ONE_TWO),
    _csv("invisible_in_header", "image_file,caption\u200b\n1.jpg,TOK one\n2.jpg,TOK two\n", ONE_TWO),
    _csv("invisible_in_caption", H + "1.jpg,\u200bTOK\u200b one\u200e\n2.jpg,TOK\u00a0two\x07\n", ONE_TWO),
    _csv("only_invisible", H + "1.jpg,\u200b\n2.jpg,TOK two\n", {}, "line 2", "no caption"),
    _csv("lines_in_quotes", H + '"1.jpg","TOK\r\none"\r\n"2.jpg","TOK two"\r\n', ONE_TWO),
    _csv("curly_quotes", H + "1.jpg,“TOK one, asleep”\n2.jpg,TOK\n", {}, "line 2", "straight quotes"),
    _csv("german_header", "Bild;Text\n1.jpg;TOK one\n2.jpg;TOK two\n", {}, "image_file", "bild;text"),
    _csv("utf32", CSV, {}, "captions.csv", "UTF-8", encoding="utf-32"),
    _csv("addresses", H + "https://x.org/a/1.jpg?v=a/2.jpg,TOK one\nfile:///C:/x/2.jpg,TOK two\n", ONE_TWO),
    _csv("placeholder", H + "1.jpg,TOK <s0>\n2.jpg,TOK\n", {}, "1.jpg", "<s0>", "placeholder"),
    _csv("two_spellings_of_a_name", CSV + "1.JPG,TOK\n", {}, "two rows for 1.jpg"),
    _set(
        "zeros_that_a_spreadsheet_drops",
        {"001.jpg": picture(0), "captions.csv": H + "1,TOK one\n"},
        {},
        "names 1",
    ),
    _set(
        "numbers_as_names",
        {"1.jpg": picture(0), "01.jpg": picture(1), "captions.csv": H + "01,TOK two\n1,TOK one\n"},
        ONE_TWO,
    ),
    _set("spreadsheet", {**TWO, "captions.xlsx": b"PK\3\4"}, {}, "captions.xlsx", NOT_READ),
    _set("spreadsheet_and_csv", {**TWO, "captions.xlsx": b"PK\3\4", "captions.csv": CSV}, GOOD, "captions.xlsx"),
    _set("lock_of_a_spreadsheet", {**TWO, "~$captions.xlsx": b"x", ".~lock.captions.csv#": b"x"}, BOTH),
    _set("copy_of_a_table", {**TWO, "captions.csv": CSV, "captions (1).csv": CSV}, {}, "captions (1).csv", "keep one"),
]  # fmt: skip

JSON = [
    _one("line_separator", {"metadata.jsonl": '{"file_name":"1.jpg","text":"TOK\u2028one"}\n'}, "TOK one"),
    _one("no_text", {"metadata.jsonl": '{"file_name":"1.jpg","text":null}'}, None, "line 1"),
    _one("same_key_twice", {"captions.json": '{"1.jpg":"TOK one","1.jpg":"TOK uno"}'}, None, "1.jpg twice"),
    _one("json_of_another_name", {"labels.json": '{"1.jpg":"TOK one"}'}, "TOK one"),
    _one("half_a_pair", {"metadata.jsonl": '{"file_name":"1.jpg","text":"TOK \\ud83d one"}'}, "TOK one"),
    _set("numbered_settings", {**TWO, "1.txt": "TOK one", "2.txt": "TOK two", "p.json": '{"1":{"text":"x"}}'}, ONE_TWO),
    _set("part_of_the_captions", {**TWO, "labels.json": '{"1.jpg":"TOK one"}'}, {}, "labels.json", NOT_READ),
    _set("true_is_no_caption", {**TWO, "labels.json": '{"1.jpg":true,"2.jpg":true}'}, BOTH, "ignored labels.json"),
    _one("settings", {"config.json": '{"caption":"TOK"}', "1.txt": "TOK one"}, "TOK one", "ignored config.json"),
    _one(
        "coco",
        {"captions.json": '{"images":[{"id":1,"file_name":"1.jpg"}],"annotations":[{"image_id":1,"caption":"TOK"}]}'},
        None, "captions.json", NOT_READ,
    ),
    _one("metadata_of_a_model", {"metadata.json": '{"trainedWords":["TOK"]}', "1.txt": "TOK one"}, "TOK one"),
    _one(
        "takeout",
        {"1.jpg.supplemental-metadata.json": '{"title":"1.jpg","description":"x"}', "1.txt": "TOK one"},
        "TOK one", "ignored 1.jpg.supplemental-metadata.json",
    ),
    _one("takeout_alone", {"1.jpg.json": '{"title":"1.jpg"}'}, None, "1.jpg.json", NOT_READ),
    _one("takeout_album", {"metadata.json": '{"title":"x","description":""}', "1.txt": "TOK one"}, "TOK one"),
    _one("kinds_of_captions", {"1.json": json.dumps({"caption": "TOK one", "caption_short": "x"})}, "TOK one"),
]  # fmt: skip

TEXTS = [
    _one("lines", {"1.txt": "TOK one\r\nasleep\r\n"}, "TOK one asleep", "lines of 1.txt are joined"),
    _one("rich_text", {"1.txt": "{\\rtf1\\ansi TOK one}"}, None, "1.txt", "plain text"),
    _one("rich_text_file", {"1.rtf": "{\\rtf1\\ansi TOK one}"}, None, "1.rtf", NOT_READ),
    _one("other_suffix", {"1.text": "TOK one"}, None, "1.text", NOT_READ),
    _one("zero_in_text", {"1.txt": b"TOK\0one"}, None, "1.txt", "UTF-8"),
    _one("invisible_text", {"1.txt": "\u200b \ufeff"}, None, "1.txt", "empty"),
    _one("hebrew", {"1.txt": "תמונה של TOK\u200f"}, "תמונה של TOK"),
    _one("emoji", {"1.txt": "TOK 👨\u200d👩\u200d👧"}, "TOK 👨\u200d👩\u200d👧"),
    _one("tags", {"1.txt": "TOK, long_hair, \\(series\\),"}, "TOK, long_hair, \\(series\\),"),
    _one("square_brackets", {"1.txt": "[TOK] one"}, "[TOK] one"),
    _one("wide_letters", {"1.txt": "ＴＯＫ one"}, None, "in exactly this spelling"),
    _one("without_spaces", {"1.txt": "一张TOK的照片"}, None, "separate word"),
    _one("underscore_after_token", {"1.txt": "TOK_ one"}, None, "TOK_", "separate word"),
    _one("table_named_txt", {"captions.txt": CSV}, None, "captions.txt", NOT_READ),
    _one("copy_of_a_text", {"1.txt": "TOK one", "1 (1).txt": "TOK uno"}, "TOK one", "ignored 1 (1).txt"),
    _set("boxes_as_texts", {"images/1.jpg": picture(0), "labels/1.txt": "0 0.5 0.5"}, {}, "0 0.5 0.5"),
    _set("regularisation", {"img/1.jpg": picture(0), "img/1.txt": "TOK", "reg/2.jpg": picture(1), "reg/2.txt": "dog"}, {}, "reg/2.jpg"),
    _set("roboflow", {**TWO, "README.dataset.txt": "x", "README.roboflow.txt": "x"}, BOTH, "ignored README.dataset.txt"),
]  # fmt: skip

NAMES = [
    _named("narrow_space", "Screenshot 10.30\u202fPM.jpg", "Screenshot 10.30 PM.jpg"),
    _named("two_spaces", "a  b.jpg", "a b.jpg"),
    _named("mark_of_direction", "\u200fכלב.jpg", "כלב.jpg"),
    _named("invisible_in_name", "1.jpg", "\u200b1.jpg\ufeff"),
    _named("apostrophe", "Bob’s dog.jpg", "Bob's dog.jpg"),
    _named("percent_signs", "my größe.jpg", "my%20gr%C3%B6%C3%9Fe.jpg"),
    _named("wide_digits", "１.jpg", "1.jpg"),
    _named("dots", "v1.2 final.jpg", "v1.2 final"),
    _named("path_of_another_system", "1.jpg", "..\\data\\1.jpg"),
    _set(
        "exact_name_first",
        {"a’b.jpg": picture(0), "a'b.jpg": picture(1), "a’b.txt": "TOK one", "a'b.txt": "TOK two"},
        ONE_TWO,
    ),
    _one("space_at_the_end", {"1 .txt": "TOK one"}, "TOK one"),
    _set("digits_of_other_kinds", {"dog①.jpg": picture(0), "dog².jpg": picture(1), "dog٣.jpg": picture(2)}, dict.fromkeys(range(3), PREFIX)),
    _set("case_alone", {"A.JPG": picture(0), "a.jpg": picture(1), "A.txt": "TOK one", "a.txt": "TOK two"}, ONE_TWO),
    _set("suffix_alone", {"1.jpg": picture(0), "1.png": picture(1, "PNG"), "captions.csv": H + "1,TOK\n"}, {}, "several of that name"),
    _set("texts_by_suffix", {"1.jpg": picture(0), "1.png": picture(1, "PNG"), "1.jpg.txt": "TOK one", "1.png.txt": "TOK two"}, ONE_TWO),
    _set("whatsapp", {"WhatsApp Image at 10.30.00 (1).jpeg": picture(0), "WhatsApp Image at 10.30.00 (1).txt": "TOK one"}, {0: "TOK one"}),
]  # fmt: skip


def _preview() -> bytes:
    """A raw file of a camera begins like a TIFF with a tiny preview."""
    return picture(3, "TIFF", size=(16, 12))


LITTER = [
    _set("synology", {**TWO, "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg": picture(3), "#recycle/3.jpg": picture(3)}, BOTH),
    _set("deleted", {**TWO, "$RECYCLE.BIN/x.jpg": picture(3), "System Volume Information/x": b"x"}, BOTH),
    _set("notebook", {**TWO, ".ipynb_checkpoints/1-checkpoint.jpg": picture(3)}, BOTH),
    _set("windows", {**TWO, "thumbs.db": b"x", "Desktop.ini": b"x", "Icon\r": b""}, BOTH),
    _set("raw_beside_jpg", {**TWO, "1.dng": _preview(), "2.NEF": _preview()}, BOTH, "1.dng", "2.nef"),
    _set("raw_in_table", {**TWO, "3.dng": _preview(), "captions.csv": CSV + "3.dng,TOK\n"}, {}, "3.dng", "not read"),
    _set("live_photo", {**TWO, "1.mov": b"\0\0\0\x14ftypqt  ", "1.xmp": "<x/>", "1.AAE": "x"}, BOTH, "1.mov"),
    _set("caches", {**TWO, "1.npz": b"x", "_latent_cache/1.safetensors": b"x"}, BOTH, "1.npz"),
    _set("shortcuts", {**TWO, "1.url": "x", "2.lnk": b"L\0\0\0"}, BOTH, "1.url"),
]  # fmt: skip


MASKS = [
    _set(
        "folders_of_masks",
        {f"{kind}/{folder}/1.{suffix}": content
         for folder, index in (("a", 0), ("b", 1))
         for kind, suffix, content in (("images", "jpg", picture(index)), ("masks", "png", _mask()))},
        BOTH, "2 of 2",
    ),
    _set(
        "one_mask_for_two_folders",
        {"a/1.jpg": picture(0), "b/1.jpg": picture(1), "masks/1.png": _mask()},
        {}, "masks/1.png",
    ),
    _set("set_in_a_folder_of_that_name", {"mask/1.jpg": picture(0), "mask/1.mask.png": _mask()}, {0: PREFIX}, "1 of 1"),
    _set("two_masks", {"1.jpg": picture(0), "1.mask.png": _mask(), "1.mask.jpg": _mask()}, {}, "several masks"),
]  # fmt: skip


def _with_links(folder: Path) -> Path:
    """A tar with a symbolic and a hard link, as of a folder of a hub's cache."""
    path = folder / "links.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("1.jpg", tarfile.REGTYPE),
            ("2.jpg", tarfile.SYMTYPE),
            ("3.jpg", tarfile.LNKTYPE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "1.jpg"
            entry.size = len(picture(0)) if kind == tarfile.REGTYPE else 0
            archive.addfile(entry, io.BytesIO(picture(0)))
    return path


def _linked_zip(folder: Path) -> Path:
    path = folder / "links.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.jpg", picture(0))
        entry = zipfile.ZipInfo("2.jpg")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "1.jpg")
    return path


LINKS = [
    Case(name="links_in_tar", write=_with_links, captions={0: PREFIX}, says=("links.tar holds links (2)",)),
    Case(name="links_in_zip", write=_linked_zip, captions={0: PREFIX}, says=("links.zip holds links (1)",)),
]

CASES = [*LINKS, *TABLES, *JSON, *TEXTS, *NAMES, *LITTER, *MASKS]
"""Archives as programs and systems leave them: used as meant, or refused in one sentence."""
