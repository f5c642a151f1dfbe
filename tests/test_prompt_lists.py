"""Several prompts: in one request, and in a file of the command line."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import predict
from predict import Predictor
from sdxl.command_line import run_command_line
from sdxl.errors import UserInputError
from sdxl.serving.picture_files import read_parameters
from sdxl.serving.prompt_lists import EXAMPLE_PROMPT, prompts_in, write_sheets
from sdxl.serving.request import DrawingOptions
from tests.conftest import call

SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 5}


def drawn(files: list) -> list[np.ndarray]:
    return [np.asarray(Image.open(file)) for file in files]


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("a fish", ("a fish",)),
        (" a fish | a TOK\n\n a cup\r\nÄ|", ("a fish", "a TOK", "a cup", "Ä")),
        ("a|a", ("a", "a")),
    ],
)
def test_prompts_are_lines_or_parts(text: str, prompts: tuple[str, ...]):
    assert prompts_in(text) == prompts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": " | \n|"}, "prompts contains no prompt"),
        ({"prompts": "a|" * 17}, "prompts has 17 prompts, but may have at most 16"),
        ({"prompts": "a|b|" + "x" * 20_001}, "A prompt of prompts has 20,001 characters"),
        (
            {"prompts": "a|b|c|d|e", "num_outputs": 4},
            "5 prompts with num_outputs=4 make 20 pictures, but a request",
        ),
        ({"prompts": "a|(b:11)"}, "A prompt of prompts"),
    ],
)
def test_wrong_prompts_are_refused(given: dict[str, Any], message: str):
    with pytest.raises(UserInputError, match=message):
        DrawingOptions(prompt="", seed=0, **given)


def test_the_example_is_the_default():
    declared = inspect.signature(Predictor.run).parameters["prompt"].default
    assert declared.default == EXAMPLE_PROMPT


def test_pictures_of_several_prompts_are_those_of_single_requests(predictor: Predictor):
    files = call(predictor.run, **SMALL, prompts="a red fish|a (green:1.2) tree", num_outputs=2)
    assert [Path(file).name for file in files] == ["out-0.png", "out-1.png", "out-2.png", "out-3.png"]
    singles = []
    for prompt in ("a red fish", "a (green:1.2) tree"):
        singles += call(predictor.run, **SMALL, prompt=prompt, num_outputs=2)
    assert all(np.array_equal(one, other) for one, other in zip(drawn(files), drawn(singles), strict=True))
    assert len({one.tobytes() for one in drawn(files)}) == 4
    told = [read_parameters(Path(file)) or "" for file in files]
    assert [text.splitlines()[0] for text in told] == ["a red fish"] * 2 + ["a (green:1.2) tree"] * 2
    assert [text.partition("Seed: ")[2][:2] for text in told] == ["5,", "6,", "5,", "6,"]


def test_a_prompt_beside_prompts_is_told(predictor: Predictor, caplog: pytest.LogCaptureFixture):
    [_] = call(predictor.run, **SMALL, prompt="a dog", prompts="a red fish")
    assert "prompt has no effect beside prompts: add it to them." in caplog.text


# A file of prompts ------------------------------------------------------------------------------------------------------


def run(predictor: Predictor, tmp_path: Path, text: bytes, *more: str) -> int:
    file = tmp_path / "prompts.txt"
    file.write_bytes(text)
    inputs = [f"-i{name}={value}" for name, value in SMALL.items() if name != "seed"]
    arguments = [*inputs, *more, "--prompts-file", str(file), "-o", str(tmp_path / "out")]
    return run_command_line(predictor.run, description="Draw.", argv=arguments, many=predict.PROMPTS_FILE)


def test_a_file_of_prompts_becomes_pictures_and_a_sheet(
    predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(predictor, tmp_path, b"a red fish\n\n  a green tree | a cup \n", "-inum_outputs=2") == 0
    names = ["1-out-0.png", "1-out-1.png", "2-out-0.png", "2-out-1.png", "contact_sheet.jpg"]
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == names
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    told = [(read_parameters(tmp_path / "out" / name) or "") for name in names[:4:2]]
    assert [text.splitlines()[0] for text in told] == ["a red fish", "a green tree | a cup"]
    seeds = {text.partition("Seed: ")[2].split(",")[0] for text in told}
    assert len(seeds) == 1, "a random seed is one for all prompts"
    with Image.open(tmp_path / "out" / "contact_sheet.jpg") as sheet:
        assert sheet.width > 4 * 256


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        (b"\n \n", [], "prompts.txt has 0 prompts, but must have 1 to 1,000"),
        (b"a\n" * 1001, [], "prompts.txt has 1,001 prompts"),
        (b"a fish\n(a cup:11)\n", [], "Prompt 2 of prompts.txt"),
        (b"a fish\n\xff\xd8\xff", [], "prompts.txt is not UTF-8 text"),
        (b"a fish", ["-iprompt=a dog"], "--prompts-file is given together with prompt"),
        (b"a fish", ["-iprompts=a|b"], "--prompts-file is given together with prompt"),
        (b"a fish", ["-iprompts=@prompts.txt"], "prompts takes no file: give it as --prompts-file FILE."),
    ],
)
def test_wrong_files_are_refused_before_anything_is_drawn(
    text: bytes, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(Predictor, "setup", lambda self: pytest.fail("the base must not be loaded"))
    assert run(Predictor(), tmp_path, text, *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_withheld_prompt_does_not_stop_the_others(
    predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    judged: list[bool] = []
    monkeypatch.setattr(
        predictor.delivery.judge, "is_unsafe", lambda picture: judged.append(not judged) or judged[-1]
    )
    assert run(predictor, tmp_path, b"one\ntwo") == 0
    said = capsys.readouterr()
    assert "Run 1 of 2: All pictures were withheld" in said.err
    assert [Path(line).name for line in said.out.splitlines()] == ["2-out-0.png", "contact_sheet.jpg"]
    monkeypatch.setattr(predictor.delivery.judge, "is_unsafe", lambda picture: True)
    again = tmp_path / "again"
    again.mkdir()
    assert run(predictor, again, b"one") == 1
    assert "Error: No run gave a picture" in capsys.readouterr().err
    assert not (again / "out").exists()


def test_many_pictures_get_several_sheets(tmp_path: Path):
    picture = tmp_path / "1-out-0.png"
    Image.new("RGB", (300, 200), "red").save(picture)
    sheets = write_sheets([({"prompt": "a very long prompt " * 50}, [picture] * 41)], tmp_path)
    assert [sheet.name for sheet in sheets] == ["contact_sheet-1.jpg", "contact_sheet-2.jpg"]
    for sheet in sheets:
        with Image.open(sheet) as opened:
            assert max(opened.size) < 10_000
