"""Real Cog servers of the entry points, on free ports of this machine, and what talks with them."""

import base64
import http.server
import io
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from tests.conftest import REPOSITORY, TINY_BASE, free_port
from tools import cog_schema

ENTRY_POINTS = {
    "preprocess": "preprocess.py:Preprocessor",
    "train": "train.py:train",
    "predict": "predict.py:Predictor",
}
SMALL = {"prompt": "a photo of TOK", "width": 64, "height": 64, "num_inference_steps": 3, "seed": 0}
LONG = {"width": 256, "height": 256, "num_inference_steps": 500, "num_outputs": 4}
"""A request that takes minutes."""


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
def serve(workspace: Path, name: str, **environment: str) -> Iterator[Server]:
    """Start the server as `make serve`, `make serve-train` and `make serve-preprocess` do, on a free port."""
    port = free_port()
    train, folder = name == "train", workspace.parent / "server"
    config = "cog.preprocess.yaml" if name == "preprocess" else "cog.yaml"
    assert cog_schema.main(["--config", str(REPOSITORY / config), "--folder", str(folder)]) == 0
    settings = {
        **os.environ,
        "COG_TRAIN_TYPE_STUB" if train else "COG_PREDICT_TYPE_STUB": f"{REPOSITORY}/{ENTRY_POINTS[name]}",
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


def data_uri(content: bytes, kind: str = "application/zip") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(uri: str) -> Image.Image:
    assert uri.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


class Webhook(http.server.BaseHTTPRequestHandler):
    """Takes what a server tells about its jobs."""

    events: queue.Queue[dict[str, Any]] = queue.Queue()

    def do_POST(self) -> None:
        self.events.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


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
