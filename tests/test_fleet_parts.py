"""What a fleet does apart from Ray: it draws requests for strangers, and stops those that are cancelled."""

import asyncio
import base64
import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.fleet import write_fine_tunes
from deploy import drawing
from deploy.drawing import Drawer
from deploy.requests import FAILED, checked
from deploy.stoppable import run_stoppable
from predict import Predictor
from sdxl import settings
from sdxl.errors import StorageError, UserInputError
from tests.conftest import TINY_BASE, call
from tests.test_faults import full_disk

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
