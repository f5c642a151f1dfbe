"""What a fleet does apart from Ray: it reads requests, draws them for strangers, and stops those that are cancelled."""

import asyncio
import base64
import contextlib
import io
import itertools
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image

from benchmarks.fleet import write_fine_tunes
from deploy import drawing
from deploy.drawing import Drawer
from deploy.requests import (
    FAILED,
    RefusedError,
    checked,
    failed,
    fine_tune_of,
    name_of_fine_tune,
    read_request,
)
from deploy.stoppable import run_stoppable
from predict import Predictor
from sdxl import settings
from sdxl.declared_inputs import as_declared, checked_inputs, declared_inputs
from sdxl.errors import StorageError, UserInputError
from tests.conftest import REPOSITORY, TINY_BASE, call
from tests.test_faults import full_disk
from tools.cog_schema import build

SMALL = {"prompt": "a red fish", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 5}
LONG = {**SMALL, "width": 128, "height": 128, "num_inference_steps": 500}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def drawer(cache: Path) -> Iterator[Drawer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDXL_BASE", str(TINY_BASE))
        patch.setenv("SDXL_CACHE", str(cache))
        yield Drawer()
    settings.set_behind_server(False)


def pixels(uri: str) -> Any:
    kind, _, content = uri.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


# Requests ---------------------------------------------------------------------------------------------------------------


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


# Drawing ------------------------------------------------------------------------------------------------------------------


def test_a_request_is_drawn_as_predict_draws_it(
    drawer: Drawer, predictor: Predictor, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    given = checked(json.loads(json.dumps({**SMALL, "num_outputs": 2})))
    with caplog.at_level(logging.INFO):
        answer = asyncio.run(drawer.draw(given))
    expected = call(predictor.run, **SMALL, num_outputs=2)
    assert answer.status == 200 and answer.output is not None
    for uri, file in zip(answer.output, expected, strict=True):
        assert (pixels(uri) == np.asarray(Image.open(file))).all()
    assert "Seed: 5\n" in answer.logs
    kept = {Path(file).parent for file in expected}
    assert set((tmp_path / "workspace").iterdir()) == kept  # the fleet removes its own
    assert answer.as_json("a")["status"] == "succeeded"


def test_requests_come_from_strangers(drawer: Drawer, tmp_path: Path):
    settings.set_behind_server(True)  # the predictor of the test above has ended that
    tar = tmp_path / "mine.tar"
    tar.write_bytes(b"")
    with pytest.raises(UserInputError, match="takes no paths"):
        asyncio.run(drawer.fetch(str(tar)))
    answer = asyncio.run(drawer.draw(checked(SMALL) | {"extra_lora": [str(tar)]}))
    assert answer.status == 422 and answer.error is not None and "takes no paths" in answer.error
    assert answer.output is None and answer.as_json("a")["status"] == "failed"


def test_a_fine_tune_is_fetched_before_its_turn(drawer: Drawer, cache: Path, tmp_path: Path):
    write_fine_tunes(tmp_path / "made", 1)
    uri = f"data:application/x-tar;base64,{base64.b64encode((tmp_path / 'made' / '0.tar').read_bytes()).decode()}"
    base = asyncio.run(drawer.draw(checked(SMALL)))
    asyncio.run(drawer.fetch(uri))
    [entry] = cache.glob("*/.entry.json")
    assert not drawer.predictor.painter.fine_tunes._memory
    built = entry.stat().st_mtime_ns
    tuned = asyncio.run(drawer.draw(checked(SMALL | {"replicate_weights": uri})))
    assert tuned.status == 200 and tuned.output != base.output
    assert len(drawer.predictor.painter.fine_tunes._memory) == 1
    assert entry.stat().st_mtime_ns == built  # not fetched again
    assert asyncio.run(drawer.draw(checked(SMALL))).output == base.output


def test_a_full_disk_is_told_when_a_fine_tune_is_fetched(drawer: Drawer, tmp_path: Path):
    write_fine_tunes(tmp_path / "made", 1)
    content = base64.b64encode((tmp_path / "made" / "0.tar").read_bytes()).decode()
    with full_disk(1), pytest.raises(StorageError, match="cannot be written"):
        asyncio.run(drawer.fetch(f"data:application/x-tar;name=other;base64,{content}"))


def test_a_cancelled_drawing_stops_and_the_next_is_right(
    drawer: Drawer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(drawing, "STOP_S", -1)
    unharmed = asyncio.run(drawer.draw(checked(SMALL)))
    caplog.clear()

    async def cancel_one() -> None:
        task = asyncio.ensure_future(drawer.draw(checked(LONG)))
        waits = asyncio.ensure_future(drawer.draw(checked(SMALL)))
        while not any("Seed" in message for message in caplog.messages):
            await asyncio.sleep(0.01)
        drawer.require_health()
        task.cancel()
        while not drawer._stops_until:
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="has not stopped"):
            drawer.require_health()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not any("judged" in message for message in caplog.messages)
        assert (await waits).output == unharmed.output

    with caplog.at_level(logging.INFO):
        asyncio.run(cancel_one())
    drawer.require_health()
    assert not [*(tmp_path / "workspace").iterdir()]


def test_an_unexpected_error_is_told_without_its_details(drawer: Drawer):
    pipeline = drawer.predictor.painter.tuned.pipeline
    vae, pipeline.vae = pipeline.vae, None  # type: ignore[assignment]
    try:
        answer = asyncio.run(drawer.draw(checked(SMALL)))
    finally:
        pipeline.vae = vae
    assert (answer.status, answer.error) == (500, FAILED)
    drawer.require_health()  # the processor computes on
    assert asyncio.run(drawer.draw(checked(SMALL))).status == 200


# Threads ------------------------------------------------------------------------------------------------------------------


def test_cancelled_work_stops_where_it_is_and_clears_up():
    begun, cleared = threading.Event(), threading.Event()

    def work() -> None:
        try:
            begun.set()
            while True:
                time.sleep(0.001)
        finally:
            cleared.set()

    async def cancel() -> None:
        task = asyncio.ensure_future(run_stoppable(work))
        await asyncio.to_thread(begun.wait)
        task.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cleared.is_set()

    asyncio.run(cancel())


def test_work_that_is_not_cancelled_ends_as_a_call_does():
    assert asyncio.run(run_stoppable(lambda: 5)) == 5
    with pytest.raises(ZeroDivisionError):
        asyncio.run(run_stoppable(lambda: 1 / 0))
