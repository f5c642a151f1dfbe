"""Turn what a user hands over — a path, a `data:` URI or a URL — into a local file.

Models of the hub are not fetched here: see `files.hub`.
"""

import base64
import binascii
import logging
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import requests
from urllib3.exceptions import LocationParseError

from sdxl.errors import DownloadError, UserInputError
from sdxl.files.archives import atomic_path

log = logging.getLogger(__name__)

MAX_BYTES = 16 << 30
TIMEOUT_S = (10, 60)
"""Seconds to connect, and to wait between two chunks."""


def is_remote(source: str) -> bool:
    """Whether `source` must be fetched before it is a file."""
    return source.startswith(("http://", "https://", "data:"))


def fetch(source: str, folder: Path, *, max_bytes: int = MAX_BYTES) -> Path:
    """Return a local file for `source`: an existing path as it is, a `data:` URI or http(s) URL saved in `folder`.

    Raises:
        DownloadError: the URL or URI cannot be fetched, or is larger than `max_bytes`.
        UserInputError: no such file.
    """
    if source.startswith("data:"):
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
    """The path `source`, if there is anything."""
    try:
        return Path(source) if Path(source).exists() else None
    except (OSError, ValueError):  # longer than a name may be, or of characters that no name has
        return None


def shortened(source: str) -> str:
    """A source as messages show it: what was pasted by mistake may be megabytes."""
    return source if len(source) <= 300 else f"{source[:60]}…"


def decode_data_uri(uri: str, folder: Path) -> Path:
    """The content of a base64 `data:` URI, as a file in `folder`.

    Raises:
        DownloadError: malformed.
    """
    header, comma, body = uri.partition(",")
    try:
        if not comma or not header.endswith(";base64"):
            raise ValueError("only base64 is read")
        content = base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        raise DownloadError(
            f"The data: URI cannot be decoded ({error}): send data:<type>;base64,<content>."
        ) from error
    target = folder / "file.bin"
    with atomic_path(target) as partial:
        partial.write_bytes(content)
    return target


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A downloaded file."""

    path: Path
    validators: dict[str, str]
    """Headers that ask the server, next time, only for what has changed since; empty if it offers none."""


def download(
    url: str, folder: Path, *, max_bytes: int = MAX_BYTES, known: Mapping[str, str] | None = None
) -> Fetched | None:
    """Save what is at `url` in `folder`; None where it was fetched before, with the validators `known`, and the server says
    that it is the same or cannot be reached.

    Raises:
        DownloadError: it cannot be fetched, or is larger than `max_bytes`.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"  # without query and login, which can be secrets
    except ValueError as error:
        raise DownloadError(f"{shortened(url)} is no URL ({error}): check the address.") from error
    target = folder / "download.bin"
    received = 0
    try:
        with requests.get(url, stream=True, timeout=TIMEOUT_S, headers=dict(known or {})) as response:
            response.raise_for_status()
            if known is not None and response.status_code == requests.codes.not_modified:
                return None
            with atomic_path(target) as partial, partial.open("wb") as sink:
                for chunk in response.iter_content(1 << 20):
                    received += len(chunk)
                    if received > max_bytes:
                        raise DownloadError(
                            f"{shown} is larger than {max_bytes / 2**30:.1f} GiB: give a smaller file."
                        )
                    sink.write(chunk)
            offered = {"If-None-Match": "ETag", "If-Modified-Since": "Last-Modified"}
            validators = {
                ask: response.headers[has] for ask, has in offered.items() if has in response.headers
            }
    except requests.RequestException as error:
        if known is not None and isinstance(error, requests.ConnectionError | requests.Timeout):
            log.warning("%s cannot be reached: what was fetched before is used", shown)
            return None
        reason = f"HTTP {error.response.status_code}" if error.response is not None else type(error).__name__
        raise DownloadError(
            f"{shown} could not be fetched ({reason}): check the address and that it is public."
        ) from error
    except LocationParseError as error:  # which requests lets through
        raise DownloadError(f"{shown} is no URL ({error}): check the address.") from error
    log.info("Fetched %s (%.1f MB)", shown, received / 1e6)
    return Fetched(path=target, validators=validators)
