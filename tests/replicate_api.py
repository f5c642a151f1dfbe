"""A stand-in for Replicate's HTTP API on this machine, for the real Python client. It forwards to real Cog servers.

What it imitates was seen from the client: files, models' versions, predictions, and trainings with a destination and webhooks.
"""

import base64
import email.parser
import http.server
import itertools
import json
import re
import threading
from dataclasses import dataclass, field
from typing import Any

import requests


@dataclass(kw_only=True)
class Version:
    """A version of a model: a running Cog server, and the weights that each request names."""

    server: str
    """The address of the Cog server."""
    kind: str = "predictions"
    """Or "trainings"."""
    trains: "Version | None" = None
    """The server that trainings of this version run on."""
    weights: str = ""


@dataclass(kw_only=True)
class Replicate:
    """The state of the service."""

    versions: dict[str, Version]
    """"owner/name:version" → version."""
    destinations: set[str]
    """Models that exist, to train into."""
    url: str = ""
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """Path → media type and content."""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def keep(self, content: bytes, kind: str, name: str) -> str:
        """Keep a file; return its URL."""
        path = f"/files/{next(self.numbers)}/{name}"
        self.files[path] = kind, content
        return self.url + path

    def job(self, kind: str, model: str, version: str, given: dict[str, Any]) -> dict[str, Any]:
        """A new prediction or training, as the API tells it."""
        identifier = f"job{next(self.numbers)}"
        urls = {
            "get": f"{self.url}/v1/{kind}/{identifier}",
            "cancel": f"{self.url}/v1/{kind}/{identifier}/cancel",
        }
        told = {
            "id": identifier,
            "model": model,
            "version": version,
            "status": "starting",
            "input": given["input"],
        }
        self.jobs[identifier] = told | {
            "output": None,
            "logs": "",
            "error": None,
            "metrics": None,
            "destination": given.get("destination"),
            "webhook": given.get("webhook"),
            "created_at": "2026-01-01T00:00:00Z",
            "started_at": None,
            "completed_at": None,
            "urls": urls,
        }
        return self.jobs[identifier]

    def run(self, job: dict[str, Any], version: Version) -> None:
        """Run a job on its Cog server to its end."""
        job["status"] = "processing"
        given = ({"replicate_weights": version.weights} if version.weights else {}) | job["input"]
        answer = requests.put(f"{version.server}/{version.kind}/{job['id']}", json={"input": given})
        told = answer.json()
        if answer.status_code == 422:
            told = {"status": "failed", "error": json.dumps(told["detail"])}
        output = self._kept(told.get("output"))
        if version.kind == "trainings" and told["status"] == "succeeded":
            destination = f"{job['destination']}:{job['id']}"
            trained = next(v for v in self.versions.values() if v.trains is version)
            self.versions[destination] = Version(server=trained.server, weights=output)
            output = {"version": destination, "weights": output}
        job |= {"output": output, "logs": told.get("logs", ""), "error": told.get("error")}
        job |= {
            "metrics": told.get("metrics"),
            "completed_at": "2026-01-01T00:01:00Z",
            "status": told["status"],
        }
        if job["webhook"]:
            requests.post(job["webhook"], json=job)

    def _kept(self, output: Any) -> Any:
        """Cog's output with URLs instead of its `data:` URIs."""
        if isinstance(output, list):
            return [self._kept(one) for one in output]
        found = re.fullmatch(r"data:([^;,]*);base64,(.*)", output or "", re.DOTALL)
        if not found:
            return output
        name = "trained_model.tar" if "tar" in found[1] else "out.png"
        return self.keep(base64.b64decode(found[2]), found[1], name)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the client's requests."""

    service: Replicate
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path in self.service.files:
            kind, content = self.service.files[self.path]
            return self._answer(200, content, kind)
        if job := re.fullmatch(r"/v1/(?:predictions|trainings)/(\w+)", self.path):
            return self._tell(200, self.service.jobs[job[1]])
        if found := re.fullmatch(r"/v1/models/([\w-]+/[\w-]+)/versions/(\w+)", self.path):
            version = self.service.versions.get(f"{found[1]}:{found[2]}")
            if version is not None:
                schema = requests.get(f"{version.server}/openapi.json").json()
                about = {"id": found[2], "created_at": "2026-01-01T00:00:00Z", "cog_version": "0.23.1"}
                return self._tell(200, about | {"openapi_schema": schema})
        return self._tell(404, {"detail": "The requested resource could not be found.", "status": 404})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        service = self.service
        if self.path == "/v1/files":
            return self._tell(201, self._file(body))
        if cancelled := re.fullmatch(r"/v1/trainings/(\w+)/cancel", self.path):
            job = service.jobs[cancelled[1]]
            trainer = next(v.trains for v in service.versions.values() if v.trains)
            requests.post(f"{trainer.server}/trainings/{job['id']}/cancel")
            return self._tell(200, job)
        given = json.loads(body)
        if self.path == "/v1/predictions":
            model = next(name for name in service.versions if name.endswith(f":{given['version']}"))
            job = service.job("predictions", model.partition(":")[0], given["version"], given)
            service.run(job, service.versions[model])
            return self._tell(201, job)
        if found := re.fullmatch(r"/v1/models/([\w-]+/[\w-]+)/versions/(\w+)/trainings", self.path):
            trainer = service.versions[f"{found[1]}:{found[2]}"].trains
            if given["destination"] not in service.destinations or trainer is None:
                detail = f"The specified training destination {given['destination']} does not exist"
                return self._tell(404, {"detail": detail, "status": 404})
            job = service.job("trainings", found[1], found[2], given)
            threading.Thread(target=service.run, args=(job, trainer), daemon=True).start()
            return self._tell(201, job)
        return self._tell(404, {"detail": "The requested resource could not be found.", "status": 404})

    def _file(self, body: bytes) -> dict[str, Any]:
        """Keep the part `content` of a form."""
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parts = email.parser.BytesParser().parsebytes(head + body).get_payload()
        assert isinstance(parts, list)
        part: Any = next(p for p in parts if p.get_param("name", header="content-disposition") == "content")
        content, name = part.get_payload(decode=True), part.get_filename()
        url = self.service.keep(content, part.get_content_type(), name)
        return {
            "id": url.rpartition("/")[2],
            "name": name,
            "content_type": part.get_content_type(),
            "size": len(content),
            "etag": "",
            "checksums": {},
            "metadata": {},
            "created_at": "2026-01-01T00:00:00Z",
            "expires_at": None,
            "urls": {"get": url},
        }

    def _tell(self, status: int, told: dict[str, Any]) -> None:
        self._answer(status, json.dumps(told).encode(), "application/json")

    def _answer(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass
