"""A stand-in for the Hugging Face hub on this machine, for its real client: who one is, new repositories, and commits.

What it imitates was read in huggingface_hub's source. Small files come in the commit, large ones through Git LFS before it.
"""

import base64
import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test"


@dataclass(kw_only=True)
class Repository:
    """A repository, with the files of its last commit."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


class Hub(ThreadingHTTPServer):
    """The user "owner" of the organisation "team" has the only token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.role = "write"
        """Of the token."""
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        """SHA-256 → content, of large files."""
        self.answers: dict[str, int] = {}
        """Part of a path → the status that requests to it get."""
        self.requests: list[str] = []
        """Method and path of each request."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.is_refused(signed=True):
            return None
        if self.path == "/api/whoami-v2":
            token = {"accessToken": {"role": self.server.role}}
            return self.answer({"name": "owner", "orgs": [{"name": "team"}], "auth": token})
        name = "/".join(self.path.split("/")[3:5])
        if name not in self.server.repositories:
            return self.answer({"error": "Repository not found"}, 404, code="RepoNotFound")
        if self.path.endswith("/auth-check/write") and self.server.role != "write":
            return self.answer({"error": "no"}, 403)
        return self.answer({"id": name, "siblings": [], "sha": "0" * 40})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.is_refused(signed=True):
            return None
        told = [json.loads(line) for line in body.splitlines()]
        if self.path == "/api/repos/create":
            return self.create(told[0])
        if "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in told[0]["files"]
            ]
            return self.answer({"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.server.address}/store/{one['oid']}"}}}
                for one in told[0]["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" not in self.path:  # the client asks for a check of the card's header
            return self.answer({"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        kept = self.server.repositories[name].files
        for line in told:
            value = line["value"]
            if line["key"] == "file":
                kept[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                kept[value["path"]] = self.server.stored[value["oid"]]
        url = f"{self.server.address}/{name}/commit/0"
        return self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.is_refused(signed=False):
            return
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.stored[oid] = content
        self.answer({})

    def create(self, wanted: dict[str, Any]) -> None:
        owner = wanted.get("organization") or "owner"
        name = f"{owner}/{wanted['name']}"
        if owner not in ("owner", "team") or self.server.role != "write":
            return self.answer({"error": "no"}, 403)
        if name in self.server.repositories:
            return self.answer({"error": "exists", "url": f"{self.server.address}/{name}"}, 409)
        is_private = wanted.get("private") is True or wanted.get("visibility") == "private"
        self.server.repositories[name] = Repository(private=is_private)
        return self.answer({"url": f"{self.server.address}/{name}"})

    def is_refused(self, *, signed: bool) -> bool:
        """Note the request, and answer it if it lacks the token or `answers` says so."""
        self.server.requests.append(f"{self.command} {self.path}")
        status = next((code for part, code in self.server.answers.items() if part in self.path), 0)
        if signed and self.headers["Authorization"] != f"Bearer {TOKEN}":
            status = 401
        if status:
            self.answer({"error": "Invalid credentials in Authorization header"}, status)
        return bool(status)

    def answer(self, content: dict[str, Any], status: int = 200, *, code: str = "") -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass
