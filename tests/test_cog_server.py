"""Both entry points behind the real Cog server, driven over HTTP with the miniature."""

import base64
import http.server
import io
import json
import os
import queue
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from tests.bucket import Bucket
from tests.conftest import QUICK, REPOSITORY, TINY_BASE, free_port, png, write_zip
from tools import cog_schema


class Server:
    """A Cog server that was started."""

    def __init__(self, port: int, what: str, process: subprocess.Popen, log: Path) -> None:
        self.process, self.log = process, log
        self.url = f"http://127.0.0.1:{port}"
        self.what = what  # "predictions" or "trainings"

    def wait_until(self, wanted: str) -> None:
        """Wait while the server starts, until its health is `wanted`."""
        while self.process.poll() is None:
            try:
                status = self.get("health-check")["status"]
            except requests.RequestException:
                status = "none yet"
            if status == wanted:
                return
            assert status in ("none yet", "STARTING"), self.log.read_text()
            time.sleep(0.1)
        pytest.fail(f"the server ended:\n{self.log.read_text()}")

    def post(self, inputs: dict[str, Any]) -> requests.Response:
        """Run a job to its end. The server answers 409 until it has cleared up after the job before."""
        while True:
            answer = requests.post(f"{self.url}/{self.what}", json={"input": inputs})
            if answer.status_code != 409:
                return answer
            time.sleep(0.1)

    def workers(self) -> list[int]:
        """The processes that the server started."""
        listed = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for children in listed for pid in children.read_text().split()]

    def get(self, path: str) -> Any:
        return requests.get(f"{self.url}/{path}").json()


@contextmanager
def serve(workspace: Path, entry_point: str, **environment: str) -> Iterator[Server]:
    """Start the server as `make serve`, `make serve-train` and `make serve-preprocess` do, on a free port."""
    port = free_port()
    train, folder = entry_point == "train.py:train", workspace.parent / "server"
    config = "cog.preprocess.yaml" if entry_point == "preprocess.py:Preprocessor" else "cog.yaml"
    assert cog_schema.main(["--config", str(REPOSITORY / config), "--folder", str(folder)]) == 0
    settings = {
        **os.environ,
        "COG_TRAIN_TYPE_STUB" if train else "COG_PREDICT_TYPE_STUB": f"{REPOSITORY}/{entry_point}",
        "PYTHONPATH": str(REPOSITORY),
        "PORT": str(port),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SDXL_BASE": str(TINY_BASE),
        "SDXL_WORKSPACE": str(workspace),
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    command = [sys.executable, "-m", "cog.server.http", *(["--x-mode", "train"] if train else [])]
    log = workspace.parent / "server.log"
    with log.open("wb") as opened:
        process = subprocess.Popen(
            command, cwd=folder, env=settings, stdout=opened, stderr=opened, start_new_session=True
        )
    try:
        yield Server(port, "trainings" if train else "predictions", process, log)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    workspace = tmp_path_factory.mktemp("trainer") / "workspace"
    opened = {"SDXL_PRIVATE_URLS": "1", "SDXL_INPUTS": str(workspace.parent / "inputs")}
    with serve(workspace, "train.py:train", **opened) as server:
        server.wait_until("READY")
        yield server


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("predictor") / "workspace", "predict.py:Predictor") as server:
        server.wait_until("READY")
        yield server


def data_uri(content: bytes, kind: str = "application/zip") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(uri: str) -> Image.Image:
    assert uri.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


SMALL = {"prompt": "a photo of TOK", "width": 64, "height": 64, "num_inference_steps": 3, "seed": 0}
LONG = {"width": 256, "height": 256, "num_inference_steps": 500, "num_outputs": 4}


def test_a_training_its_tar_and_a_prediction_with_it(trainer: Server, predictor: Server, captioned_zip: Path):
    training = trainer.post({"input_images": data_uri(captioned_zip.read_bytes()), **QUICK}).json()
    assert training["status"] == "succeeded", training
    assert "Training a LoRA of rank 16" in training["logs"]
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


def test_a_result_that_is_too_large_goes_to_a_signed_url(
    trainer: Server, captioned_zip: Path, bucket: Bucket, tmp_path: Path
):
    given = {"input_images": data_uri(captioned_zip.read_bytes()), **QUICK}
    bucket.answers = [403]
    failed = trainer.post({**given, "upload_url": f"{bucket.url}/m.tar?secret"}).json()
    assert failed["status"] == "failed" and failed["error"].endswith(
        "trained_model.tar is kept on the server."
    )
    assert "secret" not in failed["error"] + failed["logs"]
    done = trainer.post({**given, "upload_url": f"{bucket.url}/m.tar?secret"}).json()
    assert (done["status"], done["output"]) == ("succeeded", f"{bucket.url}/m.tar")
    (tmp_path / "m.tar").write_bytes(bucket.kept["/m.tar"])
    with tarfile.open(tmp_path / "m.tar") as tar:
        assert {"lora.safetensors", "embeddings.pti", "training.json"} <= set(tar.getnames())
        assert b"secret" not in b"".join(tar.extractfile(m).read() for m in tar if m.name.endswith(".json"))  # type: ignore[union-attr]
    pushed = trainer.post({**given, "push_to": "owner/name"}).json()["error"]
    assert "push_to is not opened for that owner on this server" in pushed
    assert (
        "upload_url must be an http(s) URL" in trainer.post({**given, "upload_url": "here"}).json()["error"]
    )


def test_pictures_of_several_shapes_go_from_the_preprocessor_through_a_training(
    trainer: Server, tmp_path: Path
):
    sizes = {"wide": (320, 160), "tall": (160, 320), "square": (256, 256)}
    files = {f"{name}.png": png(i, size) for i, (name, size) in enumerate(sizes.items())}
    texts = {f"{name}.txt": f"a {name} TOK" for name in sizes}
    raw = write_zip(tmp_path / "raw.zip", files | texts)
    with serve(tmp_path / "workspace", "preprocess.py:Preprocessor") as preprocessor:
        preprocessor.wait_until("READY")
        served = preprocessor.get("openapi.json")["components"]["schemas"]["Input"]
        assert served["required"] == ["files"] and "prompt" not in served["properties"]
        assert preprocessor.post({"files": data_uri(b"no zip")}).json()["status"] == "failed"
        missing = preprocessor.post({})
        assert missing.status_code == 422 and "files" in json.dumps(missing.json()["detail"])
        assert "files is missing: give" in preprocessor.post({"files": ""}).json()["error"]
        inputs = {"files": data_uri(raw.read_bytes()), "target_size": 128.0, "bucketing": True}
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


class Webhook(http.server.BaseHTTPRequestHandler):
    """Takes what a server tells about its jobs."""

    events: queue.Queue[dict[str, Any]] = queue.Queue()

    def do_POST(self) -> None:
        self.events.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


def test_a_server_from_its_setup_to_its_end(predictor: Server, fine_tunes: dict[str, Path], tmp_path: Path):
    """During setup it says so. Weights given at start serve requests that name none. SIGTERM stops a job that a client waits for."""
    weights = data_uri(fine_tunes["lora"].read_bytes(), "application/x-tar")
    expected = predictor.post({**SMALL, "replicate_weights": weights}).json()["output"]
    asked, answered = threading.Event(), threading.Event()

    class Weights(Webhook):
        events: queue.Queue[dict[str, Any]] = queue.Queue()

        def do_GET(self) -> None:
            asked.set()
            answered.wait()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(fine_tunes["lora"].read_bytes())

    with (
        http_server(Weights) as url,
        serve(tmp_path / "workspace", "predict.py:Predictor", COG_WEIGHTS=f"{url}/lora.tar") as server,
        ThreadPoolExecutor() as background,
    ):
        asked.wait()
        assert server.get("health-check")["status"] == "STARTING"
        assert requests.post(f"{server.url}/predictions", json={"input": SMALL}).status_code == 503
        answered.set()
        server.wait_until("READY")
        assert server.post(SMALL).json()["output"] == expected
        results = list((tmp_path / "workspace").iterdir())

        body = {"input": {**SMALL, **LONG}, "webhook": f"{url}/told"}
        job = background.submit(requests.post, f"{server.url}/predictions", json=body)
        while "Seed: 0" not in Weights.events.get().get("logs", ""):
            pass
        server.process.terminate()
        answer = job.result().json()
        assert answer["status"] == "canceled", answer
        assert server.process.wait() == 0
    assert list((tmp_path / "workspace").iterdir()) == results


def test_strangers_reach_neither_the_servers_files_nor_its_network(
    trainer: Server, predictor: Server, captioned_zip: Path
):
    picture = str(REPOSITORY / "docs" / "demo.jpg")
    local = f"{predictor.url}/health-check"
    for server, inputs in (
        (predictor, {**SMALL, "image": picture}),
        (predictor, {**SMALL, "image": f"file://{picture}"}),
        (predictor, {**SMALL, "image": picture, "mask": picture}),
        (predictor, {**SMALL, "replicate_weights": str(captioned_zip)}),
        (predictor, {**SMALL, "extra_lora": [str(captioned_zip)]}),
        (trainer, {**QUICK, "input_images": str(captioned_zip)}),
        (trainer, {**QUICK, "input_data_tar_or_zip": str(captioned_zip)}),
    ):
        answer = server.post(inputs).json()
        assert answer["status"] == "failed", answer
        assert "this server takes no paths" in answer["error"]
    for name in ("replicate_weights", "image", "mask"):
        answer = predictor.post({**SMALL, name: local}).json()
        assert answer["status"] == "failed"
        assert "not an address on the public internet" in answer["error"]
    assert predictor.post(SMALL).json()["status"] == "succeeded"


def test_a_request_without_enough_memory_is_told_and_the_next_one_is_right(predictor: Server):
    expected = predictor.post(SMALL).json()["output"]
    large = {**SMALL, "width": 2048, "height": 2048, "num_inference_steps": 1}
    [worker] = predictor.workers()
    addresses = re.search(r"VmSize:\s+(\d+)", Path(f"/proc/{worker}/status").read_text())
    assert addresses is not None
    most = int(addresses[1]) * 1024 + 60 * 10**6
    before = resource.prlimit(worker, resource.RLIMIT_AS, (most, -1))
    try:
        answer = predictor.post(large).json()
    finally:
        resource.prlimit(worker, resource.RLIMIT_AS, before)
    assert answer["error"].endswith(
        "This machine has too little free memory for this run: choose a smaller width and height, or fewer num_outputs, "
        "or free memory that other programs hold."
    )
    assert predictor.post(SMALL).json()["output"] == expected


def test_the_schema_of_the_sources_is_served(trainer: Server, predictor: Server):
    expected = cog_schema.build(REPOSITORY / "cog.yaml")["components"]["schemas"]
    served = predictor.get("openapi.json")["components"]["schemas"]
    assert served["Input"] == expected["Input"]
    assert trainer.get("openapi.json")["components"]["schemas"]["TrainingInput"] == expected["TrainingInput"]


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({"num_outputs": 5}, "num_outputs"),
        ({"num_inference_steps": "many"}, "num_inference_steps"),
        ({"scheduler": "EULER"}, "scheduler"),
        ({"guidance_scale": -0.1}, "guidance_scale"),
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


def test_json_is_read_as_meant(predictor: Server, trainer: Server):
    """A whole number may have a point, and an empty text is no file."""
    expected = predictor.post(SMALL).json()["output"]
    numbers = {"width": 64.0, "num_inference_steps": 3.0, "seed": 0.0, "num_outputs": 1.0}
    nothing = {"image": "", "mask": "", "replicate_weights": "", "extra_lora": [""]}
    answer = predictor.post({**SMALL, **numbers, **nothing}).json()
    assert answer["status"] == "succeeded", answer
    assert answer["output"] == expected
    answer = trainer.post({**QUICK, "resolution": 64.0, "max_train_steps": 4.0, "input_images": ""}).json()
    assert "input_images is missing: give" in answer["error"]


def test_failed_jobs_say_what_to_do(trainer: Server, predictor: Server):
    failed = trainer.post({"input_images": data_uri(b"\0no archive"), **QUICK}).json()
    assert failed["status"] == "failed"
    assert "neither a zip nor a tar archive: pack the files" in failed["error"]
    failed = trainer.post(QUICK).json()
    assert "input_images is missing" in failed["error"]
    failed = predictor.post({**SMALL, "width": 100}).json()
    assert failed["status"] == "failed"
    assert "width is 100, but must be a multiple of 8" in failed["error"]
    assert predictor.post(SMALL).json()["status"] == "succeeded"


@contextmanager
def http_server(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a server in a thread of this process."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_cancelled_training_stops_and_the_server_goes_on(trainer: Server, captioned_zip: Path):
    """The server tells a webhook what happens, in order, so the test needs no clock."""
    events = Webhook.events
    inputs = {**QUICK, "input_images": data_uri(captioned_zip.read_bytes()), "max_train_steps": 100_000}
    url = f"{trainer.url}/trainings/long"
    with http_server(Webhook) as webhook:
        body = {"id": "long", "input": inputs, "webhook": webhook}
        assert requests.put(url, json=body, headers={"Prefer": "respond-async"}).status_code == 202
        while events.get().get("metrics", {}).get("step", 0) < 3:
            pass
        assert requests.post(f"{url}/cancel").status_code == 200
        while (last := events.get())["status"] in ("starting", "processing"):
            pass
    assert last["status"] == "canceled" and "output" not in last, last
    assert last["metrics"]["step"] < 100_000
    assert "The state after step" in last["logs"] or "the run stopped amid a step" in last["logs"]
    assert "input_images is missing" in trainer.post(QUICK).json()["error"]


def test_a_file_of_the_operator_and_the_old_name_of_its_input(trainer: Server, captioned_zip: Path):
    folder = trainer.log.parent / "inputs"
    folder.mkdir()
    shutil.copy(captioned_zip, folder / "pictures.zip")
    answer = trainer.post({**QUICK, "input_data_tar_or_zip": "pictures.zip", "max_train_steps": 2}).json()
    assert answer["status"] == "succeeded", answer
    assert (folder / "pictures.zip").is_file()


def test_an_archive_may_come_from_a_url(trainer: Server, captioned_zip: Path, tmp_path: Path):
    (tmp_path / "www").mkdir()
    shutil.copy(captioned_zip, tmp_path / "www" / "data.zip")
    with http_server(partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))) as url:
        answer = trainer.post({**QUICK, "input_images": f"{url}/data.zip"}).json()
        assert answer["status"] == "succeeded", answer
        answer = trainer.post({**QUICK, "input_images": f"{url}/missing.zip"})
        assert "404" in answer.text
