"""Sources of files: `data:` URIs as people write them, and names of downloads."""

import base64
import http.server
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdxl.errors import DownloadError
from sdxl.files.fetching import fetch, is_remote, name_of, shown

CONTENT = bytes(range(256)) + b"x"
"""Its base64 has every character of the alphabet, and padding."""
PLAIN = base64.b64encode(CONTENT).decode()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://host:8099/a.tar?signature=x", "http://host:8099/a.tar"),
        ("https://me:secret@host/a.tar#x", "https://host/a.tar"),
        ("http://[::1]:80/a", "http://[::1]:80/a"),
    ],
)
def test_messages_show_where_a_url_leads_and_no_secret(url: str, told: str):
    assert shown(url) == told


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        (f"data:image/png;base64,{PLAIN}", "data-uri.png"),
        (f"DATA:IMAGE/PNG;BASE64,{PLAIN}", "data-uri.png"),
        (f"data:application/zip;name=a.zip;base64,{PLAIN}", "data-uri.zip"),
        (f"data:;base64,{PLAIN}", "data-uri.bin"),
        (f"data:made/up;base64,{base64.encodebytes(CONTENT).decode()}", "data-uri.bin"),
        (f"data:;base64,{PLAIN.rstrip('=')}", "data-uri.bin"),
        (f"data:;base64,{base64.urlsafe_b64encode(CONTENT).decode()}", "data-uri.bin"),
        (f"data:;base64,{urllib.parse.quote(PLAIN, safe='')}", "data-uri.bin"),
        (f"data:;base64,{urllib.parse.quote(base64.encodebytes(CONTENT))}", "data-uri.bin"),
        (f"data:image/jpeg,{urllib.parse.quote_from_bytes(CONTENT)}", "data-uri.jpg"),
    ],
)
def test_data_uris_are_decoded(tmp_path: Path, uri: str, name: str):
    assert is_remote(uri)
    path = fetch(uri, tmp_path)
    assert path.read_bytes() == CONTENT
    assert path.name == name


def test_text_and_nothing_are_content_too(tmp_path: Path):
    assert fetch("data:text/plain,a%20b,c+d", tmp_path).read_text() == "a b,c+d"
    assert fetch("data:,", tmp_path).read_bytes() == b""


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("data:image/png;base64", "has no comma"),
        ("data:image/png;base64,####", "is not base64"),
        ("data:image/png;base64,ab=c", "is not base64"),
        ("data:image/png;base64,abcde", "is cut off"),
        ("data:image/png;base64,käse", "is not base64"),
    ],
)
def test_data_uris_that_cannot_be_decoded_say_why(tmp_path: Path, uri: str, message: str):
    with pytest.raises(
        DownloadError, match=rf"^The data: URI cannot be decoded \(.*{message}.*\): send data:"
    ):
        fetch(uri, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://host/a/dog.zip", "dog.zip"),
        ("https://host/dog.zip?download=true#part", "dog.zip"),
        ("https://host/my%20dog.zip", "my dog.zip"),
        ("https://host/hündin.zip", "hündin.zip"),
        ("https://host/a%2F..%2Fb.zip", "b.zip"),
        ("https://host/a%5C..%5Cb.zip", "b.zip"),
        ("https://host/..", "download"),
        ("https://host/.hidden", "hidden"),
        ("https://host/a%00%0Ab.zip", "ab.zip"),
        ("https://host/", "download"),
        ("https://host", "download"),
        ("https://host/%FF%FE.zip", "\ufffd\ufffd.zip"),
        ("https://[/x.zip", "download"),
        (f"https://host/{'é' * 300}.zip", f"{'é' * 98}.zip"),
    ],
)
def test_a_download_is_named_after_its_url(url: str, name: str):
    assert name_of(url) == name


@pytest.fixture
def server() -> Iterator[str]:
    """Answers every path with the same bytes, and claims a name."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Disposition", 'attachment; filename="../evil.zip"')
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, format: str, *args: object) -> None: ...

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize("name", ["dog.zip", "content", "%C3%A9" * 300 + ".zip", "", "a%2Fb"])
def test_downloads_keep_to_their_folder(tmp_path: Path, server: str, name: str):
    path = fetch(f"{server.upper().replace('HTTP', 'Http')}/{name}", tmp_path)
    assert path.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [path]
    assert path.name == name_of(f"{server}/{name}")
