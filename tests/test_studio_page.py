"""The studio in a real browser: a person's whole path on a miniature, keyboard and labels, wrong files, a phone, two tabs, and that
nothing leaves the machine."""

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops

from sdxl.files.archives import unpack
from sdxl.studio import doors
from tests.browser import CHROMIUM, Page, browser
from tests.conftest import png, write_zip
from tests.studio_page import (
    GRADIO,
    Server,
    choose,
    click,
    opened,
    require_accessible,
    running_studio,
    shows,
    status,
    told_wrong,
    wait,
    write,
)

pytestmark = pytest.mark.skipif(
    GRADIO is None or CHROMIUM is None,
    reason="the studio needs requirements-studio.txt, and the test chromium",
)
LONG = "max_train_steps=4000\nchecks=1\npreservation=0\ntrain_batch_size=1\nresolution=64\nsave_every=0"
"""So many steps that nobody waits for the last."""
LAPTOP, PHONE = (760, 700), (390, 844)
"""CSS pixels. The laptop's window is small, because chromium draws the editors on the processor."""
HOSTILE = "<img src=x onerror=alert(1)>.png"


@pytest.fixture(scope="module")
def server(narrow_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_studio(narrow_base, tmp_path_factory.mktemp("studio")) as found:
        yield found


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as found:
        found.resize(*LAPTOP)
        yield found


def a_folder_of_pictures(page: Page, folder: Path) -> None:
    """Step 1, with a mask in a folder of its own, and a picture whose name is HTML."""
    folder.mkdir()
    for number, name in enumerate((HOSTILE, *(f"{i}.png" for i in range(1, 6)))):
        (folder / name).write_bytes(png(number, (300, 256)))
    (folder / "masks").mkdir()
    Image.new("L", (300, 256), 255).save(folder / "masks" / "2.png")
    write(page, "[placeholder=Rex]", "Rex")
    shows(page, ".gradio-container", "it is called REX")
    page.attach("[webkitdirectory]", [folder])
    page.until("document.querySelectorAll('.card textarea').length == 6")
    assert page.run("document.querySelectorAll('.card .mask').length") == 1
    labels = page.run("[...document.querySelectorAll('.card label')].map(one => one.textContent.trim())")
    assert f"Caption of {HOSTILE}" in labels


def captions(page: Page) -> None:
    assert page.run("document.querySelectorAll('.card textarea')[0].value") == "a photo of REX"
    shows(page, "#notes", "All captions are")
    write(page, ".card textarea", "a photo of REX in <b>the</b> snow")
    shows(page, ".card p.caption", "in <b>the</b> snow")
    shows(page, ".card p.caption mark", "REX")
    write(page, ".card textarea", "a photo in the snow")
    shows(page, "#notes", "1 caption is without REX")
    click(page, "#put-word")
    shows(page, ".card p.caption", "a photo of REX, a photo in the snow")
    require_accessible(page)


def paint(page: Page, editor: str, folder: Path) -> None:
    """Paint over the middle of the picture in an editor, until the paint is seen: a new picture takes it only after a moment."""
    # The picture is there when it is shown enlarged.
    page.until(f"parseInt(document.querySelector('{editor}').textContent.match(/([0-9]+)%/)?.[1]) > 100")
    seen = folder / "seen.png"

    def is_painted() -> bool:
        page.drag(f"{editor} canvas", (0.48, 0.5), (0.52, 0.5))
        box = page.run(f"document.querySelector('{editor} canvas').getBoundingClientRect().toJSON()")
        page.screenshot(seen)
        with Image.open(seen) as screen:
            middle = (round(box["x"] + box["width"] / 2), round(box["y"] + box["height"] / 2))
            return screen.convert("RGB").getpixel(middle) == (255, 120, 40)

    wait(is_painted)


def crop_and_mask_by_keys_and_mouse(page: Page, pictures: Path) -> None:
    """The editor of the second card, a picture of 300×256 that is cut to 256×256. Late, because chromium draws it on the
    processor from then on."""

    def entry() -> dict[str, Any]:
        return json.loads((pictures / "set.json").read_text())[1]

    def mask_at(across: int, down: int) -> Any:
        with Image.open(pictures / "1" / "prepared" / f"{entry()['number']}.mask.png") as mask:
            assert mask.size == (256, 256)
            return mask.getpixel((across, down))

    choose(page, "1 Pictures")
    page.run("document.querySelectorAll('.card textarea')[1].focus()")
    page.press("Tab")
    page.press("Tab")
    assert page.run("document.activeElement.textContent.trim()") == "Crop and mask"
    page.press("Enter")
    shows(page, "#editor", f"Crop and mask of {entry()['name']}")
    page.until("document.activeElement.id == 'editor'")
    paint(page, "#editor", pictures)
    click(page, "#keep-mask")
    page.until("document.querySelectorAll('.card .mask').length == 2")
    assert mask_at(128, 128) == 255 and mask_at(5, 5) == 0
    painted = max(x for x in range(256) if mask_at(x, 128))

    page.run("document.querySelector('#editor').focus()")
    for _ in range(3):  # a number, its reset button, the slider
        page.press("Tab")
    assert entry()["crop_top_left"] == [0, 22]
    page.press("Home")
    wait(lambda: entry()["crop_top_left"] == [0, 0])
    wait(lambda: mask_at(painted + 22, 128) == 255)
    assert mask_at(painted + 23, 128) == 0, "the mask moves with the crop"

    page.run("document.querySelector('#mask-box button').focus()")
    page.press("Enter")
    page.until("document.querySelector('#mask-left')")
    for _ in range(3):
        page.press("Tab")
    assert page.run("document.activeElement.matches('#mask-left input[type=range]')")
    page.press("End")  # nothing would be in this box
    page.press("ArrowLeft")
    page.press("Home")
    page.run("document.querySelector('#mask-use-box').focus()")
    page.press("Enter")
    wait(lambda: [mask_at(x, 128) for x in (0, 229, 231)] == [255, 255, 0])
    assert [mask_at(128, y) for y in (25, 26, 229, 230)] == [0, 255, 255, 0]
    shows(page, "#kept", "The mask is kept")
    page.press("Escape")
    page.until("!document.querySelector('#editor').offsetWidth")
    page.until("document.activeElement.textContent.trim() == 'Crop and mask'")


def trained(page: Page, server: Server, key: str) -> None:
    """Step 2: a wrong setting, a start, a stop at once, and another one after it went on. The tab is closed meanwhile."""
    choose(page, "2 Train")
    shows(page, "#takes", "260 steps: about ")
    click(page, "#settings button")
    page.until("document.querySelector('#more textarea')")
    write(page, "#more textarea", "lora_rank=many")
    shows(page, "#takes", "lora_rank")
    write(page, "#previews-of textarea", "a photo of REX on a beach")
    write(page, "#more textarea", LONG)
    shows(page, "#takes", "4000 steps")
    click(page, "#start")
    click(page, "#stop")
    shows(page, "#status", "It was stopped.")
    training = server.folder / key / "trainings" / "1"
    click(page, "#go-on")
    page.until("!document.querySelector('#go-on')?.offsetWidth")
    page.call("Page.navigate", url="about:blank")
    wait(lambda: "/4000 [" in doors.log_of(training))
    assert opened(page, server, key) == key
    choose(page, "2 Train")
    shows(page, "#status", "Step ", seconds=300)
    click(page, "#stop")
    shows(page, ".gradio-container", "keeps the best so far")
    shows(page, "#status", "is kept", seconds=300)
    page.until("document.querySelectorAll('#previews img').length == 2")
    click(page, "#curves button")
    shows(page, "#curves", "Loss in training")
    require_accessible(page)


def drawn(page: Page) -> None:
    """Step 3, next to the base."""
    choose(page, "3 Try")
    page.until("document.querySelector('#tuned input')?.value.includes('Rex, training 1')")
    click(page, "#word")
    page.until("document.querySelector('#prompt textarea').value == 'a photo of REX REX'")
    choose(page, "2 Train")
    choose(page, "3 Try")
    page.run(
        "document.querySelector('#beside input').dispatchEvent(new MouseEvent('mousedown', {bubbles: true}))"
    )
    page.run("document.querySelector('#beside input').focus()")
    page.until("document.querySelector('[role=option]')")
    page.run(
        "document.querySelector('[role=option]').dispatchEvent(new MouseEvent('mousedown', {bubbles: true}))"
    )
    click(page, "#draw")
    page.until("document.querySelectorAll('#drawn img').length == 2", seconds=300)
    assert page.run("document.querySelector('#prompt textarea').value") == "a photo of REX REX"
    require_accessible(page)


def drawn_in_a_part(page: Page, server: Server, key: str) -> None:
    """Step 3 from a picture, painted over in its middle: the rest of it stays. The page is loaded anew, which ends the editor
    of step 1."""
    start = server.folder / key / "pictures" / "1" / "prepared" / "2.src.png"
    folder = server.folder / key / "drawn"
    opened(page, server, key)
    choose(page, "3 Try")
    click(page, "#start-from button")
    page.until("document.querySelector('#start-picture')")
    page.attach("#start-from input[type=file]", [start])
    paint(page, "#start-from", folder)
    click(page, "#draw")
    page.until("document.querySelectorAll('#drawn img').length == 1", seconds=300)
    [result] = folder.glob("2/0/*.png")
    with Image.open(folder / "2" / "mask.png") as opened_mask:
        left, top, right, bottom = opened_mask.getbbox() or (0, 0, 0, 0)
    assert 0 < left < right < 256 and 0 < top < bottom < 256
    with Image.open(start) as before, Image.open(result) as after:
        changed = ImageChops.difference(before.convert("RGB"), after.convert("RGB"))
    painted = changed.crop((left, top, right, bottom))
    blurred = 16  # pixels around the mask, whose edge is soft
    changed.paste((0, 0, 0), (left - blurred, top - blurred, right + blurred, bottom + blurred))
    assert np.asarray(changed).max() <= 2
    assert np.asarray(painted).max() > 30
    require_accessible(page)
    page.call("Page.navigate", url="about:blank")  # or chromium would go on to draw the editors


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


def fits_a_phone(page: Page) -> None:
    """All steps are in sight, and nothing is wider than the screen, whatever the names are."""
    page.resize(*PHONE)
    for step in ("1 Pictures", "2 Train", "3 Try", "4 Take away"):
        choose(page, step)
        assert page.run("document.documentElement.scrollWidth") <= 390
        widest = "Math.max(...[...document.querySelectorAll('button, h2, p, label')].map(one => one.getBoundingClientRect().right))"
        assert page.run(widest) <= 390, step
    page.resize(*LAPTOP)


def a_second_tab(page: Page, server: Server, key: str, folder: Path) -> None:
    """It has a project of its own. Wrong files end in sentences, and leave nothing."""
    other = page.other_tab()
    other.resize(*LAPTOP)
    new = opened(other, server)
    assert new != key
    (folder / "damaged.zip").write_bytes(b"PK\x03\x04 no zip")
    (folder / "notes.txt").write_text("no picture")
    for file, told in (
        (folder / "damaged.zip", "damaged.zip"),
        (write_zip(folder / "climbs.zip", {"../../x.png": png()}), "climbs.zip holds the unsafe path"),
        (
            write_zip(folder / "long.zip", {"n" * 300 + ".png": png()}),
            "long.zip holds a path that is too long",
        ),
        (folder / "notes.txt", "What was dropped holds no pictures"),
    ):
        other.attach("#drop input[type=file]", [file])
        told_wrong(other, told)
        other.until(
            "!document.querySelector('#drop .file-preview')"
        )  # it does not come again with the next one
    assert other.run("document.querySelectorAll('.card').length") == 0
    assert not [path for path in (server.folder / new).rglob("*") if path.is_file()]


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
    a_folder_of_pictures(page, tmp_path / "pictures")
    captions(page)
    trained(page, server, key)
    drawn(page)
    address = taken_away(page, tmp_path)
    fits_a_phone(page)
    crop_and_mask_by_keys_and_mouse(page, server.folder / key / "pictures")
    drawn_in_a_part(page, server, key)
    a_second_tab(page, server, key, tmp_path)
    only_for_pages_of_its_own(server, address, key)
    told = [error for error in page.errors if "WebGL" not in error]
    assert told == [], "scripts fail, or the page asks for something elsewhere"
    assert not server.asked_elsewhere.exists(), server.asked_elsewhere.read_text()
