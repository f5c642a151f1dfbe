"""Shared ground of the tests: the embedded base, small archives, and the doors called as functions."""

import contextlib
import gc
import inspect
import io
import os
import random
import socket
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image, ImageCms

from sdxl.process import configure_logging, repeat_on_cpu
from tests.bucket import Bucket
from tests.hub import TOKEN, Hub

if TYPE_CHECKING:
    from predict import Predictor
    from sdxl.serving.tuned_pipeline import TunedPipeline

repeat_on_cpu()  # before torch multiplies anything
# The miniature is too small to gain from several threads, and on busy cores they wait for each other.
# Subprocesses inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.disable()  # until the tests are collected: looking through all that is imported takes two seconds

LONGEST = (
    "test_studio_page",
    "test_fleet",
    "test_cog_server",
    "test_data_parallel",
    "test_ray_train",
    "test_hostile_bench",
    "test_modes",
)
"""Files that take more than 20 seconds, most of them waiting for processes. `--no-loadscope-reorder` keeps this order."""
REPOSITORY = Path(__file__).parent.parent
TINY_BASE = REPOSITORY / "base_models" / "tiny-sdxl"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest files come first: one that came last would run alone, while the other cores are idle."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """From here on, collect what becomes garbage, and look no more through what has been imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _tiny_base_and_own_workspace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every test uses the embedded base, keeps its runs in its own folder and never asks the network."""
    monkeypatch.setenv("SDXL_BASE", str(TINY_BASE))
    monkeypatch.setenv("SDXL_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("SDXL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SDXL_REFINER", str(TINY_BASE) + "-refiner")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    configure_logging()


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`make_once(name, make)`: the folder that `make` fills, once for all processes of a test run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # then the processes share the folder above their own
        folder = folder.parent

    def made(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(folder / f"{name}.lock"):
            if not (folder / name).exists():
                partial = Path(tempfile.mkdtemp(dir=folder))
                make(partial)
                partial.rename(folder / name)
        return folder / name

    return made


@pytest.fixture(scope="session")
def upscaler_folder(make_once: Callable[..., Path]) -> Path:
    """A small upscaler, taught once for all tests."""
    from tests.tiny_helpers import write_upscaler

    return make_once("upscaler", write_upscaler)


@pytest.fixture(scope="session")
def named_base(make_once: Callable[..., Path]) -> Path:
    """A random SDXL whose layers have the names of the real one, made once for all tests."""
    from tests.named_base import write_named_base

    return make_once("named_base", write_named_base)


@pytest.fixture(scope="session")
def narrow_base(make_once: Callable[..., Path]) -> Path:
    """The miniature with a far narrower UNet with random weights, which trains several times as fast."""
    from tests.tiny_helpers import write_narrow_base

    return make_once("narrow_base", write_narrow_base)


@pytest.fixture(scope="session")
def fine_tunes(make_once: Callable[..., Path]) -> dict[str, Path]:
    """trained_model.tar of a full training ("full") and of a LoRA ("lora") on the pictures of `captioned_zip`."""
    import train

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SDXL_BASE", str(TINY_BASE))
            patch.setenv("SDXL_WORKSPACE", str(folder / "workspace"))
            archive = write_captioned_zip(folder / "captioned.zip")
            for name, inputs in (("full", FULL), ("lora", {"lora_lr": 1e-2})):
                tar = call(train.train, input_images=archive, **QUICK, **inputs)
                Path(tar).rename(folder / f"{name}.tar")

    folder = make_once("fine_tunes", make)
    return {name: folder / f"{name}.tar" for name in ("full", "lora")}


def png(seed: int = 0, size: tuple[int, int] = (96, 80)) -> bytes:
    """A small picture of coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def write_zip(path: Path, files: Mapping[str, bytes | str]) -> Path:
    """A zip of `files` (name → content)."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_captioned_zip(path: Path) -> Path:
    """Four pictures with a captions csv that names TOK."""
    rows = "".join(f"{i}.png,a photo of TOK number {i}\n" for i in range(4))
    pictures = {f"{i}.png": png(i) for i in range(4)}
    return write_zip(path, {**pictures, "captions.csv": "image_file,caption\n" + rows})


@pytest.fixture(scope="module")
def predictor() -> "Predictor":
    """A predictor with the embedded base, ready to draw."""
    from predict import Predictor

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDXL_BASE", str(TINY_BASE))
        made = Predictor()
        made.setup()
    return made


def exchanged_profile(first: str, second: str) -> bytes:
    """The colour profile of a screen with two of its colours, "r", "g" or "b", exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    one, other = f"{first}XYZ".encode(), f"{second}XYZ".encode()
    # The last replacement changes the description, by which sRGB is recognised.
    for old, new in ((one, b"-XYZ"), (other, one), (b"-XYZ", other), (b"s\0R\0G\0B", b"x\0R\0G\0B")):
        profile = profile.replace(old, new)
    return profile


@pytest.fixture
def captioned_zip(tmp_path: Path) -> Path:
    """The archive of `write_captioned_zip`."""
    return write_captioned_zip(tmp_path / "captioned.zip")


def quiet_pipeline(folder: Path) -> "TunedPipeline":
    """The base in `folder` on the CPU, ready for fine-tunes, without progress bars."""
    import torch

    from sdxl.serving.pipeline import load_pipeline
    from sdxl.serving.tuned_pipeline import TunedPipeline

    pipeline = load_pipeline(folder, torch.device("cpu"))
    pipeline.set_progress_bar_config(disable=True)
    return TunedPipeline(pipeline)


def free_port() -> int:
    """A port that is free now and stays so: the system gives those below 32768 to nobody that does not name one."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def call(function: Callable[..., Any], **inputs: Any) -> Any:
    """Call a Cog function as Cog does: every input that is not given takes its declared default."""
    declared = {
        name: parameter.default.default for name, parameter in inspect.signature(function).parameters.items()
    }
    unknown = inputs.keys() - declared.keys()
    assert not unknown, f"{function} has no inputs {unknown}"
    return function(**{**declared, **inputs})


QUICK: dict[str, Any] = {"resolution": 64, "max_train_steps": 4, "train_batch_size": 2, "seed": 0}
QUICK |= {"preservation": 0.0, "checks": 0}
"""Inputs of the shortest training that is one. The run of `test_command_line` is checked, and keeps the default of `preservation`."""
FULL = {"is_lora": False, "unet_learning_rate": 1e-3}
"""Inputs that make it one of the whole UNet, which changes at once."""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket that is ready, and an upload that does not pause before it tries again."""
    from sdxl.files import result_upload

    monkeypatch.setattr(result_upload, "PAUSE_S", 0.0)
    with Bucket() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in for the hub, to which the client of this process talks."""
    import huggingface_hub

    server = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # its protocol is not public
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
