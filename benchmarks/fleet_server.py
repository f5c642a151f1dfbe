"""A fleet on this machine, as `serve run deploy/serve.yaml` starts it: smaller, in a folder of its own, and ended for sure.

Knows Ray's command line and processes; does not import Ray.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import yaml

from benchmarks.serving import family, free_port

REPOSITORY = Path(__file__).parent.parent
CONFIG = REPOSITORY / "deploy" / "serve.yaml"
SECONDS = 600
"""The longest wait for a fleet to start or to change."""
NOT_NICE = {"RAY_worker_niceness": "0"}
"""Lets Ray's processes run like others. By default they give way to all others of a busy machine."""
_LAUNCH = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
"""Runs a program that the system kills when its parent ends, however that ends (PR_SET_PDEATHSIG in Linux' prctl.h).
Ray's processes end with it."""


@dataclass
class Fleet:
    """A running fleet."""

    folder: Path
    process: subprocess.Popen
    environment: dict[str, str]
    config: dict[str, Any]
    url: str = field(init=False)

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.config['http_options']['port']}"

    @property
    def log(self) -> str:
        """What the fleet has logged so far."""
        return (self.folder / "fleet.log").read_text(errors="replace")

    def draw(self, inputs: dict[str, Any], *, seconds: float = SECONDS) -> requests.Response:
        """Send a request and wait for its answer.

        Raises:
            requests.RequestException: there is no answer, or none in time.
        """
        return requests.post(f"{self.url}/predictions", json={"input": inputs}, timeout=seconds)

    def painters(self) -> list[int]:
        """The ids of the processes that draw."""
        found = []
        for pid in family(self.process):
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{pid}/cmdline").read_bytes()
                if title.startswith(b"ray::ServeReplica:sdxl:Painters"):
                    found.append(pid)
        return found

    def replicas(self) -> int:
        """How many replicas can draw; 0 while none answers."""
        with contextlib.suppress(requests.RequestException, ValueError, KeyError):
            return requests.get(f"{self.url}/health-check", timeout=30).json()["replicas"]
        return 0

    def wait_for(self, replicas: int) -> None:
        """Wait until so many replicas can draw.

        Raises:
            TimeoutError: they do not come, or the fleet has ended.
        """
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            # The processes first: for a while after one dies, Ray still counts it.
            if len(self.painters()) == replicas and self.replicas() == replicas:
                return
            if "Deploying app 'sdxl' failed" in self.log:
                break
            time.sleep(0.2)
        raise TimeoutError(f"there are not {replicas} replicas:\n{self.log[-3000:]}")

    def update(self, **args: Any) -> None:
        """Deploy the application with other `args`: Ray replaces the replicas one after another. Does not wait."""
        self.config["applications"][0]["args"] |= args
        found = re.search(r"dashboard at \S*?(http://[\d.]+:\d+)", self.log)
        assert found is not None, "Ray's log names its dashboard"
        command = ["deploy", str(write_config(self.folder, self.config)), "-a", found[1]]
        subprocess.run(serve(*command), env=self.environment, check=True, capture_output=True)

    def metrics(self) -> str:
        """What Prometheus would read."""
        listed = Path(self.environment["RAY_TMPDIR"]) / "ray" / "prom_metrics_service_discovery.json"
        targets = [target for entry in yaml.safe_load(listed.read_text()) for target in entry["targets"]]
        return "\n".join(requests.get(f"http://{target}/metrics", timeout=30).text for target in targets)


def serve(*arguments: str) -> list[str]:
    """Ray's command `serve` of this environment."""
    return [str(Path(sys.executable).parent / "serve"), *arguments]


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def small_config(replicas: int, **args: Any) -> dict[str, Any]:
    """deploy/serve.yaml for a machine without GPUs: a fixed number of replicas, and other `args` of the application."""
    config = yaml.safe_load(CONFIG.read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
    [application] = config["applications"]
    application["args"] |= args
    painters = next(one for one in application["deployments"] if one["name"] == "Painters")
    painters["ray_actor_options"] = {"num_gpus": 0, "num_cpus": 0.1}
    painters["autoscaling_config"] |= {"min_replicas": replicas, "max_replicas": replicas}
    return config


@contextlib.contextmanager
def running_fleet(
    folder: Path, environment: dict[str, str], *, replicas: int, **args: Any
) -> Iterator[Fleet]:
    """A fleet of miniatures whose files are in `folder`; `args` are those of the application."""
    config = small_config(replicas, **args)
    folder.mkdir(parents=True, exist_ok=True)
    with ray_environment() as of_ray:
        environment = of_ray | environment | {"PYTHONPATH": str(REPOSITORY)}
        with (folder / "fleet.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCH, *serve("run", str(write_config(folder, config)))],
                cwd=REPOSITORY,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        fleet = Fleet(folder, process, environment, config)
        try:
            fleet.wait_for(replicas)
            yield fleet
        finally:
            for pid in family(process):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def ray_environment() -> Iterator[dict[str, str]]:
    """This process' environment, in which Ray keeps its files in a folder that is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # not a test's: paths of sockets may have 107 characters
    (folder / "token").write_text(secrets.token_hex(32))  # else Ray keeps one in the home folder
    try:
        yield os.environ | {
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
