"""The cache of fine-tunes: limits, threads, kills, and sources that change."""

import base64
import gzip
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dataset_and_utils import TokenMap
from sdxl.errors import UserInputError
from sdxl.files.archives import pack_tar
from sdxl.files.fetching import fetch
from sdxl.model import fine_tune_files
from sdxl.serving.fine_tune_cache import FineTuneCache
from sdxl.settings import CacheLimits, cache_limits
from tests.conftest import REPOSITORY

LARGE = CacheLimits(disk=10**9, memory=10**9)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A LoRA's one number, and the bytes of its file."""

    value: float
    nbytes: int


@dataclass(frozen=True, eq=False)
class Named:
    """What a fine-tune is called, and its words."""

    name: str
    token_map: TokenMap
    nbytes: int = 0


def load(fine_tune: fine_tune_files.FineTuneFiles) -> Loaded:
    assert fine_tune.lora is not None
    tensors = fine_tune.lora.read()
    return Loaded(
        float(tensors["unet.x.lora_A.weight"][0]), sum(tensor.nbytes for tensor in tensors.values())
    )


def make_tar(path: Path, value: float, size: int = 10_000, *, plain: bool = False) -> Path:
    file = path.with_suffix(".safetensors")
    save_file({"unet.x.lora_A.weight": torch.full((size,), value)}, file)
    pack_tar({"lora.safetensors": file}, path)
    file.unlink()
    if not plain:  # a compressed one has to be unpacked into an entry
        path.write_bytes(gzip.compress(path.read_bytes(), 0))
    return path


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "locks")


def test_paths_and_data_uris_are_kept(tmp_path: Path):
    cache = FineTuneCache(tmp_path / "cache", LARGE, load)
    tar = make_tar(tmp_path / "a.tar", 1.5)
    uri = "data:application/x-tar;base64," + base64.b64encode(tar.read_bytes()).decode()
    assert [cache.get(source).value for source in (str(tar), uri)] == [1.5, 1.5]
    assert cache.get(str(tar)) is cache.get(str(tar)), "the second time from memory"
    assert len(entries(tmp_path / "cache")) == 2
    again = FineTuneCache(tmp_path / "cache", LARGE, load)
    assert again.get(uri).value == 1.5
    make_tar(tar, 2.5)
    assert cache.get(str(tar)).value == 2.5, "a changed file is another fine-tune"


def test_a_folder_and_a_bare_file_are_read_where_they_are(tmp_path: Path):
    cache = FineTuneCache(tmp_path / "cache", LARGE, load)
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "style.safetensors"
    save_file({"unet.x.lora_A.weight": torch.full((4,), 3.0)}, file)
    assert cache.get(str(tmp_path / "folder")).value == 3.0
    assert cache.get(str(file)).value == 3.0
    save_file({"unet.x.lora_A.weight": torch.full((4,), 4.0)}, file)
    assert cache.get(str(tmp_path / "folder")).value == 4.0


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fine_tune_files, "_LARGE", 1000)


@pytest.mark.usefixtures("small_is_large")
def test_a_plain_tar_is_read_where_it_is(tmp_path: Path):
    cache = FineTuneCache(tmp_path / "cache", LARGE, load)
    tar = make_tar(tmp_path / "a.tar", 1.5, plain=True)
    assert cache.get(str(tar)).value == 1.5
    assert not entries(tmp_path / "cache")


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("plain", [True, False])
def test_checkpoints_stay_in_the_archive(tmp_path: Path, plain: bool):
    """However many there are: together they may be over every limit."""
    files = {"lora.safetensors": tmp_path / "last.safetensors"}
    files |= {f"checkpoints/step-{i}/lora.safetensors": tmp_path / "early.safetensors" for i in range(20)}
    save_file({"unet.x.lora_A.weight": torch.full((1000,), 1.5)}, tmp_path / "last.safetensors")
    save_file({"unet.x.lora_A.weight": torch.full((1000,), 0.5)}, tmp_path / "early.safetensors")
    pack_tar(files, tmp_path / "a.tar")
    if not plain:
        (tmp_path / "a.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    assert FineTuneCache(tmp_path / "cache", LARGE, load).get(str(tmp_path / "a.tar")).value == 1.5
    (tmp_path / "unpacked").mkdir()
    fine_tune_files.read(tmp_path / "a.tar", tmp_path / "unpacked")
    unpacked = [*(tmp_path / "cache").rglob("*.safetensors"), *(tmp_path / "unpacked").rglob("*.safetensors")]
    assert len(unpacked) == (0 if plain else 2)


@pytest.mark.usefixtures("small_is_large")
def test_a_plain_tar_from_elsewhere_is_unpacked(tmp_path: Path, served):
    folder, url, _ = served
    tar = make_tar(folder / "a.tar", 1.5, plain=True)
    uri = "data:application/x-tar;base64," + base64.b64encode(tar.read_bytes()).decode()
    for source in (f"{url}/a.tar", uri):
        assert FineTuneCache(tmp_path / "cache", LARGE, load).get(source).value == 1.5
    assert len(list((tmp_path / "cache").rglob("lora.safetensors"))) == 2


@pytest.mark.usefixtures("small_is_large")
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path):
    tar = make_tar(tmp_path / "a.tar", 1.5, plain=True)

    def load_slowly(fine_tune: fine_tune_files.FineTuneFiles) -> Loaded:
        found = load(fine_tune)
        make_tar(tar, 2.5, plain=True)
        return found

    with pytest.raises(UserInputError, match=r"a\.tar changed while it was read"):
        FineTuneCache(tmp_path / "cache", LARGE, load_slowly).get(str(tar))


def damage_entries(folder: Path) -> None:
    """Change a byte in the middle of each cached fine-tune, as a failing disk does; sizes stay."""
    for file in folder.glob("*/*.safetensors"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def test_damaged_entries_are_built_again(tmp_path: Path, served, caplog: pytest.LogCaptureFixture):
    folder, url, _ = served
    uri = (
        "data:application/x-tar;base64,"
        + base64.b64encode(make_tar(tmp_path / "a.tar", 1.5).read_bytes()).decode()
    )
    make_tar(folder / "b.tar", 2.5)
    sources = {uri: 1.5, str(make_tar(tmp_path / "c.tar", 3.5)): 3.5, f"{url}/b.tar": 2.5}
    for source, value in sources.items():
        assert FineTuneCache(tmp_path / "cache", LARGE, load).get(source).value == value
    good = {file: file.read_bytes() for file in (tmp_path / "cache").glob("*/*.safetensors")}
    damage_entries(tmp_path / "cache")
    assert all(file.read_bytes() != content for file, content in good.items())
    for source, value in sources.items():
        assert FineTuneCache(tmp_path / "cache", LARGE, load).get(source).value == value
    assert {file: file.read_bytes() for file in good} == good
    assert "The cached copy of b.tar is damaged: fetching it again" in caplog.text
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*/*.safetensors")}
    assert len(before) == 3
    for source, value in sources.items():
        assert FineTuneCache(tmp_path / "cache", LARGE, load).get(source).value == value
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*/*.safetensors")}


def test_the_least_recently_used_goes_first(tmp_path: Path):
    tars = [str(make_tar(tmp_path / f"{i}.tar", float(i))) for i in range(4)]
    cache = FineTuneCache(tmp_path / "cache", CacheLimits(disk=130_000, memory=85_000), load)
    for tar in tars[:3]:
        cache.get(tar)
    kept = cache.get(tars[1])
    cache.get(tars[3])
    assert len(cache._memory) == 2
    assert cache.get(tars[1]) is kept
    sizes = sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*.safetensors"))
    assert sizes <= 130_000
    assert len(entries(tmp_path / "cache")) == 3
    assert cache.get(tars[0]).value == 0.0, "what went is built again"


@pytest.mark.parametrize("one_lock", [False, True])
def test_what_is_larger_than_all_limits_is_served_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_lock: bool
):
    if one_lock:  # as keys that begin alike have it
        monkeypatch.setattr("sdxl.serving.fine_tune_cache._lock_of", lambda key: "one")
    cache = FineTuneCache(tmp_path / "cache", CacheLimits(disk=0, memory=0), load)
    tar = str(make_tar(tmp_path / "a.tar", 1.0))
    assert cache.get(tar).value == 1.0
    assert not cache._memory
    cache.get(str(make_tar(tmp_path / "b.tar", 2.0)))
    assert len(entries(tmp_path / "cache")) == 1


def test_parallel_requests(tmp_path: Path):
    tars = [str(make_tar(tmp_path / f"{i}.tar", float(i))) for i in range(5)]
    caches = [
        FineTuneCache(tmp_path / "cache", CacheLimits(disk=90_000, memory=50_000), load) for _ in range(2)
    ]
    with ThreadPoolExecutor(8) as pool:
        asked = [(caches[i % 2], i % 5) for i in range(120)]
        got = list(pool.map(lambda job: job[0].get(tars[job[1]]).value, asked))
    assert got == [float(index) for _, index in asked]
    assert not [name for name in entries(tmp_path / "cache") if name.startswith(".")]


KILLED = """
import sys
from pathlib import Path
from tests.test_fine_tune_cache import LARGE, FineTuneCache, load
print("ready", flush=True)
while True:
    cache = FineTuneCache(Path(sys.argv[1]), LARGE, load)
    cache.get(sys.argv[2])
    for entry in Path(sys.argv[1]).iterdir():
        if len(entry.name) == 64:
            cache._discard(entry.name)
"""


def test_kills_leave_nothing_half_written_in_use(tmp_path: Path):
    tar = str(make_tar(tmp_path / "a.tar", 7.0, size=2_000_000))
    folder = tmp_path / "cache"
    for pattern in ("*", ".partial-*/content", ".partial-*/content/*"):  # a kill ever later in the building
        before = set(folder.glob(pattern))
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder), tar], cwd=REPOSITORY, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        while set(folder.glob(pattern)) <= before:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert FineTuneCache(folder, LARGE, load).get(tar).value == 7.0
    left = folder / ".partial-left"
    left.mkdir(exist_ok=True)
    os.utime(left, (0, 0))
    FineTuneCache(folder, LARGE, load)
    assert not left.exists(), "what a killed process left is swept"


def test_a_truncated_entry_is_built_again(tmp_path: Path):
    tar = str(make_tar(tmp_path / "a.tar", 7.0))
    FineTuneCache(tmp_path / "cache", LARGE, load).get(tar)
    [file] = (tmp_path / "cache").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert FineTuneCache(tmp_path / "cache", LARGE, load).get(tar).value == 7.0


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str, list[int]]]:
    """A folder, its URL, and the codes that were answered."""
    (tmp_path / "www").mkdir()
    codes: list[int] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given, **named) -> None:
            super().__init__(*given, directory=str(tmp_path / "www"), **named)

        def log_request(self, code="-", size="-") -> None:
            codes.append(int(code))

        def log_message(self, format: str, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    yield tmp_path / "www", f"http://127.0.0.1:{server.server_port}", codes
    server.shutdown()
    server.server_close()


def test_urls_are_asked_whether_they_changed(tmp_path: Path, served):
    folder, url, codes = served
    tar = make_tar(folder / "a.tar", 1.0)
    os.utime(tar, (1_000_000_000, 1_000_000_000))
    cache = FineTuneCache(tmp_path / "cache", LARGE, load)
    assert [cache.get(f"{url}/a.tar").value for _ in range(2)] == [1.0, 1.0]
    assert codes == [200, 304]
    make_tar(folder / "a.tar", 2.0)
    assert cache.get(f"{url}/a.tar").value == 2.0
    with pytest.raises(UserInputError, match="HTTP 404"):
        cache.get(f"{url}/b.tar")


def test_processes_that_share_a_folder_see_each_others_news(tmp_path: Path, served):
    folder, url, _ = served
    caches = [FineTuneCache(tmp_path / "cache", LARGE, load) for _ in range(2)]
    for when, value in ((1_000_000_000, 1.0), (1_000_000_100, 2.0)):
        os.utime(make_tar(folder / "a.tar", value), (when, when))
        assert [cache.get(f"{url}/a.tar").value for cache in caches] == [value, value]


def test_a_fine_tune_by_url_keeps_its_name(tmp_path: Path, served):
    folder, url, _ = served
    words = {name: torch.zeros(2, 8) for name in ("clip_l", "clip_g")}
    save_file(words, folder / "my cat.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    found = FineTuneCache(
        tmp_path / "cache", LARGE, lambda tune: Named(tune.name, fine_tune_files.read_rows(tune)[2])
    )
    cat = found.get(f"{url}/my%20cat.safetensors?secret=1")
    assert cat.name == "my cat.safetensors" and cat.token_map.placeholders == {"my cat": "<s0><s1>"}
    with pytest.raises(UserInputError, match=r"^other\.safetensors holds no UNet"):
        found.get(f"{url}/other.safetensors")
    with pytest.raises(UserInputError, match="The data: URI holds no UNet"):
        found.get("data:;base64," + base64.b64encode((folder / "other.safetensors").read_bytes()).decode())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://[::1/a.tar", "is not a URL"),
        ("https://my..host/a.tar", "check the address"),
        (base64.b64encode(bytes(9000)).decode(), "^AAAAAAAA[A]*… does not exist"),
        ("a\0b", "does not exist"),
    ],
)
def test_what_is_no_source_is_refused_in_a_sentence(tmp_path: Path, source: str, message: str):
    with pytest.raises(UserInputError, match=message):
        FineTuneCache(tmp_path / "cache", LARGE, load).get(source)
    with pytest.raises(UserInputError, match=message):
        fetch(source, tmp_path)


def test_a_file_that_cannot_be_read_is_refused_in_a_sentence(tmp_path: Path):
    with pytest.raises(
        UserInputError, match=r"^gone\.tar cannot be read \(No such file or directory\): check"
    ):
        fine_tune_files.read(tmp_path / "gone.tar", tmp_path)


def test_a_url_out_of_reach_is_served_from_the_cache(tmp_path: Path, served):
    folder, url, _ = served
    make_tar(folder / "a.tar", 1.0)
    cache = FineTuneCache(tmp_path / "cache", LARGE, load)
    cache.get(f"{url}/a.tar")
    [entry] = [name for name in entries(tmp_path / "cache")]
    manifest = tmp_path / "cache" / entry / ".entry.json"
    port = url.rpartition(":")[2]
    with pytest.MonkeyPatch.context() as patch:
        import requests

        def unreachable(*given, **named):
            raise requests.ConnectionError(f"no route to {port}")

        patch.setattr(requests.Session, "get", unreachable)
        assert cache.get(f"{url}/a.tar").value == 1.0
        told = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(told | {"validators": {}}))  # of a server that offers none
        assert cache.get(f"{url}/a.tar").value == 1.0
        manifest.unlink()
        with pytest.raises(UserInputError, match="could not be fetched"):
            FineTuneCache(tmp_path / "cache", LARGE, load).get(f"{url}/a.tar")


def test_a_repository_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As huggingface_hub lays out its cache; the download itself is its own matter."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--someone--style"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save_file({"unet.x.lora_A.weight": torch.full((4,), 5.0)}, snapshot / "pytorch_lora_weights.safetensors")
    (snapshot / "more").mkdir()
    save_file({"unet.x.lora_A.weight": torch.full((4,), 6.0)}, snapshot / "more" / "style [v2].safetensors")
    cache = FineTuneCache(tmp_path / "cache", LARGE, load)
    assert cache.get("someone/style").value == 5.0
    assert cache.get("someone/style/pytorch_lora_weights.safetensors").value == 5.0
    assert cache.get("someone/style/more/style [v2].safetensors").value == 6.0
    with pytest.raises(UserInputError, match="fetched from the hub"):
        cache.get("someone/else")
    with pytest.raises(UserInputError, match="fetched from the hub"):  # without network nobody knows
        cache.get("someone/style/more/b.safetensors")
    for wrong in ("someone/style/../b.safetensors", "someone/style/b.bin", "someone/style//b.safetensors"):
        with pytest.raises(UserInputError, match="does not exist: give an existing file"):
            cache.get(wrong)


def test_a_repository_of_more_than_a_fine_tune_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A hub that answers as huggingface_hub asks: which commit, which files, how large each is."""
    fetched = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "/resolve/" in self.path:
                fetched.append(self.path)
            tree = [
                {"type": "file", "path": f"{name}.safetensors", "size": 7 << 30, "oid": "1"} for name in "ab"
            ]
            answer = tree if "/tree/" in self.path else {"id": "big/base", "sha": "0" * 40, "siblings": []}
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def do_HEAD(self) -> None:
            self.send_response(200)
            for name, value in {"x-repo-commit": "0" * 40, "etag": '"1"', "content-length": 7 << 30}.items():
                self.send_header(name, str(value))
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever).start()
    try:
        constants = "huggingface_hub.constants"
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(f"{constants}.ENDPOINT", url)
        monkeypatch.setattr(
            f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
        with pytest.raises(UserInputError, match="big/base on the hub holds 14 GiB of weights"):
            FineTuneCache(tmp_path / "cache", LARGE, load).get("big/base")
    finally:
        server.shutdown()
        server.server_close()
    assert not fetched


@pytest.mark.parametrize(("name", "text"), [("SDXL_CACHE_DISK_GB", "much"), ("SDXL_CACHE_MEMORY_GB", "-1")])
def test_limits_are_numbers(monkeypatch: pytest.MonkeyPatch, name: str, text: str):
    monkeypatch.setenv(name, "2.5")
    assert 2_500_000_000 in vars(cache_limits()).values()
    monkeypatch.setenv(name, text)
    with pytest.raises(UserInputError, match=name):
        cache_limits()
