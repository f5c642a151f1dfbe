"""Requests and answers as JSON, in the form of Cog's `/predictions`, and which fine-tune a request is about.

Knows the inputs that predict.py declares and HTTP's statuses; does not know Ray, or how pictures are drawn.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from predict import Predictor
from sdxl import settings
from sdxl.declared_inputs import checked_inputs
from sdxl.errors import NotEnoughMemoryError, StorageError, UserInputError

LARGEST_BODY = 100 << 20
"""Bytes of a request, as behind Cog. What is larger goes as a URL."""
FAILED = "The picture could not be drawn because of an error in this server: its log has more."
_LONGEST_ID = 100


class RefusedError(UserInputError):
    """A request that is no request for pictures; `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of a request."""

    status: int = 200
    """HTTP's."""
    output: list[str] | None = None
    """The pictures as `data:` URIs; None if it failed."""
    error: str | None = None
    """One sentence; None if it succeeded."""
    logs: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)

    def as_json(self, name: str) -> dict[str, Any]:
        """The body of the answer to the request `name`."""
        status = "succeeded" if self.error is None else "failed"
        body = {"id": name, "status": status, "output": self.output, "error": self.error}
        return body | {"logs": self.logs, "metrics": self.metrics}


def read_request(body: bytes) -> tuple[str, dict[str, Any]]:
    """The name of a request and its inputs as they are given.

    Raises:
        RefusedError: it is not JSON, or asks for something other than pictures in the answer.
    """
    try:
        asked = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise RefusedError("The request is not JSON in UTF-8: send an object with input.", 400) from None
    given = asked.get("input", {}) if isinstance(asked, dict) else None
    if not isinstance(given, dict):
        raise RefusedError("The request has no inputs: send an object such as {input: {prompt: …}}.", 400)
    if asked.get("webhook"):
        raise RefusedError("This server calls no webhooks: leave out webhook, and wait for the answer.", 422)
    name = asked.get("id") or secrets.token_hex(13)
    if not isinstance(name, str) or len(name) > _LONGEST_ID:
        raise RefusedError(f"id must be a text of up to {_LONGEST_ID} characters.", 422)
    return name, given


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """All inputs of predict.py, checked by its declarations. The seed is decided, so that a second try draws the same.

    Raises:
        UserInputError: an input is wrong or unknown.
    """
    inputs = checked_inputs(Predictor().run, given)
    return inputs | {"seed": settings.resolve_seed(inputs["seed"])}


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


def fine_tune_of(inputs: Mapping[str, Any]) -> str | None:
    """The source of the fine-tune that decides where a request is drawn; None for the base.

    It is `replicate_weights`, or else the first of `extra_lora`. Beside a subject, LoRAs are mostly styles, which many
    requests share.
    """
    loras = [source for source in inputs["extra_lora"] or () if source]
    return inputs["replicate_weights"] or (loras[0] if loras else None)


def name_of_fine_tune(source: str) -> str:
    """A short name for the fine-tune at `source`: the same for the same source, and without the secrets of a URL."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def failed(error: UserInputError) -> Answer:
    """The answer for an error that has a sentence for the user."""
    if isinstance(error, RefusedError):
        status = error.status
    else:
        status = 507 if isinstance(error, StorageError | NotEnoughMemoryError) else 422
    return Answer(status=status, error=str(error))
