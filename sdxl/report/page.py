"""The page around a report's parts: one HTML document that needs no network and runs no script but its own.

Knows the frame of a page; does not know its parts.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from sdxl.report.markup import Html, join, tag

_HERE = Path(__file__).parent


def page(title: str, parts: Sequence[Html]) -> str:
    """The document. Its first part is the header.

    Its policy lets no script, style or file in from elsewhere, even if a part held foreign HTML.
    """
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{title} – report of a training"),
        tag("style", Html(style)),
    )
    header, *others = parts
    body = tag("body", header, tag("main", join(others)), tag("script", Html(script)))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _hash(text: str) -> str:
    """What the policy calls an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
