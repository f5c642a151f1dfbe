"""The server of the page: on this machine only, for pages of its own only.

Other sites in the same browser can send requests to 127.0.0.1 too, so requests that come from them are refused, and names
that merely point here. What the page may load is limited to this server. Knows addresses and headers; does not know the page.
"""

from urllib.parse import urlsplit

import gradio
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdxl.studio import files
from sdxl.studio.page import HEAD, THEME, build
from sdxl.studio.shared import Studio

HOST = "127.0.0.1"
MAX_FILE_SIZE = 1 << 30
"""Bytes of one uploaded file. The entry points bound what is in it."""
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
"""Gradio needs inline scripts. Nothing may come from or go to another server."""


class OwnPagesOnly:
    """Refuses requests under other names than this machine's, and from pages of other sites; sends the policy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if urlsplit(f"//{host}").hostname not in (HOST, "localhost") or origin not in (
            None,
            f"http://{host}",
        ):
            if scope["type"] == "http":
                await PlainTextResponse("Open the studio by its own address.", status_code=403)(
                    scope, receive, send
                )
            return

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                told = MutableHeaders(scope=message)
                told["Content-Security-Policy"] = _POLICY
                told["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await self._app(scope, receive, with_policy)


def make_app(studio: Studio) -> FastAPI:
    """The page, and the files of trainings."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get(files.ROUTE)
    def file(request: Request) -> Response:
        return files.answer(studio.projects, request)

    app = gradio.mount_gradio_app(
        app,
        build(studio).queue(default_concurrency_limit=8),
        "/",
        server_name=HOST,
        footer_links=[],
        show_error=False,
        max_file_size=MAX_FILE_SIZE,
        # The tabs show pictures from here; Gradio refuses names that begin with a dot.
        allowed_paths=[str(studio.projects.folder.absolute())],
        ssr_mode=False,
        theme=THEME,
        head=HEAD,
    )
    app.add_middleware(OwnPagesOnly)
    return app


def serve(studio: Studio, port: int) -> None:
    """Serve the page until Ctrl-C or SIGTERM. Open tabs hold connections, which are not waited for."""
    uvicorn.run(make_app(studio), host=HOST, port=port, log_level="warning", timeout_graceful_shutdown=1)
