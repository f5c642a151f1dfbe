"""The preprocessing entry point answers quickly, and its declared defaults are those of `PreprocessConfig`."""

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import preprocess
from sdxl.data.config import PreprocessConfig
from sdxl.errors import UserInputError
from tests.conftest import REPOSITORY, call, png, write_zip

HEAVY = {"torch", "diffusers", "transformers", "pandas", "cv2"}
"""Packages that take long to import."""
FIELDS = {"caption_text": "caption_prefix", "temp": "mask_temperature"}
"""Input → the setting it becomes, if their names differ."""


def declared() -> dict[str, object]:
    parameters = inspect.signature(preprocess.Preprocessor().run).parameters
    return {name: parameter.default.default for name, parameter in parameters.items()}


def test_defaults_have_one_home():
    settings = {field.name: field.default for field in dataclasses.fields(PreprocessConfig)}
    expected = {name: settings[FIELDS.get(name, name)] for name in declared() if name != "files"}
    # Without a size, the base's own is used; a prefix alone is a caption, so it ends without a comma.
    expected |= {"target_size": None, "caption_text": str(settings["caption_prefix"]).rstrip(" ,")}
    assert {name: default for name, default in declared().items() if name != "files"} == expected


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("module", ["preprocess", "sdxl.data.config", "dataset_and_utils"])
def test_imports_are_light(module: str):
    done = python(f"import {module}, sys; print(*({HEAVY!r} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"target_size": 100}, "multiple of 8"),
        ({"temp": 0.0}, "above 0"),
        ({"mask_target_prompts": " , "}, "must name something"),
        ({"caption_text": "a photo of <s0>"}, "holds <s0>"),
        ({"caption_text": "TOK and TOK"}, "names TOK twice"),
        ({"files": str(REPOSITORY / "README.md")}, "is a text file"),
    ],
)
def test_wrong_inputs_are_refused_before_torch_is_imported(
    tmp_path: Path, inputs: dict[str, object], message: str
):
    archive = write_zip(tmp_path / "x.zip", {"1.png": png(1)})
    with pytest.raises(UserInputError, match=message):
        call(preprocess.Preprocessor().run, **{"files": archive, **inputs})
    given = declared() | {"files": str(archive)} | inputs
    done = python(
        "import sys, preprocess\n"
        "from sdxl.errors import UserInputError\n"
        f"try: preprocess.Preprocessor().run(**{given!r})\n"
        f"except UserInputError: print('refused', *({HEAVY!r} & set(sys.modules)))"
    )
    assert done.stdout.strip() == "refused", done.stderr
