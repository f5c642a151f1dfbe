"""Say what a file is that is not what it should be, such as a web page named .zip.

Looks at a file's first bytes only, whatever its name; does not know what the file was wanted for.
"""

import codecs
import re
import zipfile
from pathlib import Path

_HEAD = 1024
"""Bytes to look at."""
_ARCHIVES = {b"Rar!\x1a\x07": "rar", b"7z\xbc\xaf\x27\x1c": "7z", b"\x28\xb5\x2f\xfd": "Zstandard"}
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"8BPS")
_PICTURE_BRANDS = (b"heic", b"heix", b"heif", b"mif1", b"msf1", b"avif", b"avis")
"""Brands of HEIF and AVIF pictures. Other brands of that container are videos."""
_WEB_PAGES = (b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<!--")
_PICKLE = re.compile(rb"\x80[\x02-\x05][^\0]|\(dp?\d+\n|\(lp?\d+\n|c[a-z_.]+\n\w+\n")
"""Protocols 2 to 5, then dictionaries, lists and objects of protocol 0."""
_PICKLE_REMEDY = "is a pickle, which can run code when it is loaded: convert it to .safetensors."


def describe_other_kind(path: Path, *, wanted: str = "a .zip or .tar.gz archive") -> str | None:
    """What the file `path` is, and the remedy: the rest of a sentence that begins with the file's name.

    Call it for a file that could not be read, such as in `f"{path.name} {describe_other_kind(path)}"`. The rest begins
    with "is" and ends with a full stop. Knows empty files, web pages, Git LFS pointers, pickles, files of weights, rar,
    7z and other archives, incomplete zips, pictures, videos, PDF, JSON and text.

    wanted: what to give instead, with its article.

    Returns:
        None for a readable zip or tar, an unknown kind, and what is no readable file.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return None
    if not head:
        return "is empty: download or copy it again."
    if (
        head[257:262] == b"ustar"
    ):  # a tar begins with the name of its first file, which may look like anything
        return None
    if head.startswith(b"PK"):
        return _describe_zip(path, head)
    return _describe_binary(head, wanted) or _describe_text(head, wanted)


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file with these first bytes, at least 9, is safetensors, complete or not."""
    # The length of the header in 8 bytes, below 4 GiB, then the header in JSON.
    return head[4:9] == b"\0\0\0\0{"


def _describe_zip(path: Path, head: bytes) -> str | None:
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if name.endswith(b"data.pkl"):  # torch.save writes a zip that begins with a pickle
        return _PICKLE_REMEDY
    if head.startswith((b"PK\x03\x04", b"PK\x07\x08")) and not zipfile.is_zipfile(path):
        return "is an incomplete zip archive, whose end is missing: download or copy it again."
    return None


def _describe_binary(head: bytes, wanted: str) -> str | None:
    # The length of a safetensors header may begin like a pickle.
    if _PICKLE.match(head) and not looks_like_safetensors(head):
        return _PICKLE_REMEDY
    for start, kind in _ARCHIVES.items():
        if head.startswith(start):
            return f"is a {kind} archive, which cannot be read here: unpack it and pack the files as .zip."
    kind = _kind_of_content(head)
    return f"is a {kind}: give {wanted}." if kind else None


def _kind_of_content(head: bytes) -> str | None:
    """A noun for well-known files that hold neither text nor other files."""
    if looks_like_safetensors(head) or head.startswith(b"GGUF"):
        return "file of weights"
    if head.startswith(b"%PDF"):
        return "PDF document"
    is_bmp = head.startswith(b"BM") and head[6:10] == b"\0\0\0\0"
    is_webp = head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    has_brand = head[4:8] == b"ftyp"
    if head.startswith(_PICTURES) or is_bmp or is_webp or (has_brand and head[8:12] in _PICTURE_BRANDS):
        return "picture"
    return "video" if has_brand or head.startswith(b"\x1aE\xdf\xa3") else None


def _describe_text(head: bytes, wanted: str) -> str | None:
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.lower().startswith(_WEB_PAGES):
        return (
            "is a web page: the link needs a login or leads to a page about the file, so give the direct download link, "
            "or download the file in a browser."
        )
    if text.startswith(b"version https://git-lfs.github.com/"):
        return "is a Git LFS pointer, not the file itself: download the real file, such as with git lfs pull."
    if not _is_text(head):
        return None
    if text[:1] in (b"{", b"["):
        return f"is JSON text, such as a server's error: open it to read what it says, and give {wanted} instead."
    return f"is a text file: give {wanted}."


def _is_text(head: bytes) -> bool:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return True
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)
