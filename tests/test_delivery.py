"""What happens to pictures before they are delivered: the safety judge and the watermark; and placements on devices."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from predict import Predictor
from sdxl.data.picture_reader import read_image
from sdxl.errors import DownloadError, UserInputError, WithheldError
from sdxl.serving import watermark
from sdxl.serving.picture_files import read_parameters, save
from sdxl.serving.placement import choose_placement
from sdxl.serving.safety import OpenNsfwJudge, load_checker, load_judge
from tests.conftest import REPOSITORY, TINY_BASE, call
from tests.tiny_helpers import write_checker

SMALL = {"prompt": "a red fish on a blue background", "num_inference_steps": 2, "seed": 0}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDXL_BASE", str(TINY_BASE))
        patch.setenv("SDXL_CACHE", str(tmp_path_factory.mktemp("cache")))
        made = Predictor()
        made.setup()
    return made


# Safety -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checker(tmp_path_factory.mktemp("checker"))


def test_the_checker_of_stable_diffusion_judges(checker_folder: Path):
    judge = load_checker(str(checker_folder), CPU)
    pictures = [Image.new("RGB", (80, 64), colour) for colour in ("blue", "red")]
    before = [np.array(picture) for picture in pictures]
    assert [judge.is_unsafe(picture) for picture in pictures] == [False, True]
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(before, pictures, strict=True))
    assert str(checker_folder) in judge.name


def test_which_judge_judges(checker_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    assert "open_nsfw" in load_judge(CPU, real_base=False).name
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "open_nsfw" in load_judge(CPU, real_base=True).name
    assert "open_nsfw judges instead" in caplog.text
    monkeypatch.setenv("SDXL_SAFETY_CHECKER", str(checker_folder))
    assert str(checker_folder) in load_judge(CPU, real_base=False).name
    monkeypatch.setenv("SDXL_SAFETY_CHECKER", "no-one/nothing")
    with pytest.raises(DownloadError, match="SDXL_SAFETY_CHECKER"):
        load_judge(CPU, real_base=True)


def test_open_nsfw_passes_ordinary_pictures():
    pictures = [
        read_image(REPOSITORY / "docs" / "demo.jpg")[0],
        Image.effect_noise((256, 256), 80).convert("RGB"),
    ]
    judge = OpenNsfwJudge()
    assert not any(judge.is_unsafe(picture) for picture in pictures)


class Strict:
    """A judge with a simple rule: a picture equal to `bad` is unsafe; without `bad`, all pictures are."""

    name = "a strict judge"

    def __init__(self, bad: Path | None = None) -> None:
        self.bad = None if bad is None else Image.open(bad).tobytes()

    def is_unsafe(self, picture: Image.Image) -> bool:
        return self.bad is None or picture.tobytes() == self.bad


def test_unsafe_pictures_are_withheld_and_others_delivered(predictor: Predictor, monkeypatch, caplog):
    caplog.set_level("INFO")
    small = {**SMALL, "num_outputs": 3, "width": 64, "height": 64, "apply_watermark": False}
    everything = call(predictor.run, **small, disable_safety_checker=True)
    monkeypatch.setattr(predictor.delivery, "judge", Strict(everything[1]))
    files = call(predictor.run, **small)
    assert [file.name for file in files] == ["out-0.png", "out-2.png"]
    assert files[1].read_bytes() == everything[2].read_bytes()
    assert "a strict judge judged: 1 of 3 withheld" in caplog.text


def test_all_withheld_is_an_error_and_the_watermark_stays_as_it_was(
    predictor: Predictor, monkeypatch, tmp_path
):
    with monkeypatch.context() as patch:
        patch.setattr(predictor.delivery, "judge", Strict())
        with pytest.raises(WithheldError, match="try another prompt or seed"):
            call(predictor.run, **SMALL, apply_watermark=False)
    assert list((tmp_path / "workspace").iterdir()) == []
    [file] = call(predictor.run, **SMALL)
    assert watermark.is_marked(Image.open(file))


# Watermark --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_format", ["png", "jpg"])
def test_files_are_marked_unless_told_otherwise(predictor: Predictor, output_format: str):
    given = {**SMALL, "output_format": output_format, "output_quality": 95}
    [file] = call(predictor.run, **given)
    assert watermark.is_marked(Image.open(file))
    [plain] = call(predictor.run, **given, apply_watermark=False)
    assert not watermark.is_marked(Image.open(plain))
    distance = np.asarray(Image.open(file).convert("L")).astype(int) - np.asarray(
        Image.open(plain).convert("L")
    )
    assert np.abs(distance).mean() < 1, "no one sees it"


@pytest.mark.parametrize("size", [(64, 64), (250, 330), (1024, 768)])
def test_any_message_is_read_back(size: tuple[int, int]):
    picture = Image.effect_noise(size, 60).convert("RGB")
    for message in (0, watermark.MESSAGE, 2**48 - 1, 12345678901):
        assert watermark.read(watermark.embed(picture, message)) == message
    assert not watermark.is_marked(picture)
    assert watermark.embed(picture.crop((0, 0, 7, 7))).size == (7, 7)


def test_a_flat_colour_carries_the_mark():
    assert watermark.is_marked(watermark.embed(Image.new("RGB", (256, 256), (200, 30, 60))))


def test_inpainting_keeps_pixels_under_the_watermark_too(predictor: Predictor, tmp_path: Path):
    original = Image.effect_noise((256, 256), 60).convert("RGB")
    mask = Image.new("L", (256, 256), 0)
    mask.paste(255, (0, 0, 256, 160))
    original.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.png")
    [file] = call(predictor.run, **SMALL, image=str(tmp_path / "image.png"), mask=str(tmp_path / "mask.png"))
    drawn = np.array(Image.open(file))
    assert np.array_equal(drawn[164:], np.array(original)[164:])
    assert watermark.is_marked(Image.open(file))


# Files and places -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_format", ["png", "webp", "jpg"])
def test_a_prompt_longer_than_metadata_may_be_is_cut(tmp_path: Path, output_format: str):
    text = "a very long \N{DRAGON} prompt, " * 3000
    file = tmp_path / f"a.{output_format}"
    save(Image.new("RGB", (8, 8)), file, quality=80, parameters=text)
    found = read_parameters(file)
    assert found and text.startswith(found) and len(found) > 20_000


def test_metadata_can_be_left_out(predictor: Predictor):
    [told] = call(predictor.run, **SMALL)
    [silent] = call(predictor.run, **SMALL, embed_metadata=False)
    with Image.open(told) as one, Image.open(silent) as other:
        assert one.info["parameters"].startswith("a red fish")
        assert "parameters" not in other.info
        assert np.array_equal(np.array(one), np.array(other))


def test_a_damaged_input_picture_is_refused(predictor: Predictor, tmp_path: Path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(
        UserInputError, match=r"^image cannot be read as a picture, because it is a text file"
    ):
        call(predictor.run, **SMALL, image=str(tmp_path / "x.png"))
    assert list((tmp_path / "workspace").iterdir()) == []


@pytest.mark.parametrize(
    ("gib", "setting", "name"),
    [
        (None, "auto", "cpu"),
        (80, "auto", "whole"),
        (11.8, "auto", "12gb"),
        (8, "auto", "8gb"),
        (80, "8gb", "8gb"),
        (80, "cpu", "cpu"),
    ],
)
def test_placements(gib: float | None, setting: str, name: str):
    assert choose_placement(gib, setting).name == name


@pytest.mark.parametrize(("gib", "setting"), [(None, "whole"), (80, "huge")])
def test_placements_that_cannot_be(gib: float | None, setting: str):
    with pytest.raises(UserInputError, match="SDXL_MEMORY"):
        choose_placement(gib, setting)


def test_the_log_says_how_it_serves(predictor: Predictor, caplog, tmp_path, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setenv("SDXL_CACHE", str(tmp_path / "c"))
    other = Predictor()
    other.setup()
    assert "everything on the CPU" in caplog.text
    assert "judged by open_nsfw" in caplog.text
