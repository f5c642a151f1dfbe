"""Values as JSON brings them, in the types that the entry points declare."""

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from predict import Predictor
from preprocess import Preprocessor
from sdxl.declared_inputs import DeclaredInput, as_declared, declared_inputs
from sdxl.errors import UserInputError
from tests.conftest import call
from train import train

ENTRY_POINTS: list[Callable[..., Any]] = [Predictor().run, train, Preprocessor().run]
FILES = {"image", "mask", "input_images", "input_data_tar_or_zip", "files", "replicate_weights"}


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_whole_numbers_are_integers_wherever_one_is_declared(entry_point: Callable[..., Any]):
    integers = [name for name, one in declared_inputs(entry_point).items() if one.kind is int]
    given = json.loads(json.dumps(dict.fromkeys(integers, 64.0)))
    converted = as_declared(entry_point, given)
    assert converted == dict.fromkeys(integers, 64)
    assert integers and all(type(value) is int for value in converted.values())
    for name in integers:
        for text in ("1.5", "-0.1", "NaN", "Infinity"):
            with pytest.raises(UserInputError, match=f"^{name} is .*, but must be an integer\\.$"):
                as_declared(entry_point, {name: json.loads(text)})


def test_other_values_stay_as_they_are():
    given = {
        "prompt": "",
        "guidance_scale": 7,
        "extra_lora_scale": [0.5, 1],
        "extra_lora": ["", "a"],
        "seed": None,
    }
    assert as_declared(Predictor().run, given | {"self": 1, "other": 2}) == given


def test_integers_in_lists_are_converted_too():
    [count] = [one for name, one in declared_inputs(Predictor().run).items() if name == "num_outputs"]
    many = DeclaredInput(name="sizes", kind=int, optional=True, many=True, declaration=count.declaration)
    assert many.typed([1.0, 2, 3.0]) == [1, 2, 3]
    with pytest.raises(UserInputError, match=r"^sizes is 2\.5, but must be an integer\.$"):
        many.typed([1, 2.5])


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_bytes_that_are_not_utf8_are_refused(entry_point: Callable[..., Any]):
    latin = os.fsdecode(b"caf\xe9")  # as it arrives from a command line
    for name, declared in declared_inputs(entry_point).items():
        if declared.kind is str:
            with pytest.raises(UserInputError, match=rf"^{name} is 'caf\\udce9', but must be UTF-8\.$"):
                as_declared(entry_point, {name: [latin] if declared.many else latin})
            assert as_declared(entry_point, {name: "café 🐟"}) == {name: "café 🐟"}


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_an_empty_text_is_no_file(entry_point: Callable[..., Any]):
    for name, declared in declared_inputs(entry_point).items():
        for empty in ("", " "):
            if name in FILES and name != "files":
                assert as_declared(entry_point, {name: empty}) == {name: None}
            elif name == "files":
                with pytest.raises(UserInputError, match=r"^files is missing: give a file, a data: URI"):
                    as_declared(entry_point, {name: empty})
            elif isinstance(declared.default, str):
                assert as_declared(entry_point, {name: empty}) == {name: empty}


def test_the_entry_points_convert_what_they_get(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Predictor, "setup", lambda self: pytest.fail("the base must not be loaded"))
    for inputs in ({"num_outputs": 1.5}, {"width": 64.5}, {"refine_steps": 1.5}):
        [name] = inputs
        with pytest.raises(UserInputError, match=f"^{name} is .* must be an integer"):
            call(Predictor().run, **inputs)
    with pytest.raises(UserInputError, match=r"^max_train_steps is 1.5, but must be an integer"):
        call(train, input_images="x.zip", max_train_steps=1.5)
    with pytest.raises(UserInputError, match=r"^input_images is missing: give a zip"):
        call(train, input_images="")
    with pytest.raises(UserInputError, match=r"^target_size is 64.5, but must be an integer"):
        call(Preprocessor().run, files="x.zip", target_size=64.5)
    with pytest.raises(UserInputError, match=r"^files is missing"):
        call(Preprocessor().run, files="")
