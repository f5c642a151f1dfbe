"""The studio in a real browser: a person's whole path on a miniature, two tabs, keyboard and labels, and that nothing leaves."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdxl.files.archives import unpack
from sdxl.studio import doors
from tests.browser import CHROMIUM, Page, browser
from tests.conftest import REPOSITORY, free_port, png

GRADIO, AXE = (importlib.util.find_spec(name) for name in ("gradio", "axe_playwright_python"))
pytestmark = pytest.mark.skipif(
    GRADIO is None or CHROMIUM is None,
    reason="the studio needs requirements-studio.txt, and the test chromium",
)
QUICK = "max_train_steps=4\nchecks=1\npreservation=0\ntrain_batch_size=1\nresolution=64\nsave_every=0"
PROMPTS = "a photo of REX on a beach"


@dataclass
class Server:
    """A studio that runs."""

    address: str
    folder: Path
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def server(narrow_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A studio, as `make studio` starts it."""
    folder, port = tmp_path_factory.mktemp("studio"), free_port()
    environment = os.environ | {
        "SDXL_BASE": str(narrow_base),
        "SDXL_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    line = [sys.executable, "studio.py", "-o", str(folder / "out"), "--port", str(port), "--no-browser"]
    with (folder / "page.log").open("ab") as log:
        process = subprocess.Popen(line, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while status(f"{address}/") != 200:
        assert process.poll() is None and time.monotonic() < deadline, (folder / "page.log").read_text()
        time.sleep(0.2)
    yield Server(address, folder / "out", process)
    process.terminate()
    assert process.wait(30) in (0, -signal.SIGTERM), "open tabs are not waited for"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        opened.resize(1280)
        yield opened


def status(address: str, **headers: str) -> int:
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
    page.run(
        f"[...document.querySelectorAll('[role=tab]')].find(tab => tab.textContent.includes('{step}')).click()"
    )


def write(page: Page, field: str, text: str) -> None:
    """Replace what is in a field, and leave it."""
    page.run(f"document.querySelector('{field}').focus()")
    page.run(f"document.querySelector('{field}').select()")
    page.write(text)
    page.press("Tab")


def shows(page: Page, part: str, text: str, *, seconds: float = 60) -> None:
    """Wait until a part of the page shows a text."""
    try:
        page.until(
            f"document.querySelector('{part}')?.textContent.includes({json.dumps(text)})", seconds=seconds
        )
    except AssertionError:
        pytest.fail(
            f"{part} never shows {text!r}, but {page.run(f'document.querySelector(`{part}`)?.textContent')!r}"
        )


def require_accessible(page: Page) -> None:
    """No error is shown, and axe has no serious finding in what is seen now."""
    assert not page.run("document.querySelector('.toast-wrap')?.innerText")
    if AXE is None or not AXE.submodule_search_locations:
        return
    page.run(Path(AXE.submodule_search_locations[0], "axe.min.js").read_text() + ";0")
    found = page.run(
        "axe.run(document, {resultTypes: ['violations']}).then(found => found.violations"
        ".filter(one => ['serious', 'critical'].includes(one.impact))"
        ".map(one => one.id + ' ' + one.nodes.map(node => node.html).join(' ')))"
    )
    assert found == []


def pictures_with_captions(page: Page, folder: Path) -> None:
    """Step 1, with a picture whose name is HTML."""
    files = [
        folder / name for name in ("<img src=x onerror=alert(1)>.png", *(f"{i}.png" for i in range(1, 6)))
    ]
    for number, file in enumerate(files):
        file.write_bytes(png(number, (300, 256)))
    write(page, "[placeholder=Rex]", "Rex")
    shows(page, ".gradio-container", "it is called REX")
    page.attach("#drop input[type=file]", files)
    page.until("document.querySelectorAll('.card textarea').length == 6")
    assert page.run("document.querySelectorAll('.card textarea')[0].value") == "a photo of REX"
    shows(page, "#notes", "All captions are")
    write(page, ".card textarea", "a photo of REX in the snow")
    shows(page, ".card p.caption", "in the snow")
    shows(page, ".card p.caption mark", "REX")
    write(page, ".card textarea", "a photo in the snow")
    shows(page, "#notes", "1 captions do not name REX")
    page.run("document.querySelector('#put-word').click()")
    shows(page, ".card p.caption", "a photo of REX, a photo in the snow")
    require_accessible(page)

    # The keyboard is enough to reach a picture's editor.
    page.run("document.querySelector('.card textarea').focus()")
    for _ in range(2):
        page.press("Tab")
    assert page.run("document.activeElement.textContent.trim()") == "Crop and mask"
    page.press("Enter")
    shows(page, "#editor", "Crop and mask of 1.png")


def training_begun(page: Page) -> None:
    """Step 2, with a wrong setting first."""
    choose(page, "2 Train")
    shows(page, "#takes", "260 steps: about ")
    page.run("document.querySelector('#settings button').click()")
    page.until("document.querySelector('#more textarea')")
    write(page, "#more textarea", "lora_rank=many")
    shows(page, "#takes", "lora_rank")
    write(page, "#previews-of textarea", PROMPTS)
    write(page, "#more textarea", QUICK)
    shows(page, "#takes", "4 steps")
    page.run("document.querySelector('#start').click()")
    page.until("document.querySelector('#stop')?.offsetWidth")


def drawn(page: Page) -> None:
    """Step 3."""
    choose(page, "3 Try")
    page.until("document.querySelector('#tuned input')?.value.includes('Rex, training 1')")
    page.run("document.querySelector('#word').click()")
    page.until("document.querySelector('#prompt textarea').value == 'a photo of REX REX'")
    page.run("document.querySelector('#draw').click()")
    page.until("document.querySelectorAll('#drawn img').length == 1", seconds=300)
    require_accessible(page)


def taken_away(page: Page, folder: Path) -> str:
    """Step 4; returns the address of the tar."""
    choose(page, "4 Take away")
    page.until("document.querySelectorAll('#links a').length == 2")
    address = page.run("document.querySelector('#links a').href")
    with urllib.request.urlopen(address) as answer:
        (folder / "result.tar").write_bytes(answer.read())
    names = {path.name for path in unpack(folder / "result.tar", folder / "result")}
    assert {"lora.safetensors", "embeddings.pti"} <= names
    assert status(page.run("document.querySelectorAll('#links a')[1].href")) == 200
    require_accessible(page)
    return address


def two_tabs(page: Page, server: Server, key: str, folder: Path) -> None:
    """A second tab has its own project, and errors are sentences."""
    other = page.other_tab()
    other.resize(1280)
    assert opened(other, server) != key
    damaged = folder / "damaged.zip"
    damaged.write_bytes(b"PK\x03\x04 no zip")
    other.attach("#drop input[type=file]", [damaged])
    shows(other, ".toast-wrap", "damaged.zip")
    assert other.run("document.querySelectorAll('.card').length") == 0


def only_for_pages_of_its_own(server: Server, address: str, key: str) -> None:
    """Other sites may ask for nothing, this page for nothing elsewhere, and only what trainings made is handed out."""
    assert status(address) == 200
    assert status(address, Host="studio.example") == 403
    assert status(address, Origin="http://studio.example") == 403
    assert status(address.replace("/1/trained_model.tar", "/%2e%2e/project.json")) == 404
    assert status(address.replace("trained_model.tar", "inputs.json")) == 404
    assert status(address.replace(key, "0" * 12)) == 404
    with urllib.request.urlopen(f"{server.address}/") as answer:
        policy, text = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "default-src 'self' data: blob:;" in policy
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=.https?://(?!127)[^>]*>", text)


def test_a_person_makes_a_fine_tune(page: Page, server: Server, tmp_path: Path):
    key = opened(page, server)
    pictures_with_captions(page, tmp_path)
    training_begun(page)

    # The tab is closed, and opened again when the training has finished.
    page.call("Page.navigate", url="about:blank")
    folder = server.folder / key / "trainings" / "1"
    deadline = time.monotonic() + 300
    while doors.is_running(folder):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert opened(page, server, key) == key
    choose(page, "2 Train")
    shows(page, "#status", "Finished", seconds=300)
    page.until("document.querySelectorAll('#previews img').length == 2")
    page.run("document.querySelector('#curves button').click()")
    shows(page, "#curves", "Loss in training")
    require_accessible(page)

    drawn(page)
    address = taken_away(page, tmp_path)

    # On a phone all steps are in sight, and nothing is wider than the screen.
    page.resize(390, 844)
    for step in ("1 Pictures", "2 Train", "3 Try", "4 Take away"):
        choose(page, step)
        assert page.run("document.documentElement.scrollWidth") <= 390
        widest = "Math.max(...[...document.querySelectorAll('button, h2')].map(one => one.getBoundingClientRect().right))"
        assert page.run(widest) <= 390, step
    page.resize(1280)

    two_tabs(page, server, key, tmp_path)
    told = [error for error in page.errors if "WebGL" not in error]
    assert told == [], "scripts fail, or something is asked for elsewhere"
    only_for_pages_of_its_own(server, address, key)
