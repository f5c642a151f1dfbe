"""Both doors behind the real Cog server, driven over HTTP on the embedded base."""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from tests.conftest import REPOSITORY, TINY_BASE, png, write_zip
from tools import cog_schema

READY_S, ANSWER_S = 90, 120


class Server:
    """A running Cog server."""

    def __init__(self, port: int, what: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.what = what  # "predictions" or "trainings"

    def post(self, inputs: dict[str, Any]) -> requests.Response:
        """Run a job to its end; the slot of the job before it is free a moment after its answer, so 409 is retried."""
        deadline = time.monotonic() + 10
        while True:
            answer = requests.post(f"{self.url}/{self.what}", json={"input": inputs}, timeout=ANSWER_S)
            if answer.status_code != 409 or time.monotonic() > deadline:
                return answer
            time.sleep(0.1)

    def get(self, path: str) -> Any:
        return requests.get(f"{self.url}/{path}", timeout=5).json()


@contextmanager
def serve(workspace: Path, door: str, *, weights: str = "") -> Iterator[Server]:
    """Start the server as `make serve`, `make serve-train` and `make serve-preprocess` do, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    train, folder = door == "train.py:train", REPOSITORY
    if door == "preprocess.py:Preprocessor":
        folder = workspace.parent / "preprocessor"
        cog_schema.main(["--config", str(REPOSITORY / "cog.preprocess.yaml"), "--folder", str(folder)])
    environment = {
        **os.environ,
        "COG_TRAIN_TYPE_STUB" if train else "COG_PREDICT_TYPE_STUB": f"{REPOSITORY}/{door}",
        "PYTHONPATH": str(REPOSITORY),
        "PORT": str(port),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SDXL_BASE": str(TINY_BASE),
        "SDXL_WORKSPACE": str(workspace),
        "HF_HUB_OFFLINE": "1",
        **({"COG_WEIGHTS": weights} if weights else {}),
    }
    command = [sys.executable, "-m", "cog.server.http", *(["--x-mode", "train"] if train else [])]
    with (workspace.parent / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    server = Server(port, "trainings" if train else "predictions")
    try:
        _wait_until_ready(server, process, workspace.parent / "server.log")
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_ready(server: Server, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            status = server.get("health-check")["status"]
        except requests.RequestException:
            status = "STARTING"
        if status == "READY":
            return
        assert status == "STARTING", log.read_text()
        time.sleep(0.2)
    pytest.fail(f"the server did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("trainer") / "workspace", "train.py:train") as server:
        yield server


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("predictor") / "workspace", "predict.py:Predictor") as server:
        yield server


def data_uri(content: bytes, kind: str = "application/zip") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(uri: str) -> Image.Image:
    assert uri.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


QUICK = {"resolution": 64, "max_train_steps": 4, "train_batch_size": 2, "seed": 0, "unet_learning_rate": 1e-3}
SMALL = {"prompt": "a photo of TOK", "width": 64, "height": 64, "num_inference_steps": 3, "seed": 0}


def test_a_training_its_tar_and_a_prediction_with_it(trainer: Server, predictor: Server, captioned_zip: Path):
    training = trainer.post({"input_images": data_uri(captioned_zip.read_bytes()), **QUICK}).json()
    assert training["status"] == "succeeded", training
    assert "Training the whole UNet" in training["logs"]
    assert "step/s" in training["logs"]
    assert training["metrics"]["step"] == 4
    assert training["metrics"]["loss"] > 0
    tar = training["output"]
    assert tar.startswith("data:application/x-tar;base64,")

    base = predictor.post(SMALL).json()
    tuned = predictor.post({**SMALL, "replicate_weights": tar}).json()
    again = predictor.post(SMALL).json()
    assert [answer["status"] for answer in (base, tuned, again)] == ["succeeded"] * 3, tuned
    assert picture(tuned["output"][0]).size == (64, 64)
    assert "<s0><s1>" in tuned["logs"]
    assert tuned["output"] != base["output"]
    assert again["output"] == base["output"]


def test_pictures_of_several_shapes_go_from_the_preprocessor_through_a_training(
    trainer: Server, tmp_path: Path
):
    sizes = {"wide": (320, 160), "tall": (160, 320), "square": (256, 256)}
    files = {f"{name}.png": png(i, size) for i, (name, size) in enumerate(sizes.items())}
    texts = {f"{name}.txt": f"a {name} TOK" for name in sizes}
    raw = write_zip(tmp_path / "raw.zip", files | texts)
    with serve(tmp_path / "workspace", "preprocess.py:Preprocessor") as preprocessor:
        served = preprocessor.get("openapi.json")["components"]["schemas"]["Input"]
        assert served["required"] == ["files"] and "prompt" not in served["properties"]
        assert preprocessor.post({"files": data_uri(b"no zip")}).json()["status"] == "failed"
        inputs = {"files": data_uri(raw.read_bytes()), "target_size": 128, "bucketing": True}
        answer = preprocessor.post(inputs).json()
    assert answer["status"] == "succeeded" and "Advice:" in answer["logs"], answer
    tar = base64.b64decode(answer["output"].split(",", 1)[1])
    with tarfile.open(fileobj=io.BytesIO(tar)) as members:
        names = set(members.getnames())
        assert {"0.src.png", "captions.csv", "contact_sheet.jpg", "advice.txt"} <= names
        shapes = set()
        for name in ("0.src.png", "1.src.png", "2.src.png"):
            member = members.extractfile(name)
            assert member is not None
            shapes.add(Image.open(io.BytesIO(member.read())).size)
    assert len(shapes) == 3
    quick = QUICK | {"resolution": 128, "bucketing": True, "max_train_steps": 6}
    training = trainer.post({"input_images": data_uri(tar, "application/x-tar"), **quick}).json()
    assert training["status"] == "succeeded" and training["metrics"]["step"] == 6, training


def test_weights_given_at_start_serve_requests_that_name_none(
    trainer: Server, predictor: Server, captioned_zip: Path, tmp_path: Path
):
    training = trainer.post({"input_images": data_uri(captioned_zip.read_bytes()), **QUICK}).json()
    tar = tmp_path / "trained_model.tar"
    tar.write_bytes(base64.b64decode(training["output"].split(",", 1)[1]))
    expected = predictor.post({**SMALL, "replicate_weights": str(tar)}).json()["output"]
    with serve(tmp_path / "workspace", "predict.py:Predictor", weights=str(tar)) as tuned:
        assert tuned.post(SMALL).json()["output"] == expected


def test_the_committed_schema_is_served(trainer: Server, predictor: Server):
    committed = json.loads((REPOSITORY / ".cog" / "openapi_schema.json").read_text())["components"]["schemas"]
    served = predictor.get("openapi.json")["components"]["schemas"]
    assert served["Input"] == committed["Input"]
    assert trainer.get("openapi.json")["components"]["schemas"]["TrainingInput"] == committed["TrainingInput"]


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({"num_outputs": 5}, "num_outputs"),
        ({"num_inference_steps": "many"}, "num_inference_steps"),
        ({"scheduler": "EULER"}, "scheduler"),
        ({"guidance_scale": 0.1}, "guidance_scale"),
    ],
)
def test_bad_prediction_inputs_answer_422(predictor: Server, inputs: dict, field: str):
    answer = predictor.post({**SMALL, **inputs})
    assert answer.status_code == 422
    assert field in json.dumps(answer.json()["detail"])


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({"max_train_steps": 0}, "max_train_steps"),
        ({"lr_scheduler": "wave"}, "lr_scheduler"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_bad_training_inputs_answer_422(trainer: Server, inputs: dict, field: str):
    answer = trainer.post({**QUICK, **inputs})
    assert answer.status_code == 422
    assert field in json.dumps(answer.json()["detail"])


def test_failed_jobs_say_what_to_do(trainer: Server, predictor: Server):
    failed = trainer.post({"input_images": data_uri(b"no archive"), **QUICK}).json()
    assert failed["status"] == "failed"
    assert "neither a zip nor a tar archive: pack the files" in failed["error"]
    failed = trainer.post(QUICK).json()
    assert "input_images is missing" in failed["error"]
    failed = predictor.post({**SMALL, "width": 100}).json()
    assert failed["status"] == "failed"
    assert "width is 100, but must be a multiple of 8" in failed["error"]
    assert predictor.post(SMALL).json()["status"] == "succeeded"


def test_a_training_is_cancelled_within_two_seconds(trainer: Server, captioned_zip: Path):
    inputs = {**QUICK, "input_images": data_uri(captioned_zip.read_bytes()), "max_train_steps": 100_000}
    body = {"id": "long", "input": inputs}
    url = f"{trainer.url}/trainings/long"
    started = requests.put(url, json=body, headers={"Prefer": "respond-async"}, timeout=10)
    assert started.status_code == 202
    deadline = time.monotonic() + 60
    while requests.put(url, json=body, timeout=10).json().get("metrics", {}).get("step", 0) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    asked = time.monotonic()
    assert requests.post(f"{url}/cancel", timeout=10).status_code == 200
    while trainer.get("health-check")["status"] != "READY":
        assert time.monotonic() - asked < 2, "the stop request was not answered in time"
        time.sleep(0.05)
    assert trainer.post({**inputs, "max_train_steps": 2}).json()["status"] == "succeeded"


def test_an_archive_may_come_from_a_url(trainer: Server, captioned_zip: Path, tmp_path: Path):
    shutil.copy(captioned_zip, tmp_path / "data.zip")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(50):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        answer = trainer.post({**QUICK, "input_images": f"http://127.0.0.1:{port}/data.zip"}).json()
        assert answer["status"] == "succeeded", answer
        answer = trainer.post({**QUICK, "input_images": f"http://127.0.0.1:{port}/missing.zip"})
        assert "404" in answer.text
    finally:
        files.kill()
        files.wait()
