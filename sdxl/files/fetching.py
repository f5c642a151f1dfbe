"""Turn a user's source, which may be a path, a `data:` URI or a URL, into a local file.

Does not know the Hugging Face hub; see `files.hub`.
"""

import base64
import contextlib
import logging
import string
import threading
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import requests

from sdxl import settings
from sdxl.errors import DownloadError, UserInputError, shortened
from sdxl.files.addresses import session
from sdxl.files.archives import atomic_path
from sdxl.files.waiting import wait_for

log = logging.getLogger(__name__)

MAX_BYTES = 16 << 30
TIMEOUT_S = (10, 60)
"""Seconds to wait for the connection, and for each chunk."""

_LONGEST_NAME = 200
"""Bytes of a downloaded file's name."""
_BASE64 = (string.ascii_letters + string.digits + "+/").encode()
_SUFFIXES = {
    "application/zip": ".zip",
    "application/x-zip-compressed": ".zip",
    "application/x-tar": ".tar",
    "application/gzip": ".tar.gz",
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "image/bmp": ".bmp",
    "image/heic": ".heic",
    "text/plain": ".txt",
    "text/html": ".html",
    "application/json": ".json",
}
"""Media type of a `data:` URI → the suffix of its file."""


def is_remote(source: str) -> bool:
    """Whether `source` is a URL or `data:` URI rather than a path."""
    return source[:8].lower().startswith(("http://", "https://", "data:"))


def is_data_uri(source: str) -> bool:
    """Whether `source` holds its content itself."""
    return source[:5].lower() == "data:"


def name_of(url: str) -> str:
    """A file name for the content of `url`: the last part of its path, without what no file name should hold.

    It is "download" if nothing remains. Other claims about the name, such as the server's, are ignored.
    """
    with contextlib.suppress(ValueError):  # not a URL: the download raises a clear error
        path = urllib.parse.unquote(urllib.parse.urlsplit(url).path).replace("\\", "/")
        name = "".join(character for character in path.rpartition("/")[2] if character.isprintable())
        # The end counts: it tells the kind. File systems take 255 bytes, and a partial file's name is longer.
        name = name.encode(errors="ignore")[-_LONGEST_NAME:].decode(errors="ignore").strip().lstrip(".")
        return name or "download"
    return "download"


def shown(source: str) -> str:
    """`source` as messages and records show it: a URL without its query and its login, which may be secrets.

    Raises:
        ValueError: it begins like a URL but is none.
    """
    if is_data_uri(source):
        return "The data: URI"
    if not is_remote(source):
        return shortened(source)
    parts = urllib.parse.urlsplit(source)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def fetch(source: str, folder: Path, *, max_bytes: int = MAX_BYTES) -> Path:
    """Return a local file for `source`: the path itself, or the content of a `data:` URI or http(s) URL in `folder`.

    Raises:
        DownloadError: the URI is malformed, or the URL cannot be fetched or is larger than `max_bytes`.
        UserInputError: the path does not exist.
    """
    if is_data_uri(source):
        return decode_data_uri(source, folder)
    if is_remote(source):
        fetched = download(source, folder, max_bytes=max_bytes)
        assert fetched is not None
        return fetched.path
    path = existing(source)
    if path is None:
        raise UserInputError(
            f"{shortened(source)} does not exist: give an existing file, a data: URI or an http(s) URL."
        )
    return path


def existing(source: str) -> Path | None:
    """`source` as a path, or None if nothing exists there."""
    try:
        return Path(source) if Path(source).exists() else None
    except (
        OSError,
        ValueError,
    ):  # too long for a file name, or with characters that no file name may contain
        return None


def decode_data_uri(uri: str, folder: Path) -> Path:
    """Save the content of a `data:` URI (RFC 2397) as a file in `folder`, named after its media type.

    Base64 may be wrapped, percent-encoded, without padding and in the alphabet for URLs (RFC 4648).

    Raises:
        DownloadError: the URI is malformed.
    """
    header, comma, body = uri.partition(",")
    kind, *parameters = (part.strip().lower() for part in header[len("data:") :].split(";"))
    try:
        if not comma:
            raise ValueError("it has no comma before its content")
        content = urllib.parse.unquote_to_bytes(body)
        if "base64" in parameters:
            content = _decode_base64(content)
    except ValueError as error:
        raise DownloadError(
            f"The data: URI cannot be decoded ({error}): send data:<type>;base64,<content>."
        ) from error
    target = folder / f"data-uri{_SUFFIXES.get(kind, '.bin')}"
    with atomic_path(target) as partial:
        partial.write_bytes(content)
    return target


def _decode_base64(text: bytes) -> bytes:
    """Decode base64 as people send it.

    Raises:
        ValueError: it is cut off, or has characters that base64 does not have.
    """
    digits = text.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n\f\v").rstrip(b"=")
    if digits.translate(None, _BASE64):
        raise ValueError("its content is not base64")
    if len(digits) % 4 == 1:
        raise ValueError("its base64 is cut off")
    return base64.b64decode(digits + b"=" * (-len(digits) % 4))


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A downloaded file."""

    path: Path
    validators: dict[str, str]
    """Request headers that make the next download conditional on a change; empty if the server offers none."""


def download(
    url: str, folder: Path, *, max_bytes: int = MAX_BYTES, validators: Mapping[str, str] | None = None
) -> Fetched | None:
    """Save the content of `url` in `folder`, as `name_of(url)`.

    validators: those of an earlier download. With them, return None if the server says that nothing changed or cannot
    be reached; the caller then uses its earlier file.

    Raises:
        DownloadError: the URL cannot be fetched or is not allowed, its content is larger than `max_bytes`, or it takes
            too long.
    """
    try:
        name = shown(url)
    except ValueError as error:
        raise DownloadError(f"{shortened(url)} is not a URL ({error}): check the address.") from error

    target = folder / name_of(url)
    earlier = dict(validators or {})
    try:
        with session(public_only=settings.public_urls_only()) as opened:
            fetched = wait_for(
                lambda abandoned: _receive(opened, url, target, max_bytes, earlier, abandoned),
                seconds=settings.download_seconds(),
                what=f"The download of {name}",
            )
    except _TooLargeError:
        raise DownloadError(
            f"{name} is larger than {max_bytes / 2**30:.1f} GiB: give a smaller file."
        ) from None
    except requests.RequestException as error:
        if validators is not None and isinstance(error, requests.ConnectionError | requests.Timeout):
            log.warning("%s cannot be reached; using the earlier download", name)
            return None
        reason = f"HTTP {error.response.status_code}" if error.response is not None else type(error).__name__
        raise DownloadError(
            f"{name} could not be fetched ({reason}): check the address and that it is public."
        ) from error
    except UserInputError:
        raise
    except ValueError as error:  # errors of urllib3 and of the standard library that requests does not wrap
        raise DownloadError(
            f"{name} is not a URL, or leads to something that is none: check the address."
        ) from error
    if fetched is not None:
        log.info("Fetched %s (%.1f MB)", name, fetched.path.stat().st_size / 1e6)
    return fetched


class _TooLargeError(Exception):
    """More bytes came than are allowed."""


def _receive(
    opened: requests.Session,
    url: str,
    target: Path,
    max_bytes: int,
    validators: dict[str, str],
    abandoned: threading.Event,
) -> Fetched | None:
    """Request `url` and write the answer's body to `target`. None if it has not changed since `validators`."""
    received = 0
    with opened.get(url, stream=True, timeout=TIMEOUT_S, headers=validators) as response:
        response.raise_for_status()
        if validators and response.status_code == requests.codes.not_modified:
            return None
        with atomic_path(target) as partial, partial.open("wb") as sink:
            for chunk in response.iter_content(1 << 20):
                received += len(chunk)
                if received > max_bytes:
                    raise _TooLargeError
                if abandoned.is_set():
                    raise requests.RequestException
                sink.write(chunk)
        pairs = {"If-None-Match": "ETag", "If-Modified-Since": "Last-Modified"}
        return Fetched(
            path=target,
            validators={
                request: response.headers[answer]
                for request, answer in pairs.items()
                if answer in response.headers
            },
        )
