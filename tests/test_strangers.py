"""What strangers behind a server may name: no paths of the server, and no addresses of its network."""

import ctypes
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from preprocess import Preprocessor
from sdxl import settings
from sdxl.declared_inputs import as_declared
from sdxl.errors import DownloadError, UserInputError
from sdxl.files import addresses
from sdxl.files.fetching import fetch
from sdxl.files.sources import allowed_file, allowed_fine_tune, allowed_state
from sdxl.files.waiting import wait_for
from tests.conftest import REPOSITORY
from train import train


@pytest.fixture
def behind_server() -> Iterator[None]:
    settings.set_behind_server(True)
    yield
    settings.set_behind_server(False)


@pytest.fixture
def redirecting() -> Iterator[int]:
    """The port of a server that redirects /to/HOST to that host, and answers "content" to all else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
            else:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"content")

        def log_message(self, format: str, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::8.8.8.8", True),
        ("127.0.0.1", False),
        ("127.1.2.3", False),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
    ],
)
def test_addresses_of_the_public_internet(address: str, public: bool):
    assert addresses.is_public(address) == public


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "0", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"]
)
@pytest.mark.usefixtures("behind_server")
def test_urls_that_lead_to_the_server_itself_are_refused(tmp_path: Path, redirecting: int, host: str):
    with pytest.raises(DownloadError) as caught:
        fetch(f"http://{host}:{redirecting}/a", tmp_path)
    assert "content" not in str(caught.value)
    assert "public" in str(caught.value)


@pytest.mark.parametrize(
    "target", ["http://127.0.0.2:{}/a", "http://localhost:{}/a", "http://[", "file:///etc/passwd"]
)
@pytest.mark.usefixtures("behind_server")
def test_redirects_are_checked_like_first_requests(
    tmp_path: Path, redirecting: int, target: str, monkeypatch: pytest.MonkeyPatch
):
    """127.0.0.1 plays the public internet."""
    calls = iter([True])
    monkeypatch.setattr(addresses, "is_public", lambda address: next(calls, False))
    with pytest.raises(DownloadError) as caught:
        fetch(f"http://127.0.0.1:{redirecting}/to/{target.format(redirecting)}", tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_operator_and_the_command_line_may_use_private_urls(
    tmp_path: Path, redirecting: int, monkeypatch: pytest.MonkeyPatch
):
    url = f"http://127.0.0.1:{redirecting}/a"
    assert fetch(url, tmp_path).read_text() == "content"
    settings.set_behind_server(True)
    try:
        monkeypatch.setenv("SDXL_PRIVATE_URLS", "1")
        assert fetch(url, tmp_path).read_text() == "content"
    finally:
        settings.set_behind_server(False)


def test_a_cancel_ends_the_wait_for_a_server_that_never_answers():
    """Cog cancels by an exception in the thread, which arrives only between two instructions of Python."""
    waiting, forever, ended = threading.Event(), threading.Event(), threading.Event()
    outcome: list[BaseException] = []

    def work(abandoned: threading.Event) -> None:
        waiting.set()
        forever.wait()
        assert abandoned.is_set()
        ended.set()

    def request() -> None:
        try:
            wait_for(work, seconds=1e6, what="The download")
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=request)
    thread.start()
    waiting.wait()
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt)
    )
    thread.join()  # returns although the work still waits
    assert [type(error) for error in outcome] == [KeyboardInterrupt]
    forever.set()
    ended.wait()


def test_downloads_have_a_time_limit():
    forever = threading.Event()
    with pytest.raises(DownloadError, match=r"The download took more than 0 minutes: give"):
        wait_for(lambda abandoned: forever.wait(), seconds=0, what="The download")
    forever.set()


def test_errors_of_the_work_come_through():
    with pytest.raises(ZeroDivisionError):
        wait_for(lambda abandoned: 1 // 0, seconds=1e6, what="The download")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The operator's folder of fine-tunes, with some ways out of it."""
    folder = tmp_path / "fine-tunes"
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "lora.safetensors").write_bytes(b"x")
    (folder / "dog.tar").write_bytes(b"x")
    (tmp_path / "private.tar").write_bytes(b"x")
    (folder / "link.tar").symlink_to(tmp_path / "private.tar")
    (folder / "inside.tar").symlink_to(folder / "dog.tar")
    (folder / "linked").mkdir()
    (folder / "linked" / "lora.safetensors").symlink_to(tmp_path / "private.tar")
    (folder / "loop").symlink_to(folder / "loop")
    monkeypatch.setenv("SDXL_FINE_TUNES", str(folder))
    return folder


@pytest.mark.usefixtures("behind_server")
def test_fine_tunes_in_the_operators_folder_may_be_named(folder: Path):
    assert allowed_fine_tune("dog.tar", "replicate_weights") == str(folder / "dog.tar")
    assert allowed_fine_tune("cat", "replicate_weights") == str(folder / "cat")
    assert allowed_fine_tune("cat/lora.safetensors", "x") == str(folder / "cat" / "lora.safetensors")
    assert allowed_fine_tune(str(folder / "dog.tar"), "x") == str(folder / "dog.tar")
    assert allowed_fine_tune("inside.tar", "x") == str(folder / "dog.tar")
    for source in (
        "someone/style",
        "someone/style/a/b.safetensors",
        "https://example.org/a.tar",
        "data:,x",
        "",
        None,
    ):
        assert allowed_fine_tune(source, "x") == source


@pytest.mark.parametrize(
    "source",
    [
        "../private.tar",
        "link.tar",
        "linked",
        "loop",
        "missing.tar",
        ".",
        "/",
        "/dev/zero",
        "/etc/passwd",
        "file:///etc/passwd",
        str(REPOSITORY / "base_models"),
        "base_models/tiny-sdxl",
        "cat/../../private.tar",
        "someone/style/../../private.safetensors",
        "someone/style/.hidden.safetensors",
        "a\0b",
        "x" * 5000,
    ],
)
@pytest.mark.usefixtures("behind_server")
def test_no_way_leads_out_of_the_operators_folder(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(
        UserInputError, match="takes no paths outside its folder fine-tunes: give a file in it, an"
    ):
        allowed_fine_tune(source, "replicate_weights")
    monkeypatch.delenv("SDXL_FINE_TUNES")
    with pytest.raises(UserInputError, match="but this server takes no paths: give an"):
        allowed_fine_tune(source, "replicate_weights")
    monkeypatch.setenv("SDXL_INPUTS", str(folder))
    for allowed in (allowed_fine_tune, allowed_file, allowed_state):
        with pytest.raises(UserInputError, match="takes no paths outside its folder fine-tunes: give"):
            allowed(source, "input")


@pytest.mark.usefixtures("behind_server")
def test_one_folder_may_be_opened_for_every_input(folder: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("image", "input_images"):
        with pytest.raises(UserInputError, match="but this server takes no paths: give an http"):
            allowed_file("dog.tar", name)  # SDXL_FINE_TUNES is for fine-tunes only
    monkeypatch.setenv("SDXL_INPUTS", str(folder))
    monkeypatch.delenv("SDXL_FINE_TUNES")
    monkeypatch.chdir(folder.parent)
    for path in ("dog.tar", "fine-tunes/dog.tar", "./fine-tunes/cat/../dog.tar", str(folder / "dog.tar")):
        for allowed in (allowed_fine_tune, allowed_file, allowed_state):
            assert allowed(path, "input") == str(folder / "dog.tar")
    declared = as_declared(train, {"input_images": "dog.tar", "config": "cat/lora.safetensors"})
    assert declared == {
        "input_images": str(folder / "dog.tar"),
        "config": str(folder / "cat" / "lora.safetensors"),
    }
    assert as_declared(Preprocessor().run, {"files": "cat"}) == {"files": str(folder / "cat")}
    assert allowed_state("auto", "resume") == "auto"
    monkeypatch.setenv("SDXL_INPUTS", str(folder / "none"))
    with pytest.raises(UserInputError, match="but this server takes no paths: give auto, an http"):
        allowed_state("dog.tar", "resume")


def test_the_command_line_takes_any_path_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert allowed_fine_tune("/etc/passwd", "replicate_weights") == "/etc/passwd"
    monkeypatch.chdir(tmp_path)
    for source in (
        "owner/name",
        "owner/v1.0",
        "owner/name/a.safetensors",
        "https://a.b/c.tar",
        "data:,x",
        "",
        None,
    ):
        assert allowed_fine_tune(source, "base") == source
    for source in ("/nowhere", "out", "out/trained_model.tar", "loras/style.safetensors", "a\0b", "x" * 5000):
        with pytest.raises(UserInputError, match=r"^base is .*, which does not exist: give an existing file"):
            allowed_fine_tune(source, "base")
    with pytest.raises(UserInputError, match=r"^resume is state, which does not exist: give auto"):
        allowed_state("state", "resume")
