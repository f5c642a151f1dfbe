"""Put a result where its owner asked for it: at a URL that takes a PUT, whole or in parts.

Such URLs are signed: whoever knows one may write there for a while. So they are secrets, and messages show them without
their query. Knows HTTP and files; does not know what is in the file.
"""

import json
import logging
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape

import requests
from tqdm import tqdm

from sdxl import settings
from sdxl.errors import UploadError, shortened
from sdxl.files.addresses import session
from sdxl.files.fetching import TIMEOUT_S
from sdxl.files.waiting import wait_for

log = logging.getLogger(__name__)

ATTEMPTS = 4
"""How often a request is sent before the upload fails."""
PAUSE_S = 1.0
"""Seconds before the second attempt. Each later pause is twice as long."""
MOST_PARTS = 10_000
"""S3's limit."""
_DONE = (200, 201, 204)
_RESUMABLE = "upload_id"
"""A name in the query of Google Cloud Storage's resumable sessions."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a file goes."""

    url: str
    """Takes the file, or with `parts` the request that puts them together."""
    parts: tuple[str, ...] = ()
    """Each takes one part, in their order."""

    @property
    def address(self) -> str:
        """Where the file is afterwards, without what signs the request."""
        parts = urllib.parse.urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def parse_target(text: str, name: str) -> Target:
    """The target in the value of the input `name`: a URL, or JSON with the URLs of an upload in parts.

    That is `{"parts": ["https://…", …], "complete": "https://…"}`: signed URLs of S3's UploadPart in their order, and one of
    CompleteMultipartUpload. S3 takes 5 GB in one piece at most.

    Raises:
        UploadError: it is neither.
    """
    wanted = f"{name} must be an http(s) URL that takes a PUT, or JSON with the URLs parts and complete"
    target = Target(url=text.strip())
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
            target = Target(url=given["complete"], parts=tuple(given["parts"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UploadError(f"{wanted}: {shortened(text)} is not such JSON.") from error
        if not 1 <= len(target.parts) <= MOST_PARTS:
            raise UploadError(f"{wanted}: there must be 1 to {MOST_PARTS} parts.")
    for url in (target.url, *target.parts):
        if not _is_http(url):
            raise UploadError(f"{wanted}: {shortened(str(url))} is no such URL.")
    return target


def upload_file(path: Path, target: Target) -> None:
    """Send `path` to `target`. A request that fails is sent again; parts and resumable sessions go on where they were.

    Raises:
        UploadError: the server refuses, or cannot be reached.
    """
    with (
        session(public_only=settings.public_urls_only()) as opened,
        tqdm(
            total=path.stat().st_size,
            desc=f"Uploading {path.name}",
            unit="B",
            unit_scale=True,
            mininterval=1.0,
        ) as progress,
    ):

        def work(stop: threading.Event) -> None:
            sender = _Sender(opened=opened, path=path, address=target.address, progress=progress, stop=stop)
            sender.in_parts(target) if target.parts else sender.whole(target.url)

        wait_for(work, seconds=float("inf"), what="The upload")
    log.info("Uploaded %s to %s", path.name, target.address)


def _is_http(url: object) -> bool:
    try:
        parts = urllib.parse.urlsplit(url if isinstance(url, str) else "")
        return parts.scheme.lower() in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no port, no host
        return False


class _Slice:
    """A part of a file as the body of a request. It shows how far it was read, and ends when nobody waits any longer."""

    def __init__(self, path: Path, start: int, size: int, progress: tqdm, stop: threading.Event) -> None:
        self._file = path.open("rb")
        self._file.seek(start)
        self._left, self._size = size, size
        self._progress, self._stop = progress, stop
        progress.n = start

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:  # by this requests knows that a body is to be read
        while block := self.read():
            yield block

    def read(self, most: int = 1 << 20) -> bytes:
        """The next bytes, at most `most`; none at the end."""
        if self._stop.is_set():
            raise requests.ConnectionError("nobody waits for this upload any longer")
        block = self._file.read(min(most, self._left))
        self._left -= len(block)
        self._progress.update(len(block))
        return block

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True, kw_only=True)
class _Sender:
    opened: requests.Session
    path: Path
    address: str
    progress: tqdm
    stop: threading.Event

    def whole(self, url: str) -> None:
        """Send the file in one request. A resumable session goes on after what has arrived."""
        size = self.path.stat().st_size
        resumable = _RESUMABLE in urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)

        def send(attempt: int) -> requests.Response:
            begin = 0
            if attempt and resumable:
                told = self._asked_how_far(url, size)
                if told.status_code in _DONE:
                    return told  # all has arrived, only the answer was lost
                last = told.headers.get("Range", "").rpartition("-")[2]
                begin = min(int(last) + 1, size - 1) if last.isdecimal() else 0
            headers = {"Content-Range": f"bytes {begin}-{size - 1}/{size}"} if begin else {}
            return self._put(url, begin, size - begin, headers)

        self._attempts(send)

    def in_parts(self, target: Target) -> None:
        """Send each part, then ask for the whole."""
        size = self.path.stat().st_size
        length, tags = -(-size // len(target.parts)), []
        for number, url in enumerate(target.parts):
            start = min(number * length, size)
            put = partial(self._put, url, start, min(length, size - start), {})
            tags.append(self._attempts(lambda attempt, put=put: put()).headers.get("ETag", ""))
        listed = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(tag)}</ETag></Part>"
            for number, tag in enumerate(tags, 1)
        )
        whole = f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()
        ask = partial(self.opened.post, target.url, data=whole, timeout=(10, 600), allow_redirects=False)
        answer = self._attempts(lambda attempt: ask(headers={"Content-Type": "application/xml"}))
        if "<Error>" in answer.text[:10_000]:  # S3 may tell of an error after a status of 200
            raise UploadError(f"The server of {self.address} could not put the parts together: upload again.")

    def _put(self, url: str, start: int, size: int, headers: dict[str, str]) -> requests.Response:
        with closing(_Slice(self.path, start, size, self.progress, self.stop)) as body:
            # An empty body that is read would be sent in chunks, which signed URLs refuse.
            data = body if size else b""
            return self.opened.put(url, data=data, timeout=TIMEOUT_S, headers=headers, allow_redirects=False)

    def _asked_how_far(self, url: str, size: int) -> requests.Response:
        """A resumable session's answer: 308 with the range that has arrived, or that of a complete upload.

        Source: "Perform resumable uploads" in the documentation of Google Cloud Storage.
        """
        asked = {"Content-Range": f"bytes */{size}"}
        return self.opened.put(url, timeout=TIMEOUT_S, headers=asked, allow_redirects=False)

    def _attempts(self, send: Callable[[int], requests.Response]) -> requests.Response:
        """The answer to `send`, which gets the number of the attempt. It is repeated while the troubles may pass."""
        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt and self.stop.wait(PAUSE_S * 2 ** (attempt - 1)):
                break
            try:
                answer = send(attempt)
            except requests.RequestException as error:
                reason = type(error).__name__
                continue
            if answer.status_code in _DONE:
                return answer
            reason = f"HTTP {answer.status_code}"
            if answer.status_code < 500 and answer.status_code not in (308, 408, 429):
                break
        raise UploadError(
            f"The upload to {self.address} failed ({reason}): check that the URL takes a PUT and is still valid."
        )
