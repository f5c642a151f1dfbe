"""A server that keeps what is put there, as object storage does behind signed URLs."""

import http.server
from typing import Any


class Bucket(http.server.ThreadingHTTPServer):
    """Keeps what is put, and answers as it is told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.kept: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.answers: list[int] = []
        """Statuses of the next requests, in their order; 0 hangs up in the middle. Then 200."""
        self.posted, self.answer_to_post = "", "<Result/>"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Any
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        server, size = self.server, int(self.headers.get("Content-Length", 0))
        wanted = self.headers.get("Content-Range", "")
        server.requests.append((self.command, self.path, wanted))
        path = self.path.partition("?")[0]
        if wanted.startswith("bytes */"):
            so_far = len(server.kept.get(path, b""))
            return self._answer(308, {"Range": f"bytes=0-{so_far - 1}"} if so_far else {})
        status = server.answers.pop(0) if server.answers else 200
        body = self.rfile.read(size if status else size // 2)
        begin = int(wanted.split()[1].partition("-")[0]) if wanted else 0
        server.kept[path] = server.kept.get(path, b"")[:begin] + body
        if not status:
            self.close_connection = True
            return None
        return self._answer(status, {"ETag": f'"tag of {path}"'})

    def do_POST(self) -> None:
        self.server.posted = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self._answer(200, {}, self.server.answer_to_post.encode())

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
