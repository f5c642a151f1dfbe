"""Inputs from a file: a training's record, JSON or YAML. What is given wins, and what is wrong is refused in a sentence."""

import json
from pathlib import Path
from typing import Any

import pytest

import train
from sdxl import settings
from sdxl.declared_inputs import as_declared, declared_inputs
from sdxl.errors import UserInputError
from sdxl.files.archives import unpack
from sdxl.model.fine_tune_files import read_record
from sdxl.training.config_file import with_config
from sdxl.training.inputs import train_inputs
from tests.conftest import QUICK, call
from tests.test_train_inputs import defaults


def read(path: Path, **given: Any) -> dict[str, Any]:
    """The inputs of a training with the file `path` and what is `given`."""
    return as_declared(
        train.train, with_config(defaults(config=str(path), **given), declared_inputs(train.train))
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.json"


def test_json_and_yaml_are_inputs_and_given_ones_win(file: Path):
    values = {
        "token_map": "CAT:3",
        "lora_lr": 1,
        "max_train_steps": 7.0,
        "bucketing": True,
        "global_caption": None,
    }
    file.write_text(json.dumps(values))
    found = read(file, max_train_steps=9)
    assert [found[name] for name in values] == ["CAT:3", 1.0, 9, True, None]
    assert type(found["lora_lr"]) is float and found["is_lora"] == defaults()["is_lora"]
    file.write_text("token_map: 'CAT:3'\nlora_lr: 1e-3\nis_lora: true\ninput_images: x.zip\n")
    found = read(file)
    assert (found["token_map"], found["lora_lr"], found["is_lora"], found["input_images"]) == (
        "CAT:3",
        1e-3,
        True,
        "x.zip",
    )


def test_epochs_that_are_given_replace_the_steps_of_the_file(file: Path):
    file.write_text(json.dumps({"max_train_steps": 7, "seed": 3}))
    found = read(file, num_train_epochs=2)
    assert (found["max_train_steps"], found["num_train_epochs"], found["seed"]) == (None, 2, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"lora_rnk": 8}',
            "run.json names lora_rnk, which is no input of a training: write lora_rank, or leave it out.",
        ),
        ('{"config": "x"}', "run.json names config, which is no input"),
        ("3: 4", "run.json names 3, which is no input"),
        ('{"lora_rank": "8"}', "lora_rank is '8' in run.json, but must be an integer."),
        ('{"lora_rank": 8.5}', "lora_rank is 8.5 in run.json, but must be an integer."),
        ('{"lora_rank": true}', "lora_rank is True in run.json, but must be an integer."),
        ('{"lora_rank": Infinity}', "lora_rank is inf in run.json, but must be an integer."),
        ('{"lora_lr": "fast"}', "lora_lr is 'fast' in run.json, but must be a number."),
        ('{"bucketing": 1}', "bucketing is 1 in run.json, but must be true or false."),
        ('{"token_map": {"TOK": 2}}', "token_map is {'TOK': 2} in run.json, but must be a text."),
        ('{"token_map": null}', "token_map is None in run.json, but must be a text."),
        ("[1, 2]", "run.json is neither JSON nor YAML"),
        ("{" * 100_000, "run.json is neither JSON nor YAML"),
        ("a: &a [*a, *a", "run.json is neither JSON nor YAML"),
        ("!!python/object/apply:os.system [ls]", "run.json is neither JSON nor YAML"),
        ("", "run.json is neither JSON nor YAML"),
        ("{}" + " " * (2 << 20), "run.json is larger than a config may be"),
    ],
)
def test_what_is_wrong_is_refused(file: Path, content: str, message: str):
    file.write_text(content)
    with pytest.raises(UserInputError) as caught:
        read(file)
    assert str(caught.value).startswith(message)


def test_a_file_that_is_no_text_and_one_that_is_missing(file: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserInputError, match="does not exist"):
        read(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserInputError, match="neither JSON nor YAML"):
        read(file)
    monkeypatch.setattr(settings, "behind_server", lambda: True)
    with pytest.raises(UserInputError, match=r"config is .*, but this server takes no paths"):
        read(file)


def test_values_out_of_range_are_refused_as_if_they_were_given(file: Path):
    file.write_text('{"train_batch_size": 0, "input_images": "x.zip"}')
    with pytest.raises(UserInputError, match="train_batch_size is 0, but must be 1 or more"):
        train_inputs(read(file))


def test_the_record_of_a_training_repeats_it(
    captioned_zip: Path, fine_tunes: dict[str, Path], tmp_path: Path
):
    unpack(fine_tunes["lora"], tmp_path / "first")
    record = tmp_path / "first" / "training.json"
    tar = call(train.train, input_images=captioned_zip, config=str(record), max_train_steps=3)
    unpack(tar, tmp_path / "second")
    before, after = (read_record(tmp_path / name)["settings"] for name in ("first", "second"))
    assert {name for name in before if before[name] != after[name]} == {"max_train_steps"}
    assert (before["max_train_steps"], after["max_train_steps"]) == (QUICK["max_train_steps"], 3)
