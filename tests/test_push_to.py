"""A training's result goes to the hub, or stays where the message says; and who may send it there."""

import json
import tarfile
from pathlib import Path

import pytest
from safetensors.torch import load

import train
from sdxl import settings
from sdxl.errors import UploadError, UserInputError
from sdxl.files.push_targets import require_pushable
from sdxl.model import handing_over
from tests.conftest import FULL, QUICK, TINY_BASE, call
from tests.hub import TOKEN, Hub, Repository

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of the hub's client


@pytest.fixture
def behind_server():
    settings.set_behind_server(True)
    yield
    settings.set_behind_server(False)


def test_a_training_pushes_its_result(
    hub: Hub,
    captioned_zip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setenv("SDXL_BASE", str(TINY_BASE))
    monkeypatch.setenv("SDXL_WORKSPACE", str(tmp_path))
    caplog.set_level("INFO")
    form = {"full_result": "difference", "checkpointing_steps": 2}
    tar = Path(call(train.train, input_images=captioned_zip, push_to="team/subject", **QUICK, **FULL, **form))
    made = hub.repositories["team/subject"]
    assert made.private
    assert set(made.files) == {
        "README.md",
        "difference.safetensors",
        "embeddings.pti",
        "special_params.json",
        "training.json",
        "web_ui/TOK.safetensors",
    }
    assert b"difference.safetensors" in made.files["README.md"]
    assert not list(tar.parent.glob("unpacked-*"))
    with tarfile.open(tar) as opened:
        packed = {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]
    assert packed["difference.safetensors"] == made.files["difference.safetensors"]
    assert "unet.conv_in.weight.steps" in load(packed["checkpoints/step-000002/difference.safetensors"])
    everything = b"".join([*packed.values(), *made.files.values(), caplog.text.encode()])
    assert TOKEN.encode() not in everything
    assert "Pushing the fine-tune to team/subject" in caplog.text
    assert "/store/" not in caplog.text, "the address of an upload is signed"
    assert json.loads(packed["training.json"])["settings"]["full_result"] == "difference"
    assert b"team/subject" not in packed["training.json"] + packed["report.html"]


def test_a_failed_push_keeps_the_tar(hub: Hub, fine_tunes: dict[str, Path], behind_server: None):
    hub.answers = {"/store/": 418}
    tar = fine_tunes["lora"]
    with pytest.raises(UploadError, match=r"status 418.* lora.tar is kept on the server.$") as error:
        handing_over.hand_over(tar, upload_url=None, push_to="owner/x")
    assert len(str(error.value)) <= 300
    assert tar.is_file() and not list(tar.parent.glob("unpacked-*"))


def test_a_server_answers_with_the_address(hub: Hub, fine_tunes: dict[str, Path], behind_server: None):
    assert (
        handing_over.hand_over(fine_tunes["lora"], upload_url=None, push_to="owner/x")
        == f"{hub.address}/owner/x"
    )
    assert "lora.safetensors" in hub.repositories["owner/x"].files
    assert handing_over.hand_over(fine_tunes["lora"], upload_url=None, push_to=None) is None


@pytest.mark.parametrize("owners", ["", "others", "own, owners", "owner/x"])
def test_strangers_do_not_push_with_the_servers_token(
    hub: Hub, behind_server: None, owners: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SDXL_PUSH_OWNERS", owners)
    with pytest.raises(UploadError, match="not opened for that owner on this server"):
        require_pushable("owner/x", "push_to")
    assert hub.requests == []


def test_strangers_push_to_the_owners_that_the_operator_names(
    hub: Hub, behind_server: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SDXL_PUSH_OWNERS", "someone, Team")
    require_pushable("team/x", "push_to")
    with pytest.raises(UploadError, match="not opened"):
        require_pushable("owner/x", "push_to")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"push_to": "name"}, "^push_to name is not the name of a repository"),
        ({"push_to": "a/b/c"}, "^push_to a/b/c is not the name"),
        ({"push_to": "owner/x\n"}, "is not the name of a repository"),
        ({"push_to": "x" * 10_000}, "is not the name of a repository"),
        ({"push_to": "other/x"}, "no right to write to other/x"),
        ({"push_to": "owner/x", "upload_url": "https://example.com/x"}, "both given"),
        (
            {"full_result": "difference", "is_lora": False, "single_file": True},
            "single_file writes a whole SDXL",
        ),
        ({"full_result": "half", "is_lora": False}, "full_result is 'half'"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_read(hub: Hub, given: dict, told: str, tmp_path: Path):
    hub.repositories["owner/x"] = Repository(private=True)
    with pytest.raises(UserInputError, match=told) as error:
        call(train.train, input_images=tmp_path / "missing.zip", **given)
    assert len(str(error.value)) <= 300
