"""A fleet on Ray Serve: many replicas that draw, each with its own fine-tunes in memory, behind one address.

A request goes to a replica that holds its fine-tune already, if one has a free place. `Gateway` reads and checks
requests, which are JSON over HTTP in the form of Cog's. `Painters` draw them. docs/fleet.md has the rest.

    serve run deploy/serve.yaml
"""

import asyncio
import contextlib
import dataclasses
import logging
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deploy.requests import (
    FAILED,
    LARGEST_BODY,
    Answer,
    RefusedError,
    checked,
    failed,
    fine_tune_of,
    name_of_fine_tune,
    read_request,
)
from sdxl import settings
from sdxl.errors import UserInputError
from sdxl.process import start_logging

log = logging.getLogger(__name__)
http = FastAPI(openapi_url=None)

PAUSES_S = (0.5, 4.0)
"""Seconds before the second and the third try of a request that lost its replica. A request that kills replicas must end."""
LOST = (RayActorError, NodeDiedError, WorkerCrashedError, OutOfMemoryError, ObjectLostError)
"""What Ray says it raises when a replica dies with a request, or with its pictures before they are fetched."""


class FleetSettings(BaseModel):
    """The `args` of the application in a Serve config."""

    model_config = ConfigDict(extra="forbid")

    fine_tunes: int = Field(default=64, ge=1)
    """How many fine-tunes a replica keeps, and is known for. They should fit into `SDXL_CACHE_MEMORY_GB`."""
    by_fine_tune: bool = True
    """Send requests to replicas that hold their fine-tune. false: to any, to compare."""


class _StoppedError(Exception):
    """A load was cancelled. Ray's multiplexer clears up after an Exception, but not after a CancelledError."""


@dataclass
class _Wanted:
    """The fine-tune that a request waits for."""

    source: str
    was_loaded: bool = True


class _Held:
    """A fine-tune that Ray counts as loaded. The weights are in the caches of the painter, on disk and in memory."""

    def __init__(self, held: set[str], name: str) -> None:
        self._held, self._name = held, name
        held.add(name)

    def __del__(self) -> None:  # Ray calls this when it drops the fine-tune
        self._held.discard(self._name)


@serve.deployment(
    ray_actor_options={"num_gpus": 1, "num_cpus": 1},
    max_ongoing_requests=3,  # one is drawn, and the fine-tunes of the next are fetched meanwhile
    max_queued_requests=200,
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 1.5},
    health_check_period_s=10,
    graceful_shutdown_timeout_s=120,
)
class Painters:
    """Draw requests, each replica with a base of its own."""

    def __init__(self, fine_tunes: int) -> None:
        """Load the base. fine_tunes: as in `FleetSettings`."""
        from deploy.drawing import Drawer  # here, so that gateways do without torch

        self._drawer = Drawer()
        self._held: set[str] = set()
        """The fine-tunes that Ray counts as loaded. While it drops one, it may be in here for a moment longer."""
        self._loading = asyncio.Lock()
        # Ray's multiplexer calls `load` in the task of the request, but hands it a name only.
        self._wanted: ContextVar[_Wanted] = ContextVar("wanted")

        async def load(name: str) -> _Held:
            wanted = self._wanted.get()
            wanted.was_loaded = False
            try:
                await self._drawer.fetch(wanted.source)
            except asyncio.CancelledError:
                raise _StoppedError from None
            return _Held(self._held, name)

        self._hold: Any = serve.multiplexed(load, max_num_models_per_replica=fine_tunes)

    def check_health(self) -> None:
        """Ray replaces the replica when this raises."""
        self._drawer.require_health()

    async def draw(self, inputs: dict[str, Any]) -> Answer:
        """Draw a request of checked inputs."""
        source = fine_tune_of(inputs)
        metrics: dict[str, Any] = {"replica": serve.get_replica_context().replica_id.unique_id}
        if source is not None:
            name = serve.get_multiplexed_model_id() or name_of_fine_tune(source)
            try:
                metrics["fine_tune_was_loaded"] = await self._load(name, source)
            except UserInputError as error:
                return dataclasses.replace(failed(error), metrics=metrics)
            except _StoppedError:
                raise asyncio.CancelledError from None
            except Exception:
                log.exception("A fine-tune could not be fetched")
                return Answer(status=500, error=FAILED, metrics=metrics)
        answer = await self._drawer.draw(inputs)
        return dataclasses.replace(answer, metrics=answer.metrics | metrics)

    async def _load(self, name: str, source: str) -> bool:
        """Load a fine-tune, or mark it as used again; whether it was loaded already."""
        wanted = _Wanted(source)
        self._wanted.set(wanted)
        # One load at a time, as in Ray's multiplexer. There, a request that is cancelled in the queue would leave a trace.
        async with contextlib.nullcontext() if name in self._held else self._loading:
            await self._hold(name)
        return wanted.was_loaded


# Above the class: Serve pickles the class where it is defined, with what is there by then.
async def _body(request: Request) -> bytes:
    """The body of a request.

    Raises:
        RefusedError: it is too large.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            limit = LARGEST_BODY >> 20
            raise RefusedError(f"The request has more than {limit} MiB: send large files as URLs.", 413)
    return bytes(body)


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.5})
@serve.ingress(http)
class Gateway:
    """Reads requests, finds them a replica, and tries again if that dies."""

    def __init__(self, painters: DeploymentHandle, by_fine_tune: bool) -> None:
        start_logging()
        settings.set_behind_server(True)
        self._painters, self._by_fine_tune = painters, by_fine_tune

    @http.post("/predictions")
    async def predictions(self, request: Request) -> JSONResponse:
        """Draw pictures: `{"input": {…}}` → `{"status", "output", "error", …}`."""
        name = ""
        try:
            name, given = read_request(await _body(request))
            answer = await self._drawn(name, checked(given))
        except UserInputError as error:
            answer = failed(error)
        headers = {"retry-after": "5"} if answer.status == 503 else None
        return JSONResponse(answer.as_json(name), status_code=answer.status, headers=headers)

    @http.get("/health-check")
    async def health(self) -> JSONResponse:
        """200 and READY if a replica can draw; 503 and STARTING otherwise."""
        context = serve.get_replica_context()
        status = await asyncio.to_thread(serve.status)
        states: Any = status.applications[context.app_name].deployments["Painters"].replica_states
        running = states.get("RUNNING", 0)
        body = {"status": "READY" if running else "STARTING", "replicas": running}
        return JSONResponse(body, status_code=200 if running else 503)

    async def _drawn(self, name: str, inputs: dict[str, Any]) -> Answer:
        """The answer of a painter to the request `name`; of another one, if the first dies."""
        source = fine_tune_of(inputs)
        painters = self._painters
        if source is not None and self._by_fine_tune:
            painters = painters.options(multiplexed_model_id=name_of_fine_tune(source))
        for number, pause in enumerate((*PAUSES_S, None), start=1):
            try:
                answer = await painters.draw.remote(inputs)
                return dataclasses.replace(answer, metrics=answer.metrics | {"tries": number})
            except BackPressureError:
                return Answer(status=503, error="This server has too many requests: try again later.")
            except DeploymentUnavailableError:
                return Answer(status=503, error="This server cannot draw now: try again later.")
            except TaskCancelledError:
                raise
            except Exception as error:
                # Painters answer instead of raising, so this is Ray's: a replica died. Ray does not always say so in `LOST`.
                unknown = not isinstance(error, LOST)
                log.warning("Request %s lost its replica (%r)", name, type(error), exc_info=unknown)
                if pause is not None:
                    await asyncio.sleep(pause)
        lost = "This request lost its replica three times: try again, or ask for less at once."
        return Answer(status=503, error=lost)


def app(args: FleetSettings) -> serve.Application:
    """The application, as a Serve config imports it."""
    gateway: Any = Gateway  # Serve adds `bind`
    painters: Any = Painters
    return gateway.bind(painters.bind(args.fine_tunes), args.by_fine_tune)
