"""A running studio for tests, and what a person does on its page."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdxl.studio import doors
from tests.browser import Page
from tests.conftest import REPOSITORY, free_port

GRADIO, _AXE = (importlib.util.find_spec(name) for name in ("gradio", "axe_playwright_python"))
_TELLS_ADDRESSES = """
import os, sys
def tell(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        place = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        host = place[0] if isinstance(place, tuple) else place
        if host not in (None, "", "127.0.0.1", "localhost", b"127.0.0.1", b"localhost") and not str(host).startswith("/"):
            with open(os.environ["ADDRESSES"], "a") as file:
                file.write(f"{sys.argv[:1]} {event} {place}\\n")
sys.addaudithook(tell)
"""
"""Python runs this at the start of each process: it writes down every address other than this machine's."""


@dataclass
class Server:
    """A studio that runs."""

    address: str
    folder: Path
    asked_elsewhere: Path
    """The file with the addresses that any of its processes asked, if they did."""


@contextlib.contextmanager
def running_studio(base: Path, folder: Path) -> Iterator[Server]:
    """A studio, as `make studio` starts it, with everything it writes in `folder`."""
    port, told = free_port(), folder / "hooks" / "sitecustomize.py"
    told.parent.mkdir()
    told.write_text(_TELLS_ADDRESSES)
    environment = os.environ | {
        "SDXL_BASE": str(base),
        "SDXL_CACHE": str(folder / "cache"),
        "SDXL_SCORER": "none",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(told.parent),
        "ADDRESSES": str(folder / "addresses"),
    }
    line = [sys.executable, "studio.py", "-o", str(folder / "out"), "--port", str(port), "--no-browser"]
    with (folder / "page.log").open("ab") as log:
        process = subprocess.Popen(line, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    wait(lambda: status(f"{address}/") == 200 or process.poll() is not None)
    assert process.poll() is None, (folder / "page.log").read_text()
    try:
        yield Server(address, folder / "out", folder / "addresses")
    finally:
        for training in folder.glob("out/*/trainings/*"):
            if doors.is_running(training):  # a test has failed meanwhile
                os.kill(json.loads((training / "process.json").read_text()), signal.SIGKILL)
        process.terminate()
        code = process.wait(30)
    assert code in (0, -signal.SIGTERM), "open tabs are not waited for"


def wait(until: Callable[[], object], *, seconds: float = 300) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def status(address: str, **headers: str) -> int:
    """The status with which a server answers; 0 if it does not."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def opened(page: Page, server: Server, project: str = "") -> str:
    """Open a project, or a new one; return its key."""
    page.visit(server.address, f"/?project={project}" if project else "/")
    page.until(
        "document.querySelector('#drop input[type=file]') && document.querySelector('#project :is(input, textarea)')?.value"
    )
    page.until("location.search.includes('=')")
    return page.run("new URLSearchParams(location.search).get('project')")


def choose(page: Page, step: str) -> None:
    """Go to a step."""
    page.run(
        f"[...document.querySelectorAll('[role=tab]')].find(tab => tab.textContent.includes('{step}')).click()"
    )


def click(page: Page, selector: str) -> None:
    """Click what is there or comes."""
    page.until(f"document.querySelector('{selector}')?.offsetWidth")
    page.run(f"document.querySelector('{selector}').click()")


def write(page: Page, field: str, text: str) -> None:
    """Replace what is in a field, and leave it."""
    page.run(f"document.querySelector('{field}').focus()")
    page.run(f"document.querySelector('{field}').select()")
    page.write(text)
    page.press("Tab")


def shows(page: Page, part: str, text: str, *, seconds: float = 60) -> None:
    """Wait until a part of the page shows a text."""
    content = f"document.querySelector('{part}')?.textContent"
    try:
        page.until(f"{content}?.includes({json.dumps(text)})", seconds=seconds)
    except AssertionError:
        pytest.fail(f"{part} never shows {text!r}, but {page.run(content)!r}")


def told_wrong(page: Page, text: str) -> None:
    """Wait for an error, and close it."""
    shows(page, ".toast-wrap", text)
    click(page, ".toast-close")
    page.until("!document.querySelector('.toast-body')")


def require_accessible(page: Page) -> None:
    """No error is shown, and axe has no serious finding in what is seen now."""
    assert not page.run("document.querySelector('.toast-wrap')?.innerText")
    page.until("!document.querySelector('.pending')")  # what is pending is pale
    if _AXE is None or not _AXE.submodule_search_locations:
        return
    page.run(Path(_AXE.submodule_search_locations[0], "axe.min.js").read_text() + ";0")
    found = page.run(
        "axe.run(document, {resultTypes: ['violations']}).then(found => found.violations"
        ".filter(one => ['serious', 'critical'].includes(one.impact))"
        ".map(one => one.id + ' ' + one.nodes.map(node => node.html).join(' ')))"
    )
    assert found == [], found
