"""Where bases come from: URLs, the hub and its cache; converted folders and what happens to them."""

import http.server
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sdxl import settings
from sdxl.errors import DownloadError, UserInputError
from sdxl.files.kept_folders import KeptFolders
from sdxl.files.part_files import variants
from sdxl.files.pipelines import local_folder
from sdxl.files.sources import allowed_fine_tune
from sdxl.model.bases import find_base
from tests.conftest import TINY_BASE
from tests.single_files import checkpoint, weights_of, write


@pytest.fixture(autouse=True)
def _configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_CONFIG", str(TINY_BASE))


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("file") / "base.safetensors", checkpoint(TINY_BASE))


class Site:
    """A server of files that counts what is fetched. As a hub, it answers as huggingface_hub asks."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.refusal: tuple[int, str] | None = None
        """Status and error code of the answer to every request."""
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(*self.found())

            do_HEAD = do_GET

            def found(self) -> tuple[int, bytes, dict[str, str]]:
                if site.refusal is not None:
                    return site.refusal[0], b"", {"X-Error-Code": site.refusal[1]}
                if "/tree/" in self.path:
                    tree = [
                        {"type": "file", "path": path, "size": len(content), "oid": str(len(content))}
                        for path, content in site.files.items()
                    ]
                    return 200, json.dumps(tree).encode(), {}
                if self.path.startswith("/api/"):
                    return 200, json.dumps({"id": "a/b", "sha": "0" * 40}).encode(), {}
                path = (
                    self.path.partition(f"/resolve/{'0' * 40}/")[2]
                    or self.path.rpartition("/resolve/main/")[2]
                )
                content = site.files.get(path.lstrip("/").partition("?")[0])
                if content is None:
                    return 404, b"", {"X-Error-Code": "EntryNotFound"}
                etag = f'"{hash(content)}"'
                if self.headers.get("If-None-Match") == etag:
                    return 304, b"", {}
                if self.command == "GET":
                    site.fetched.append(path)
                return 200, content, {"etag": etag, "x-repo-commit": "0" * 40}

            def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=lambda: self.server.serve_forever(poll_interval=0.01)).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


@pytest.fixture
def hub(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", site.url)
    template = site.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    return site


# URLs -------------------------------------------------------------------------------------------------------------------


def test_a_url_is_fetched_and_converted_once(site: Site, single_file: Path, tmp_path: Path):
    site.files["base.safetensors"] = single_file.read_bytes()
    url = f"{site.url}/base.safetensors?token=secret"
    found = find_base(url)
    assert found.name == f"{site.url}/base.safetensors"
    assert find_base(url).folder == found.folder
    assert len(site.fetched) == 1

    changed = checkpoint(TINY_BASE) | {"v_pred": torch.empty(0)}
    site.files["base.safetensors"] = write(tmp_path / "x.safetensors", changed).read_bytes()
    other = find_base(url)
    assert other.folder != found.folder and other.facts()["prediction_type"] == "v_prediction"
    assert len(site.fetched) == 2
    site.close()
    assert find_base(url).folder == other.folder
    with pytest.raises(UserInputError, match="could not be fetched") as caught:
        find_base(f"{site.url}/other.safetensors?token=secret")
    assert "secret" not in str(caught.value)
    left = [path.name for path in (tmp_path / "cache" / "bases").iterdir() if not path.name.startswith(".")]
    assert sorted(left) == sorted(["locks", found.folder.name, other.folder.name])
    assert not list((tmp_path / "cache" / "bases").glob(".*partial"))


def test_what_is_no_url_is_told(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DownloadError, match="base is not a URL"):
        find_base("http://[", called="base")
    monkeypatch.setenv("SDXL_VAE", "https://[x")
    with pytest.raises(DownloadError, match="SDXL_VAE is not a URL"):
        find_base(str(TINY_BASE))


# The hub ----------------------------------------------------------------------------------------------------------------


def repository(site: Site, folder: Path = TINY_BASE) -> None:
    """Let the hub have the files of a folder, and more that no base needs."""
    for path in folder.rglob("*"):
        if path.is_file():
            site.files[str(path.relative_to(folder))] = path.read_bytes()
    unet = site.files["unet/diffusion_pytorch_model.fp16.safetensors"]
    site.files |= {
        "unet/diffusion_pytorch_model.safetensors": unet,
        "unet/diffusion_pytorch_model.non_ema.safetensors": unet,
        "unet/diffusion_pytorch_model.bin": b"pickle",
        "unet/openvino_model.xml": b"<xml/>",
        "vae_1_0/config.json": b"{}",
        "vae_1_0/diffusion_pytorch_model.fp16.safetensors": unet,
        "base.safetensors": unet,
        "README.md": b"# A base",
    }
    encoder = site.files.pop("text_encoder/model.fp16.safetensors")
    site.files["text_encoder/model.safetensors"] = encoder


def test_what_is_fetched_of_a_repository(hub: Site, monkeypatch: pytest.MonkeyPatch):
    repository(hub)
    found = find_base("somebody/base")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert weights_of(found.folder / part).keys() == weights_of(TINY_BASE / part).keys()
    weights = sorted(path for path in hub.fetched if path.endswith(".safetensors"))
    assert weights == [
        "text_encoder/model.safetensors",
        "text_encoder_2/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert not any(
        path.startswith("vae_1_0") or path.endswith((".md", ".bin", ".xml")) for path in hub.fetched
    )
    count = len(hub.fetched)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_base("somebody/base").folder == found.folder
    assert len(hub.fetched) == count


def test_a_repository_of_no_sdxl_is_refused_before_its_weights_are_fetched(hub: Site):
    repository(hub)
    config = json.loads(hub.files["unet/config.json"]) | {"in_channels": 9}
    hub.files["unet/config.json"] = json.dumps(config).encode()
    with pytest.raises(UserInputError, match="somebody/base is an inpainting model"):
        find_base("somebody/base")
    assert not any(path.endswith(".safetensors") for path in hub.fetched)


def test_an_interrupted_download_goes_on(hub: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    repository(hub)
    folder = find_base("somebody/base").folder
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(DownloadError, match="somebody/base is incomplete in the hub's cache"):
            find_base("somebody/base")
    assert find_base("somebody/base").folder == folder
    assert (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").is_file()


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((401, "GatedRepo"), r"somebody/base is gated: accept its licence at https://huggingface\.co/somebody/base, and "),
        ((403, "GatedRepo"), r"set HF_TOKEN to an access token"),
        ((401, "RepoNotFound"), r"neither an existing path nor a repository.*check the spelling, or set HF_TOKEN"),
        ((403, ""), r"The hub refuses somebody/base \(HTTP 403\): check HF_TOKEN"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", ["somebody/base", "somebody/base/model.safetensors"])
def test_refusals_of_the_hub_are_told(hub: Site, refusal: tuple[int, str], message: str, source: str):
    hub.refusal = refusal
    with pytest.raises(DownloadError, match=message) as caught:
        find_base(source)
    assert "\n" not in str(caught.value)


def test_a_single_file_of_the_hub(hub: Site, single_file: Path, monkeypatch: pytest.MonkeyPatch):
    hub.files["models/base v1.safetensors"] = single_file.read_bytes()
    with pytest.raises(DownloadError, match=r"somebody/base on the hub has no file other\.safetensors"):
        find_base("somebody/base/other.safetensors")
    hub.files = {"models/base.safetensors": single_file.read_bytes()}
    found = find_base("somebody/base/models/base.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_base("somebody/base/models/base.safetensors").folder == found.folder
    assert hub.fetched == ["models/base.safetensors"]


def test_another_autoencoder_of_the_hub(hub: Site, monkeypatch: pytest.MonkeyPatch):
    for path in (TINY_BASE / "vae").iterdir():
        hub.files[path.name] = path.read_bytes()
    hub.files["sdxl_vae.safetensors"] = b"x"
    monkeypatch.setenv("SDXL_VAE", "somebody/vae")
    found = find_base(str(TINY_BASE))
    assert weights_of(found.vae).keys() == weights_of(TINY_BASE / "vae").keys()
    assert sorted(hub.fetched) == ["config.json", "diffusion_pytorch_model.fp16.safetensors"]


def test_the_default_repository_needs_no_weights_for_its_configuration(
    hub: Site, single_file: Path, monkeypatch
):
    repository(hub)
    monkeypatch.setenv("SDXL_CONFIG", "somebody/base")
    find_base(str(single_file))
    assert not any(path.endswith(".safetensors") for path in hub.fetched)
    with pytest.raises(DownloadError, match="SDXL_CONFIG=somewhere/else"):
        monkeypatch.setenv("SDXL_CONFIG", "somewhere/else")
        hub.refusal = (401, "RepoNotFound")
        local_folder("somewhere/else", setting="SDXL_CONFIG", weights=())


@pytest.mark.parametrize(
    ("names", "best"),
    [
        (["model.safetensors", "model.fp16.safetensors"], ["model.fp16.safetensors"]),
        (["model.safetensors", "model.non_ema.safetensors"], ["model.safetensors"]),
        (["model.bf16.safetensors", "pytorch_model.bin"], ["model.bf16.safetensors"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ],
        ),
        (
            ["diffusion_pytorch_model.fp16-00001-of-00001.safetensors"],
            [
                "diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
                "diffusion_pytorch_model.safetensors.index.fp16.json",
            ],
        ),
        (["sd_xl_base_1.0.safetensors", "config.json"], None),
    ],
)
def test_the_best_variant_of_a_part(names: list[str], best: list[str] | None):
    found = variants(names)
    assert (found[0].names if found else None) == best


# Strangers --------------------------------------------------------------------------------------------------------------


def test_what_strangers_may_name_as_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(TINY_BASE / "scheduler", tmp_path / "mine" / "base")
    monkeypatch.setenv("SDXL_FINE_TUNES", str(tmp_path / "mine"))
    monkeypatch.chdir(TINY_BASE.parent.parent)
    settings.set_behind_server(True)
    try:
        for source in (
            "a/b",
            "a/b/c.safetensors",
            "a/b/c/d e.safetensors",
            "https://example.org/a",
            None,
            "",
        ):
            assert allowed_fine_tune(source, "base") == source
        assert allowed_fine_tune("base", "base") == str(tmp_path / "mine" / "base")
        wrong = [str(TINY_BASE), "base_models/tiny-sdxl", "/etc/passwd", "a/b/../../c.safetensors", "../mine"]
        unet = "base_models/tiny-sdxl/unet/diffusion_pytorch_model.fp16.safetensors"
        for source in [*wrong, unet, "a/b/c.ckpt", "a/b/.c.safetensors"]:
            with pytest.raises(UserInputError, match=r"base is .* but this server takes no paths"):
                allowed_fine_tune(source, "base")
    finally:
        settings.set_behind_server(False)


# Kept folders -----------------------------------------------------------------------------------------------------------


def fill(size: int = 1) -> Callable[[Path], object]:
    return lambda folder: (folder / "file").write_bytes(b"x" * size)


def test_a_failed_build_leaves_nothing_and_a_killed_one_is_swept(tmp_path: Path):
    kept = KeptFolders(tmp_path / "kept", 100)

    def fail(folder: Path) -> None:
        fill()(folder)
        raise UserInputError("no")

    with pytest.raises(UserInputError):
        kept.get("a", fail)
    assert kept.find("a") is None
    assert [path.name for path in kept.root.iterdir()] == ["locks"]
    (kept.root / ".b.partial").mkdir()  # as a killed process leaves it
    fill()(kept.root / ".b.partial")
    kept.get("a", fill())
    assert sorted(path.name for path in kept.root.iterdir()) == ["a", "locks"]


def test_one_of_many_builds(tmp_path: Path):
    built: list[int] = []
    gate = threading.Barrier(4)

    def work() -> None:
        kept = KeptFolders(tmp_path / "kept", 100)
        gate.wait()
        kept.get("a", lambda folder: (built.append(1), fill()(folder)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]


def test_the_least_recently_used_folder_goes_unless_it_is_used(tmp_path: Path):
    kept = KeptFolders(tmp_path / "kept", 25)
    first, held = kept.get("a", fill(10))
    second, also = kept.get("b", fill(10))
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    del also
    kept.get("c", fill(10))
    assert first.is_dir() and not second.exists()
    del held
    os.utime(first, (1, 1))
    kept.get("d", fill(10))
    assert not first.exists()
