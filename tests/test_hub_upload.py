"""The way to the hub: its model card, and the real client against a local stand-in for the hub's server."""

import ast
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import export
from sdxl.errors import UploadError, UserInputError
from sdxl.files import hub_upload
from sdxl.files.archives import unpack
from sdxl.model.model_card import Sample, model_card
from sdxl.model.web_ui_metadata import About
from tests.conftest import TINY_BASE
from tests.hub import Hub, Repository

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content:DeprecationWarning"
)  # of the hub's client, for large files

FILES = [
    "embeddings.pti",
    "lora.safetensors",
    "special_params.json",
    "web_ui/TOK.safetensors",
    "web_ui/TOK_lora.safetensors",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A large file and a small one."""
    made = tmp_path / "folder"
    (made / "web_ui").mkdir(parents=True)
    (made / "web_ui" / "x.safetensors").write_bytes(b"weights")
    (made / "README.md").write_text("card")
    return made


@pytest.mark.parametrize("private", [True, False])
def test_a_folder_is_committed(hub: Hub, private: bool, folder: Path):
    address = hub_upload.upload(folder, "owner/name", private=private, endpoint=hub.address)
    assert address == f"{hub.address}/owner/name"
    made = hub.repositories["owner/name"]
    assert made.files == {"README.md": b"card", "web_ui/x.safetensors": b"weights"}
    assert made.private == private


def test_an_existing_repository_stays_public(hub: Hub, folder: Path):
    hub.repositories["owner/name"] = Repository(private=False)
    hub_upload.upload(folder, "owner/name", private=True, endpoint=hub.address)
    assert not hub.repositories["owner/name"].private and hub.repositories["owner/name"].files


@pytest.mark.parametrize(
    ("part", "status", "told"),
    [
        ("repos/create", 401, "HF_TOKEN"),
        ("repos/create", 403, "no right to write"),
        ("repos/create", 418, "status 418"),
        ("/preupload/", 403, "no right to write"),
        ("/objects/batch", 418, "status 418"),
        ("/store/", 403, "no right to write"),
        ("/commit/", 412, "status 412"),
    ],
)
def test_refusals_are_explained(hub: Hub, part: str, status: int, told: str, folder: Path):
    hub.answers = {part: status}
    with pytest.raises(UploadError, match=told):
        hub_upload.upload(folder, "owner/name", private=True, endpoint=hub.address)


def test_no_network_is_explained(hub: Hub, folder: Path):
    with pytest.raises(UploadError, match="could not be reached"):
        hub_upload.upload(folder, "owner/name", private=True, endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize("name", ["owner/new", "team/new", "owner/there"])
def test_a_token_that_may_write_passes(hub: Hub, name: str):
    hub.repositories["owner/there"] = Repository(private=True)
    hub_upload.check_access(name, "push_to", endpoint=hub.address)
    assert not any(request.startswith(("POST", "PUT")) for request in hub.requests), "nothing is created"


@pytest.mark.parametrize("name", ["owner/new", "owner/there", "stranger/new"])
def test_a_token_that_may_not_is_told_before_any_work(hub: Hub, name: str):
    hub.repositories["owner/there"] = Repository(private=True)
    hub.role = "write" if name == "stranger/new" else "read"
    with pytest.raises(UploadError, match=f"no right to write to {name}"):
        hub_upload.check_access(name, "push_to", endpoint=hub.address)


def test_a_wrong_token_and_no_network_are_told_before_any_work(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UploadError, match="could not be reached"):
        hub_upload.check_access("owner/name", "push_to", endpoint="http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(UploadError, match="does not accept the token"):
        hub_upload.check_access("owner/name", "push_to", endpoint=hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UploadError, match="HF_HUB_OFFLINE"):
        hub_upload.check_access("owner/name", "push_to")


@pytest.mark.parametrize("name", ["name", "a/b/c", "a b/c", "../x", "owner/", ""])
def test_wrong_names_are_refused_before_any_work(name: str):
    with pytest.raises(UserInputError, match="owner/name"):
        hub_upload.check_repository(name)


def test_a_missing_token_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UploadError, match="set HF_TOKEN"):
        hub_upload.check_repository("owner/name")


def test_a_fine_tune_goes_to_the_hub(hub: Hub, fine_tunes: dict[str, Path], tmp_path: Path):
    picture = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(picture)
    command = [
        str(fine_tunes["lora"]),
        "--to",
        "diffusers",
        "--push",
        "owner/name",
        "-o",
        str(tmp_path / "out"),
    ]
    assert (
        export.main(
            [*command, "--prompt", "a photo of TOK", "--picture", str(picture), "--prompt", "TOK asleep"]
        )
        == 0
    )
    assert {
        "pytorch_lora_weights.safetensors",
        "embeddings.pti",
        "README.md",
        "images/0.png",
    } <= hub.repositories["owner/name"].files.keys()
    header = yaml.safe_load(hub.repositories["owner/name"].files["README.md"].decode().split("---")[1])
    assert header["instance_prompt"] == "TOK"
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    assert header["widget"] == [
        {"text": "a photo of TOK", "output": {"url": "images/0.png"}},
        {"text": "TOK asleep"},
    ]


def test_a_failed_upload_keeps_the_files(
    hub: Hub, fine_tunes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    hub.answers = {"repos/create": 403}
    command = [str(fine_tunes["lora"]), "--to", "ours", "--push", "owner/name", "-o", str(tmp_path / "out")]
    assert export.main(command) == 1
    assert "no right to write" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["trained_model.tar"]


# ---------------------------------------------------------------------------------------------------------------------
# The card


def parts(card: str) -> tuple[dict[str, Any], str]:
    _, header, text = card.split("---\n", 2)
    return yaml.safe_load(header), text


def test_the_card_of_a_lora():
    record = {
        "settings": {
            "lora_rank": 32,
            "max_train_steps": 1000,
            "unet_learning_rate": 1e-6,
            "base": "me/my-sdxl",
        }
    }
    about = About(words=("TOK",), resolution=1024, record=record)
    header, text = parts(model_card(FILES, about, "owner/name", [], ["Something is lost."]))
    assert header["base_model"] == "me/my-sdxl"
    assert header["license"] == "openrail++"
    assert {"text-to-image", "lora", "diffusers", "stable-diffusion-xl", "template:sd-lora"} <= set(
        header["tags"]
    )
    assert "`web_ui/TOK_lora.safetensors` into `models/loras` and `web_ui/TOK.safetensors`" in text
    assert "| lora_rank | 32 |" in text
    assert "unet_learning_rate" not in text
    assert "- Something is lost." in text


def test_the_card_of_a_whole_unet():
    header, text = parts(
        model_card(["unet.safetensors"], About(words=(), resolution=1024), "owner/name", [], [])
    )
    assert "lora" not in header["tags"]
    assert "instance_prompt" not in header
    assert "load_state_dict" in text


def test_words_of_strangers_stay_words():
    word = 'T"OK`]</code>\n---\nlicense: mit\n# <script>'
    record = {"settings": {"base": 'x"); import os; ("', "max_train_steps": "| | <b>"}}
    about = About(words=(word,), resolution=1024, record=record)
    card = model_card(FILES, about, "owner/name", [Sample(prompt=word)], [word])
    end = card.index("\n---\n", 4)
    header = yaml.safe_load(card[4:end])
    assert header["license"] == "openrail++"
    assert header["instance_prompt"] == word
    assert "<script" not in card[end:]
    [code] = [
        block.removeprefix("python\n") for block in card[end:].split("```") if block.startswith("python\n")
    ]
    assert "import os" not in code
    ast.parse(code)


def test_the_code_of_the_card_draws(
    fine_tunes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The card's code runs as it is, apart from the base, the device and the download."""
    folder = tmp_path / "repository"
    unpack(fine_tunes["lora"], folder)
    card = model_card(FILES, About(words=("TOK",), resolution=64), str(folder), [], [])
    [code] = [block.removeprefix("python\n") for block in card.split("```") if block.startswith("python\n")]
    code = code.replace("stabilityai/stable-diffusion-xl-base-1.0", str(TINY_BASE))
    code = code.replace("float16", "float32").replace('.to("cuda")', "")
    options = "num_inference_steps=3, width=64, height=64, generator=torch.Generator().manual_seed(0)"
    code = code.replace('of <s0><s1>")', f'of <s0><s1>", {options})')
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repository, name: str(Path(repository) / name)
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "card", "exec"), {})
    drawn = np.array(Image.open(tmp_path / "picture.png")).astype(int)

    from sdxl.model import fine_tune_files
    from sdxl.serving.generation import generate
    from sdxl.serving.pipeline import load_pipeline
    from sdxl.serving.request import GenerationRequest
    from sdxl.serving.tuned_pipeline import TunedPipeline

    tuned = TunedPipeline(load_pipeline(TINY_BASE, torch.device("cpu")))
    tuned.activate(fine_tune_files.read(folder, folder))
    request = GenerationRequest(
        prompt="a photo of TOK", width=64, height=64, num_inference_steps=3, guidance_scale=5.0, seed=0
    )
    expected = np.array(generate(tuned.pipeline, request, tuned.token_map)[0]).astype(int)
    assert np.abs(drawn - expected).max() <= 1
