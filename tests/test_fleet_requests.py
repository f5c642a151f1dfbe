"""What a fleet takes and refuses: the inputs of predict.py, as behind Cog, and where a request goes."""

import contextlib
import itertools
from typing import Any

import jsonschema
import pytest

from deploy.requests import RefusedError, checked, failed, fine_tune_of, name_of_fine_tune, read_request
from predict import Predictor
from sdxl.declared_inputs import as_declared, checked_inputs, declared_inputs
from sdxl.errors import StorageError, UserInputError
from tests.conftest import REPOSITORY
from tools.cog_schema import build


def test_every_default_is_the_one_of_predict():
    inputs = checked({})
    assert inputs.keys() == declared_inputs(Predictor().run).keys()
    defaults = {name: one.default for name, one in declared_inputs(Predictor().run).items()}
    assert inputs == defaults | {"seed": inputs["seed"]}
    assert 0 <= inputs["seed"] < 2**32
    assert checked({"seed": 0})["seed"] == 0


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"width": 64.0}, 64),
        ({"guidance_scale": 7}, 7),
        ({"width": None}, None),
        ({"image": " "}, None),
        ({"replicate_weights": ""}, None),
        ({"extra_lora": ["a", ""]}, ["a", ""]),
        ({"prompt": ""}, ""),
        ({"mask_invert": True}, True),
    ],
)
def test_values_get_their_declared_types(given: dict[str, Any], value: Any):
    [name] = given
    found = checked(given)[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"width": "64"}, "width is '64', but must be an integer."),
        ({"width": True}, "width is True, but must be an integer."),
        ({"width": [64]}, "width is [64], but must be an integer."),
        ({"width": 64.5}, "width is 64.5, but must be an integer."),
        ({"num_outputs": 9}, "num_outputs is 9, but must be at most 4."),
        ({"num_outputs": 10**400}, "must be at most 4."),
        ({"guidance_scale": "7"}, "guidance_scale is '7', but must be a number."),
        ({"scheduler": "EULER"}, "scheduler is 'EULER', but must be one of DDIM,"),
        ({"mask_invert": 1}, "mask_invert is 1, but must be true or false."),
        ({"prompt": {"a": 1}}, "prompt is {'a': 1}, but must be a text."),
        ({"prompt": "\ud800"}, "must be UTF-8."),
        ({"extra_lora": "a"}, "extra_lora is 'a', but must be a list."),
        ({"extra_lora": [["a"]]}, "extra_lora is ['a'], but must be a text."),
        ({"extra_lora_scale": [0.5, None]}, "extra_lora_scale is None, but must be a number."),
        (
            {"num_inference_step": 5},
            "There is no input num_inference_step: did you mean num_inference_steps?",
        ),
        ({"x" * 1000: 5}, "There is no input xxx"),
    ],
)
def test_wrong_inputs_are_refused_in_a_sentence(given: dict[str, Any], told: str):
    with pytest.raises(UserInputError) as caught:
        checked(given)
    assert told in str(caught.value) and len(str(caught.value)) <= 300
    assert failed(caught.value).status == 422


ODD: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    5.0,
    2.5,
    -0.0,
    1e300,
    10**30,
    "",
    " ",
    "a",
    "1",
    "png",
    "K_EULER",
    "1:1",
]
ODD += [[], [None], [True], [0.5], ["a"], [1, "a"], [[1.0]], {}, {"a": 1}]


def test_inputs_are_those_that_cogs_schema_lets_through():
    """The schema in front of predict.py, with what predict.py does next, against `checked`: the same values get through, alike."""
    entry_point = Predictor().run
    schemas = build(REPOSITORY / "cog.yaml")["components"]["schemas"]
    schema = jsonschema.Draft7Validator({**schemas["Input"], "components": {"schemas": schemas}})
    taken = 0
    for name, value in itertools.product(declared_inputs(entry_point), ODD):
        behind_cog: Any = "refused"
        if value is None:
            behind_cog = "null"  # Cog refuses it for some inputs; here it always stands for the default
        elif schema.is_valid({name: value}):
            with contextlib.suppress(UserInputError):
                behind_cog = as_declared(entry_point, {name: value})[name]
        in_fleet: Any = "refused"
        with contextlib.suppress(UserInputError):
            in_fleet = checked_inputs(entry_point, {name: value})[name]
        if behind_cog == "null":
            assert in_fleet == declared_inputs(entry_point)[name].default
            continue
        assert (in_fleet, type(in_fleet)) == (behind_cog, type(behind_cog)), (name, value)
        taken += in_fleet != "refused"
    assert taken > 100


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"\xff", 400),
        (b"[" * 100_000, 400),
        (b'{"input": {"guidance_scale": NaN}}', 400),
        (b"[]", 400),
        (b'{"input": []}', 400),
        (b'{"input": {}, "webhook": "https://example.com"}', 422),
        (b'{"input": {}, "id": 5}', 422),
    ],
)
def test_what_is_no_request_is_refused(body: bytes, status: int):
    with pytest.raises(RefusedError) as caught:
        read_request(body)
    assert failed(caught.value).status == status


def test_a_request_has_a_name():
    assert read_request(b'{"id": "mine", "input": {"prompt": "a"}}') == ("mine", {"prompt": "a"})
    first, second = (read_request(b"{}")[0] for _ in range(2))
    assert first != second


def test_the_fine_tune_decides_where_a_request_goes():
    assert fine_tune_of(checked({})) is None
    assert fine_tune_of(checked({"extra_lora": ["", "style"]})) == "style"
    assert fine_tune_of(checked({"replicate_weights": "mine", "extra_lora": ["style"]})) == "mine"
    secret = "https://example.com/a.tar?signature=secret"
    assert name_of_fine_tune(secret) == name_of_fine_tune(secret) != name_of_fine_tune("mine")
    assert "secret" not in name_of_fine_tune(secret)


def test_a_full_disk_is_not_the_fault_of_the_request():
    assert failed(StorageError("The disk is full.")).status == 507
