"""The command lines of the entry points: their grammar, and complete runs in separate processes."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from cog import Input
from cog import Path as CogPath
from PIL import Image

import train
from sdxl.command_line import run_command_line
from sdxl.declared_inputs import declared_inputs
from sdxl.errors import UserInputError
from tests.conftest import REPOSITORY

seen: dict = {}


def entry_point(
    words: str = Input(
        description="Some words, with a description so long that the help must wrap the line to make it fit."
    ),
    count: int = Input(default=2, description="How many.", ge=1, le=5),
    rate: float = Input(default=0.5, description="How fast."),
    loud: bool = Input(default=False, description="Whether."),
    kind: str = Input(default="a", description="Which.", choices=["a", "b"]),
    file: CogPath | None = Input(default=None, description="A file.", deprecated=True),  # noqa: B008
) -> CogPath:
    seen.update(locals())
    if words == "wrong":
        raise UserInputError("words is wrong: choose others.")
    if words == "stop":
        raise KeyboardInterrupt
    if words == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    workspace = Path(os.environ["SDXL_WORKSPACE"]) / "run"
    workspace.mkdir()
    (workspace / "out.txt").write_text(words)
    return CogPath(workspace / "out.txt")


@pytest.fixture(autouse=True)
def _own_workspace(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SDXL_WORKSPACE")  # the command line sets it itself
    seen.clear()


def run(tmp_path: Path, *inputs: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDXL_WORKSPACE", str(tmp_path / "out"))
        return run_command_line(
            entry_point,
            description="An entry point.",
            argv=[*(f"-i{text}" for text in inputs), "-o", str(tmp_path / "out")],
        )


def test_values_are_typed_and_files_delivered(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "x.bin").write_bytes(b"x")
    assert (
        run(tmp_path, "words=a = b", "count=3", "rate=1e-3", "loud=True", "kind=b", f"file=@{tmp_path}/x.bin")
        == 0
    )
    expected = {
        "words": "a = b",
        "count": 3,
        "rate": 1e-3,
        "loud": True,
        "kind": "b",
        "file": tmp_path / "x.bin",
    }
    assert seen == expected
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "out.txt")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["out.txt"]
    assert run(tmp_path, "words=again") == 0
    assert (tmp_path / "out" / "out.txt").read_text() == "again"
    assert seen["count"] == 2
    assert seen["file"] is None


@pytest.mark.parametrize(
    ("inputs", "name", "value"),
    [
        (["count=3.0"], "count", 3),
        (["count=1e0"], "count", 1),
        (["file="], "file", None),
        (["file=DATA:,x"], "file", "DATA:,x"),
    ],
)
def test_values_are_read_as_meant(tmp_path: Path, inputs: list[str], name: str, value: object):
    assert run(tmp_path, "words=", *inputs) == 0
    assert (seen["words"], seen[name]) == ("", value)
    assert type(seen[name]) is type(value)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "words is missing"),
        (["words"], "write -i name=value"),
        (["words=a", "words=b"], "given twice"),
        (["words=a", "cuont=3"], "did you mean count?"),
        (["words=a", "zzz=3"], "There is no input zzz"),
        (["words=a", "count=three"], "must be an integer"),
        (["words=a", "count=1.5"], "count is 1.5, but must be an integer."),
        (["words=a", "count=nan"], "count is nan, but must be an integer."),
        (["words=a", "count="], "count is '', but must be an integer."),
        (["words=a", "count=0"], "at least 1"),
        (["words=a", "count=6"], "at most 5"),
        (["words=a", "rate=x"], "must be a number"),
        (["words=a", "loud=perhaps"], "true or false"),
        (["words=a", "kind=c"], "one of a, b"),
        (["words=a", "file=@/nowhere"], "does not exist"),
        (["words=a", f"file=@{'x' * 5000}"], "x…, which does not exist"),
        (["words=@" + "x" * 5000], "x…, which does not exist"),
    ],
)
def test_a_wrong_input_gives_one_line(
    tmp_path: Path, inputs: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert run(tmp_path, *inputs) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert seen == {}


def test_failures_and_ctrl_c_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(tmp_path, "words=wrong") == 1
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().err == "Error: words is wrong: choose others.\n"
    for words in ("stop", "terminate"):
        assert run(tmp_path, f"words={words}") == 130
        assert capsys.readouterr().err == "Stopped.\n"


def test_help_lists_every_declared_input(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        run_command_line(train.train, description="Train.", argv=["--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    positions = [shown.index(f"  {name} (") for name in declared_inputs(train.train)]
    assert positions == sorted(positions)
    assert "token_map (str; default 'TOK:2')" in shown
    assert "one of constant, linear, cosine" in shown


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def test_train_then_predict_as_the_readme_says(captioned_zip: Path, tmp_path: Path):
    quick = ["resolution=64", "max_train_steps=2", "seed=0", "train_batch_size=2", "checks=1"]
    trained = python(
        "train.py",
        "-i",
        f"input_images=@{captioned_zip}",
        *(f"-i{text}" for text in quick),
        "-o",
        str(tmp_path / "out"),
    )
    assert trained.returncode == 0, trained.stderr
    tar = tmp_path / "out" / "trained_model.tar"
    assert trained.stdout.split() == [str(tar), str(tar.with_name("report.html"))]
    with tarfile.open(tar) as opened:
        record = json.load(opened.extractfile("training.json"))  # type: ignore[arg-type]
    assert record["settings"]["max_train_steps"] == 2
    assert "it/s" in trained.stderr or "step/s" in trained.stderr

    small = ["width=64", "height=64", "num_inference_steps=2", "num_outputs=2", f"replicate_weights=@{tar}"]
    drawn = python(
        "predict.py", "-i", "prompt=a TOK", *(f"-i{text}" for text in small), "-o", str(tmp_path / "pictures")
    )
    assert drawn.returncode == 0, drawn.stderr
    names = [Path(line).name for line in drawn.stdout.split()]
    assert names == ["out-0.png", "out-1.png"]
    for name in names:
        with Image.open(tmp_path / "pictures" / name) as picture:
            assert picture.size == (64, 64)


def test_preprocess_makes_what_train_takes(captioned_zip: Path, tmp_path: Path):
    prepared = python(
        "preprocess.py", "-i", f"files=@{captioned_zip}", "-itarget_size=64", "-o", str(tmp_path / "out")
    )
    assert prepared.returncode == 0, prepared.stderr
    with tarfile.open(tmp_path / "out" / "data.tar") as opened:
        assert "captions.csv" in opened.getnames()
        assert "3.src.png" in opened.getnames()


def test_a_wrong_input_on_the_real_command_line(captioned_zip: Path, tmp_path: Path):
    wrong = python(
        "train.py", "-i", f"input_images=@{captioned_zip}", "-i", "resolution=100", "-o", str(tmp_path)
    )
    assert wrong.returncode == 1
    assert wrong.stderr.strip().splitlines()[-1].startswith("Error: A picture size of 100 does not work")
