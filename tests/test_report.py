"""The report of a training: what it shows, that nothing on it is anyone's code, its size, and how it works in a browser."""

import math
import os
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl.data.dataset_folder import large_file, mask_file, picture_file, write_captions
from sdxl.data.framing import Framing, place_crop
from sdxl.history import Check, Choice, History, Previews, Step
from sdxl.report.charts import Chart, Line, svg
from sdxl.report.curves import smoothed
from sdxl.report.events import EventFiles
from sdxl.report.markup import tag
from sdxl.report.pictures import data_uri
from sdxl.report.recorder import Recorder
from sdxl.report.writing import write_report
from sdxl.training.inputs import TrainInputs, train_inputs
from tests.browser import CHROMIUM, Page, browser
from tests.test_train_inputs import defaults

PLAIN = "a photo of TOK"
HOSTILE = (
    "TOK </style></script><script>document.title='no'</script><img src=x onerror=alert(1)>\" onload='x' "
    "javascript:1 &lt; &#x3c; <!-- ]]> \x00 \u202e \ud800 {{7*7}} ${7}"
)
SECTIONS = ["previews", "use", "curves", "pictures", "settings", "versions"]
STEPS = 12


def noise(path: Path, side: int = 64, seed: int = 0) -> Path:
    """A picture that compresses badly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def dataset(folder: Path, captions: list[str], *, masks: bool = True, side: int = 64) -> Path:
    """A dataset folder. The first picture is a crop and, with `masks`, has a mask."""
    first = noise(picture_file(folder, 0), side)
    for index in range(1, len(captions)):
        os.link(first, picture_file(folder, index))
    if masks:
        mask = np.zeros((side, side), np.uint8)
        mask[8:40, 8:40] = 255
        Image.fromarray(mask).save(mask_file(first))
    noise(large_file(first), side)
    whole = Framing(original_size=(side, side), crop_top_left=(0, 0), target_size=(side, side))
    framings = [place_crop((side, 2 * side), (side, side), None), *[whole] * (len(captions) - 1)]
    names = {picture_file(folder, index).name: caption for index, caption in enumerate(captions)}
    write_captions(folder / "captions.csv", names, framings)
    return folder


def history(folder: Path, prompts: list[str]) -> History:
    """A history with everything in it, and its previews in `folder`."""
    told = History(prompts=prompts, choice=Choice(step=8, strength=1.0, reason="It is best: " + prompts[0]))
    for step in range(1, STEPS + 1):
        rates = {"learning_rate": 1e-4, "ti_learning_rate": 1e-3 if step <= 6 else 0.0}
        told.steps.append(
            Step(step=step, loss=1 / step, seconds=step / 2, memory_gib=20 + step / 10, **rates)
        )
    for place, step in enumerate((0, 4, 8, STEPS)):
        bands = {"low": 1.0 - step / 50, "middle": 1.0, "high": 1.1}
        told.checks.append(
            Check(step=step, strength=1.0, held_out=bands, followed=0.9, drift=step / 100, score=float(place))
        )
        names = [f"previews/{step}-{number}.png" for number in range(len(prompts))]
        for name in names:
            noise(folder / name, 48, seed=step)
        told.previews.append(
            Previews(step=step, pictures=names, likeness=0.3 + step / 50, prompt_shown=0.25 - step / 500)
        )
    told.likeness_among_pictures = 0.71
    told.checks.append(Check(step=STEPS, strength=0.8, held_out={}, followed=0.8, drift=0.05, score=1.5))
    return told


def inputs(**given: Any) -> TrainInputs:
    return train_inputs(defaults(input_images="x.zip", **given))


def record(wanted: TrainInputs, **more: Any) -> dict[str, Any]:
    """The record of a run, as `training.json` has it."""
    config = wanted.training_config(resolution=64, images=3, base="someone/base", token_init="TOK:dog")
    settings = config.as_json() | wanted.preprocess_config(64).as_json()
    return {"settings": settings, "versions": {"torch": "2.11"}, "device": "a GPU", **more}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`whole(text)`: a report in which `text` stands wherever strangers may write."""
    made: dict[str, Path] = {}

    def report(text: str = PLAIN) -> Path:
        if text not in made:
            folder = tmp_path_factory.mktemp("whole")
            wanted = inputs(
                lora_rank=8, max_train_steps=STEPS, random_views=0, prior_prompts=text.replace("TOK", "dog")
            )
            (folder / "web_ui").mkdir()
            (folder / "web_ui" / "TOK.safetensors").touch()
            (folder / "web_ui" / "TOK_lora.safetensors").touch()
            caption = re.sub("[\x00\ud800]", "", text)  # which no file of captions can hold
            made[text] = write_report(
                folder,
                history=history(folder, [text, f"{text} two", text.replace("TOK", "dog")]),
                record=record(wanted, device=text),
                dataset_folder=dataset(folder / "dataset", [caption, f"{text[:9]} here", PLAIN]),
                advice=[text],
                asked=wanted.asked,
                described={"lora_rank": text},
            )
        return made[text]

    return report


class Structure(HTMLParser):
    """The elements of a page, with the names of their attributes, and the addresses in them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, ...]] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, *(name for name, _ in attrs)))
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.text += data


def sections(page: str) -> list[str]:
    return [name for name in re.findall(r'<section id="(\w+)"', page)]


def test_the_page_has_every_part(whole: Callable[..., Path]):
    page = whole().read_text()
    assert sections(page) == SECTIONS
    text = Structure(page).text
    for told in (
        "A LoRA of rank 8 for someone/base, learned from 3 pictures",
        f"Step 8 of {STEPS} was chosen.",
        "It is best: a photo of TOK",
        "step 4",
        "tokens freeze",
        "The dashed line (0.71): training pictures among themselves.",
        "names no new word, so it should stay the same",
        "128×64, 50% cut off",
        "Show masks",
        "16 of the preset",
        "python predict.py -i 'prompt=a photo of TOK' -i replicate_weights=@trained_model.tar",
        'pipe("a photo of <s0><s1>")',
        "TOK_lora.safetensors",
        "models/loras",
        "<lora:TOK_lora:1> TOK",
        "embedding:TOK",
        "2.11",
    ):
        assert told in text, told
    for title in (
        "Score",
        "Loss on what was kept out",
        "Prompts followed",
        "Drift of other prompts",
        "Likeness of previews",
        "Prompts shown in previews",
        "Loss in training",
    ):
        assert f">{title}</title>" in page
    assert page.count("<svg") - page.count('class="frame"') == 10


def test_the_page_asks_for_nothing_and_names_no_id_twice(whole: Callable[..., Path]):
    page = whole().read_text()
    structure = Structure(page)
    assert structure.addresses and all(
        address.startswith(("data:image/webp;base64,", "#")) for address in structure.addresses
    )
    assert {address[1:] for address in structure.addresses if address.startswith("#")} <= set(structure.ids)
    assert len(structure.ids) == len(set(structure.ids))
    assert "default-src &#x27;none&#x27;" in page
    names = {name for element in structure.elements for name in element[1:]}
    assert "style" not in names and not [name for name in names if name.startswith("on")]


def test_texts_of_strangers_change_no_element(whole: Callable[..., Path]):
    plain, hostile = (Structure(whole(text).read_text()) for text in (PLAIN, HOSTILE))
    assert plain.elements == hostile.elements
    assert "<script>document.title='no'</script>" in hostile.text
    assert not {"\x00", "\u202e", "\ud800"} & set(hostile.text)


def test_markup_escapes_all_but_itself():
    assert tag("p", "<b>", tag("i", "&"), class_="a b", title='"><x', hidden=True, id=None) == (
        '<p class="a b" title="&quot;&gt;&lt;x" hidden>&lt;b&gt;<i>&amp;</i></p>'
    )
    with pytest.raises(AssertionError):
        tag("p", onclick="x()")


def test_hundreds_of_pictures_and_long_texts_stay_small(tmp_path: Path):
    long = "TOK " + "very " * 300
    wanted = inputs(max_train_steps=9, prior_prompts="|".join(["a dog " * 300] * 300))
    path = write_report(
        tmp_path,
        history=History(prompts=[long]),
        record=record(wanted),
        dataset_folder=dataset(tmp_path / "dataset", [long] * 300, side=80),
        advice=[long] * 300,
        asked=wanted.asked,
    )
    page = path.read_text()
    assert "The first 100 of 300 pictures. 200 more pictures are not shown." in page
    assert page.count("<figure>") == 100
    assert "260 more are in the log" in page
    assert path.stat().st_size < 5_000_000


def test_many_moments_keep_the_first_the_last_and_the_chosen_one(tmp_path: Path):
    told = History(prompts=["@" + PLAIN], choice=Choice(step=37, strength=1.0, reason="It is best."))
    name = noise(tmp_path / "preview.png", 32).name
    told.previews = [Previews(step=step, pictures=[name]) for step in range(101)]
    told.previews[50] = Previews(step=50, pictures=["gone.png"])
    folder = dataset(tmp_path / "dataset", [PLAIN])
    page = write_report(tmp_path, history=told, record=record(inputs()), dataset_folder=folder).read_text()
    steps = [int(step) for step in re.findall(r'data-step="(\d+)"', page)]
    assert len(steps) == 14 and steps[0] == 0 and steps[-1] == 100 and {37, 50} <= set(steps)
    assert "87 more moments are not shown." in page
    assert page.count("no picture") == 1
    assert "prompt=@" not in page, "which would name a file"


def test_a_page_of_little_is_a_page(tmp_path: Path):
    folder = dataset(tmp_path / "dataset", [PLAIN], masks=False)
    wanted = inputs()
    path = write_report(tmp_path, history=History(), record=record(wanted), dataset_folder=folder)
    page = path.read_text()
    assert sections(page) == ["use", "pictures", "settings", "versions"]
    assert "Nothing but the pictures" in page and "Show masks" not in page and "was chosen" not in page
    assert wanted.asked == {}

    # Numbers that are missing or no numbers, and a run of one step.
    nan = float("nan")
    told = History(
        steps=[Step(step=1, loss=nan, learning_rate=0.0, ti_learning_rate=0.0, seconds=0.0)],
        checks=[
            Check(
                step=1, strength=1.0, held_out={"low": nan, "other": 1.0}, followed=nan, drift=nan, score=nan
            )
        ],
        previews=[Previews(step=1, pictures=[])],
    )
    page = write_report(
        tmp_path, history=told, record=record(inputs(is_lora=False)), dataset_folder=folder
    ).read_text()
    assert sections(page) == ["use", "curves", "pictures", "settings", "versions"]
    assert "A full fine-tune for" in page


def test_a_report_that_fails_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = dataset(tmp_path / "dataset", [PLAIN])
    picture_file(folder, 0).write_bytes(b"damaged")
    result = tmp_path / "result"
    result.mkdir()
    Recorder(history(result, [PLAIN]), result, asked={}, described={}).finish(record(inputs()), folder)
    assert "There is no report.html, because writing it failed" in caplog.text
    assert "0.src.png is missing or damaged" in caplog.text
    assert not any(tmp_path.rglob("*.html")) and (result / "history.json").is_file()


def test_a_failure_leaves_no_page(tmp_path: Path):
    folder = dataset(tmp_path / "dataset", [PLAIN])
    picture_file(folder, 0).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"0\.src\.png is missing or damaged"):
        write_report(tmp_path, history=History(), record=record(inputs()), dataset_folder=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_what_was_asked_is_what_differs_from_the_defaults():
    wanted = inputs(
        num_train_epochs=3, temp=0.5, token_string="DOG", caption_prefix="DOG, ", resolution=512, seed=5
    )
    assert wanted.asked == {
        "token_map": "DOG:2",
        "num_train_epochs": 3,
        "clipseg_temperature": 0.5,
        "caption_prefix": "DOG, ",
        "resolution": 512,
        "seed": 5,
    }


def test_pictures_keep_to_their_bytes(tmp_path: Path):
    with Image.open(noise(tmp_path / "x.png", 128)) as opened:
        picture = opened.convert("RGB")
    for most in (30_000, 9_000, 1_000):
        assert most / 4 < len(data_uri(picture, most)) <= most


@pytest.mark.parametrize(
    ("ys", "more", "labels"),
    [
        ([0.0, 1.0, 2.0], {}, ["0.0", "0.5", "1.0", "1.5", "2.0"]),
        ([3.0, 3.0, 3.0], {"from_zero": True}, ["0.0", "0.5", "1.0", "1.5", "2.0", "2.5", "3.0"]),
        ([0.0, 0.0, 0.0], {}, ["-0.04", "-0.02", "0.00", "0.02", "0.04"]),
        ([7.0, float("nan"), 7.0], {}, ["6.7", "6.8", "6.9", "7.0", "7.1", "7.2", "7.3"]),
        ([1e-6, 2e-6, 3e-6], {}, ["1e-6", "1.5e-6", "2e-6", "2.5e-6", "3e-6"]),
        ([-4e5, 1e5, 2e5], {}, ["-400000", "-300000", "-200000", "-100000", "0", "100000", "200000"]),
        ([0.2, 0.3, 0.4], {"level": 1.0}, ["0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([1e-5, 1e-3, float("nan")], {"logarithmic": True}, ["1e-5", "0.0001", "0.001"]),
        ([1e-4, 1e-4, 1e-4], {"logarithmic": True}, ["0.0001"]),
        ([1e-4, 1e-3, 1e-3], {"logarithmic": True}, ["0.0001", "0.0002", "0.0005", "0.001"]),
    ],
)
def test_charts_have_round_numbers_and_all_points(ys: list[float], more: dict[str, Any], labels: list[str]):
    line = Line(label="x", xs=[1, 2, 3], ys=ys, colour="one", kind="both")
    drawn = svg(Chart(name="x", title="X", explained="X", lines=[line], marks=[(2, "here")], **more))
    told = re.findall(r"<text[^>]*>([^<]+)</text>", drawn)
    assert told == [*labels, "1", "2", "3", "step", "here"]
    points = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)
    places = [(float(x), 180 - float(y)) for x, y in points]
    assert [*places] == sorted(places), "in the order of the steps"
    finite = [y for y in ys if math.isfinite(y)]
    assert len(places) == len(finite)
    by_height = sorted(zip(finite, (height for _, height in places), strict=True))
    assert [height for _, height in by_height] == sorted(height for _, height in places)
    assert all(0 < x < 288 and 0 < y < 180 for x, y in places)


def test_smoothing_keeps_means_and_skips_what_is_no_number():
    assert smoothed([3.0] * 50) == pytest.approx([3.0] * 50)
    rising = smoothed([float(value) for value in range(300)])
    assert rising[150] == pytest.approx(150) and rising[0] > 0
    assert smoothed([float("nan"), 1.0])[0] == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with browser() as opened:
        yield opened


def shown(page: Page) -> tuple[str, list[str]]:
    """What the slider says, and the moments whose pictures are seen."""
    seen = (
        "[...document.querySelectorAll('#strip figure')].filter(f => f.offsetWidth).map(f => f.dataset.step)"
    )
    return page.run("document.getElementById('shown').textContent"), sorted(set(page.run(seen)), key=int)


def test_the_slider_is_used_by_keyboard(whole: Callable[..., Path], page: Page):
    page.resize(1200)
    page.open(whole(HOSTILE))
    assert shown(page) == (f"step 8 of {STEPS}, chosen", ["8"])
    page.run("document.getElementById('moment').focus()")
    page.press("ArrowRight")
    assert shown(page) == (f"step {STEPS} of {STEPS}", [str(STEPS)])
    assert page.run("document.getElementById('later').disabled")
    page.press("Home")
    assert shown(page) == ("before training", ["0"])
    page.run("document.getElementById('later').focus()")
    page.press("Enter")
    assert shown(page) == (f"step 4 of {STEPS}", ["4"])
    page.run("document.getElementById('all').focus()")
    page.press("Enter")
    assert shown(page)[1] == ["0", "4", "8", str(STEPS)]
    page.run("location.hash = 'step-4'")
    page.run("new Promise(done => setTimeout(done))")
    assert page.run("document.title").endswith("report of a training")
    assert page.errors == []


def test_without_scripts_all_moments_are_there(whole: Callable[..., Path], page: Page):
    page.open(whole(), scripts=False)
    visible = "document.getElementById('controls').offsetWidth"
    assert page.run(visible) == 0
    assert shown(page)[1] == ["0", "4", "8", str(STEPS)]


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_the_page_fits_its_window_in_both_modes(whole: Callable[..., Path], page: Page, width: int):
    page.resize(width)
    paper = set()
    for dark in (False, True):
        page.emulate(dark=dark)
        page.open(whole(HOSTILE))
        assert page.run("document.documentElement.scrollWidth") <= width
        paper.add(page.run("getComputedStyle(document.body).backgroundColor"))
        line = "getComputedStyle(document.querySelector('.chart .stroke-one')).stroke"
        paper.add(page.run(line))
    assert len(paper) == 4
    assert page.errors == []


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard


def test_event_files_follow_the_history(tmp_path: Path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    told = history(tmp_path, [PLAIN])
    grows = History(prompts=told.prompts)
    events = EventFiles(tmp_path / "tensorboard")
    for step in told.steps:
        grows.steps.append(step)
        events.update(grows)
    events.update(told, checks=True)
    events.close()
    read = reading.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    losses = [(one.step, one.value) for one in read.Scalars("training/loss")]
    assert losses == [(step.step, pytest.approx(step.loss)) for step in told.steps]
    assert [one.value for one in read.Scalars("checks/score_at_0.8")] == [1.5]
    assert [one.step for one in read.Images("previews/0")] == [0, 4, 8, STEPS]
    assert [one.value for one in read.Scalars("previews/likeness")] == [
        pytest.approx(one.likeness) for one in told.previews
    ]


def test_without_tensorboard_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    events = EventFiles(tmp_path / "tensorboard")
    events.update(history(tmp_path, [PLAIN]))
    events.close()
    assert not (tmp_path / "tensorboard").exists()
