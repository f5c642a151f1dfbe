"""The studio without its page: sets of pictures, crops and masks, choices, processes."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import studio
from sdxl.data.dataset_folder import read_dataset_folder
from sdxl.errors import UserInputError
from sdxl.files.archives import unpack
from sdxl.studio import doors, trainings
from sdxl.studio.choices import Choice, as_texts, forecast
from sdxl.studio.crops import box, forget_mask, move_crop, paint_mask, painted_in, room
from sdxl.studio.drawing import Drawer
from sdxl.studio.drops import add
from sdxl.studio.picture_set import PictureSet
from sdxl.studio.projects import About, Projects
from sdxl.studio.starting_picture import inputs_for, opened
from sdxl.studio.taking import file_for
from sdxl.studio.trainings import Training
from tests.conftest import REPOSITORY, png, write_zip

HOSTILE = "=cmd()|'x' \u202e<b>é, \"q\".png"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> PictureSet:
    """A set from a zip: two captioned pictures, one of them wide with a mask on its right, the other with a hostile name."""
    folder = tmp_path_factory.mktemp("projects")
    mask = np.zeros((256, 512), np.uint8)
    mask[:, 400:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    rows = 'image_file,caption\nwide.png,a photo of REX\n"' + HOSTILE.replace('"', '""') + '",REX asleep\n'
    files = {
        "wide.png": png(1, (512, 256)),
        "wide.mask.png": (folder / "mask.png").read_bytes(),
        HOSTILE: png(2, (256, 256)),
        "captions.csv": rows,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDXL_BASE", "base_models/tiny-sdxl")
        patch.setenv("SDXL_WORKSPACE", str(folder / "unused"))
        found = PictureSet(Projects(folder).create())
        found.project.tell(About(name="Rex", kind="dog"))
        assert add(found, [write_zip(folder / "set.zip", files)]) == 2
    return found


def by_name(pictures: PictureSet, name: str) -> str:
    [key] = [one.key for one in pictures.pictures if one.name == name]
    return key


def mask_of(pictures: PictureSet, key: str) -> np.ndarray:
    file = pictures.mask(pictures.find(key))
    assert file is not None
    with Image.open(file) as opened:
        return np.asarray(opened)


def test_a_zip_becomes_a_set_and_a_set_the_archive_that_training_takes(pictures: PictureSet, tmp_path: Path):
    captions = {one.name: one.caption for one in pictures.pictures}
    assert captions == {"wide.png": "a photo of REX", HOSTILE: "REX asleep"}
    wide = by_name(pictures, "wide.png")
    assert room(pictures.find(wide)) == (0, 256)
    assert pictures.find(wide).crop_top_left == (0, 256), "the crop is placed around the mask"

    pictures.change(wide, caption="  REX\n on a \u200b beach ")
    pictures.change(by_name(pictures, HOSTILE), used=False)
    unpack(pictures.pack(tmp_path / "set.tar"), tmp_path / "set")
    [one] = read_dataset_folder(tmp_path / "set")
    assert one.caption == "REX on a beach" and one.mask is not None
    assert one.framing == pictures.find(wide).framing
    assert pictures.problems() == ["There is only 1 picture: 5 to 20 varied ones teach a subject far better."]
    with pytest.raises(UserInputError, match="<s0>, a placeholder token"):
        pictures.change(wide, caption="a photo of <s0>")
    with pytest.raises(UserInputError, match="not in the set any more"):
        pictures.change("9-9", caption="x")


def test_the_mask_moves_with_the_crop(pictures: PictureSet):
    key = by_name(pictures, "wide.png")
    assert mask_of(pictures, key)[0].tolist() == [0] * 144 + [255] * 112
    shown = pictures.prepared(pictures.find(key)).read_bytes()
    moved = move_crop(pictures, key, down=1.0, across=0.75)
    assert moved.crop_top_left == (0, 192) and pictures.prepared(moved).read_bytes() != shown
    assert mask_of(pictures, key)[0].tolist() == [0] * 208 + [255] * 48
    assert pictures.mask(move_crop(pictures, key, down=0.0, across=0.0)) is None, (
        "the crop shows nothing of it"
    )
    assert pictures.mask(move_crop(pictures, key, down=0.0, across=1.0)) is not None

    layer = Image.new("RGBA", (128, 128))
    layer.paste((255, 120, 40, 255), (0, 0, 64, 128))
    paint_mask(pictures, key, painted_in([layer]))
    assert mask_of(pictures, key)[5, [0, 120, 140, 255]].tolist() == [255, 255, 0, 0]
    paint_mask(pictures, key, Image.new("L", (256, 256)))
    assert pictures.mask(pictures.find(key)) is None
    forget_mask(pictures, pictures.find(key))


def test_a_box_is_a_mask():
    mask = np.asarray(box((200, 100), (10, 20, 50, 101)))
    assert mask.shape == (100, 200) and mask[20:, 20:100].min() == 255
    assert int(np.count_nonzero(mask)) == 80 * 80
    for edges in ((50, 0, 50, 100), (0, 90, 100, 10)):
        with pytest.raises(UserInputError, match="Nothing is in the box"):
            box((200, 100), edges)


def test_the_word_reaches_every_caption(pictures: PictureSet):
    wide, other = by_name(pictures, "wide.png"), by_name(pictures, HOSTILE)
    pictures.change(wide, caption="a photo of TOK, TOKens")
    pictures.change(other, caption="REX asleep")
    assert pictures.insert_word() == 1
    assert pictures.find(wide).caption == "a photo of REX, TOKens"
    pictures.change(wide, caption="on a beach")
    with pytest.raises(UserInputError, match="1 caption is without REX, and a picture without it"):
        pictures.require_word()
    assert pictures.insert_word() == 1
    assert pictures.find(wide).caption == "a photo of REX, on a beach"
    before = pictures.project.about
    pictures.project.tell(replace(before, name="Großer Hund 7!"))
    pictures.insert_word(instead_of="REX")
    assert pictures.find(other).caption == "GROER_HUND asleep"
    pictures.project.tell(before)
    pictures.insert_word(instead_of="GROER_HUND")
    pictures.require_word()


def test_a_picture_to_start_from_and_what_is_painted_over_it(tmp_path: Path):
    assert inputs_for(None, 0.5, tmp_path) == {}
    assert inputs_for({"background": Image.new("RGBA", (9, 9)), "layers": []}, 0.5, tmp_path) == {}
    (tmp_path / "wide.png").write_bytes(png(1, (4096, 512)))
    picture, layer = opened(tmp_path / "wide.png"), Image.new("RGBA", (2048, 256))
    assert picture.size == (2048, 256)
    editor = {"background": picture, "layers": [layer]}
    image = {"image": str(tmp_path / "start.png"), "prompt_strength": 0.5}
    assert inputs_for(editor, 0.5, tmp_path) == image, "nothing is painted"
    layer.paste((255, 120, 40, 255), (0, 0, 64, 256))
    assert inputs_for(editor, 0.5, tmp_path) == image | {"mask": str(tmp_path / "mask.png"), "mask_blur": 4}
    with Image.open(tmp_path / "mask.png") as mask:
        assert (mask.getpixel((5, 5)), mask.getpixel((500, 5))) == (255, 0)

    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (15_000, 14_000)).save(tmp_path / "huge.png")
    for name, told in {"text.png": "it is a text file", "huge.png": "more than 200 megapixels"}.items():
        with pytest.raises(UserInputError, match=told):
            opened(tmp_path / name)


def test_a_folder_keeps_its_folders_but_leaves_them_never(pictures: PictureSet, tmp_path: Path):
    (tmp_path / "x.png").write_bytes(png())
    with pytest.raises(UserInputError, match=r"What was dropped holds the unsafe path '\.\./\.\./x\.png'"):
        add(pictures, [tmp_path / "x.png"], names=["../../x.png"])
    assert len(pictures.pictures) == 2 and len([*pictures.folder.glob("*/dropped")]) == 1


@pytest.mark.parametrize(
    ("name", "word"), [("Rex", "REX"), ("", "TOK"), ("犬", "TOK"), ("Zoë B.", "ZOE_B"), ("x", "TOK")]
)
def test_a_name_becomes_a_word(name: str, word: str):
    assert About(name=name).word == word


@pytest.mark.parametrize("key", ["", "../../etc", "0" * 11, "G" * 12, None, 7])
def test_a_project_is_named_by_its_key_alone(tmp_path: Path, key: object):
    with pytest.raises(UserInputError, match="reload it"):
        Projects(tmp_path).require(key)
    assert Projects(tmp_path).open(key).folder.parent == tmp_path
    assert not any(tmp_path.iterdir())


def settings(side: int, choice: Choice, kind: str = "dog") -> dict:
    return studio.resolve(as_texts(choice.inputs(About(name="Rex", kind=kind), side)), 8, side)


def test_choices_become_the_settings_of_train():
    good, patient = settings(1024, Choice()), settings(1024, Choice(preset="patient"))
    assert (good["max_train_steps"], patient["max_train_steps"]) == (400, 1000)
    assert good["token_map"] == "REX:2" and good["token_init"] == "REX:dog"
    assert settings(256, Choice())["lora_lr"] == 2e-3, "the miniature has rates of its own"
    assert settings(1024, Choice(), kind="style")["caption_dropout"] == 0.1
    whole = settings(256, Choice(whole_unet=True, rank=4))
    assert whole["is_lora"] is False and whole["max_train_steps"] == 260
    own = settings(1024, Choice(steps=7, rank=3, more=" lora_rank = 5 \n\ncheckpointing_steps=2"))
    assert (own["max_train_steps"], own["lora_rank"], own["checkpointing_steps"]) == (7, 5, 2)
    for more, message in {
        "lora_rank": "is not a setting: write one name=value",
        "lora_rnak=1": "There is no input lora_rnak: did you mean lora_rank",
        "config=@/etc/passwd": "names a file",
        "input_images=x.zip": "names a file",
        "lora_rank=many": "lora_rank",
        "max_train_steps=0": "max_train_steps",
    }.items():
        with pytest.raises(UserInputError, match=message):
            settings(1024, Choice(more=more))


def test_the_forecast_says_what_it_goes_by():
    good = settings(1024, Choice())
    assert "400 steps: about 2 min 20 s on an H100" in forecast(good, None, has_gpu=True)
    assert "25 to 30 GB" in forecast(good, None, has_gpu=True)
    assert "no NVIDIA GPU" in forecast(good, None, has_gpu=False)
    assert "about 14 min 20 s, going by your last training" in forecast(good, 2.0, has_gpu=True)
    assert "12 GB" in forecast(settings(1024, Choice(save_memory=True)), None, has_gpu=True)
    assert "two processor cores" in forecast(settings(256, Choice()), None, has_gpu=False)


def test_a_process_outlives_the_one_that_started_it(tmp_path: Path):
    assert not doors.is_running(tmp_path)
    program = (
        "import sys; from pathlib import Path; from sdxl.studio import doors; "
        "print(doors.start([sys.executable, '-c', 'import time; time.sleep(600)'], Path(sys.argv[1])).pid)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, capture_output=True, check=True
    )
    assert doors.is_running(tmp_path)
    os.kill(int(done.stdout), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while doors.is_running(tmp_path):
        assert time.monotonic() < deadline
    with (tmp_path / doors.LOCK).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert doors.is_running(tmp_path)
        with pytest.raises(UserInputError, match="running already"):
            doors.start([sys.executable, "-c", ""], tmp_path)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("x\nError: x.zip is empty: add files.\nAt exit\n", "x.zip is empty: add files."),
        ("seed is 'x', but must be an integer. See --help.\n", "seed is 'x', but must be an integer."),
        ("Step 3\nStopped.\n", "It was stopped."),
        (
            "Training:  33%|███  | 3/9 [00:01<00:02]\n",
            "It ended unexpectedly in the middle of its work: another program ended it, or the memory was full.",
        ),
        ("Killed\n", "It ended unexpectedly. The last line of its log: Killed"),
        ("", "It ended unexpectedly. The last line of its log: it says nothing"),
    ],
)
def test_the_last_words_of_a_process_are_for_people(log: str, words: str):
    assert doors.last_words(log) == words


def test_what_draws_may_crash(tmp_path: Path):
    """A process that answers once with an error, and then ends."""
    program = 'print(\'{"error": "no"}\', flush=True); input(); input()'
    drawer = Drawer([sys.executable, "-c", f"import sys; {program}; sys.exit(3)"], tmp_path)
    with pytest.raises(UserInputError, match="no"):
        drawer.draw({"prompt": "x"}, tmp_path / "1")
    with pytest.raises(UserInputError, match="Drawing ended unexpectedly"):
        drawer.draw({"prompt": "x"}, tmp_path / "2")
    with pytest.raises(UserInputError, match="no"):
        drawer.draw({"prompt": "x"}, tmp_path / "3")
    drawer.free()
    assert threading.active_count() < 50


def test_a_training_that_died_can_go_on_and_one_without_result_is_not_taken_away(tmp_path: Path):
    training = Training(tmp_path / "1")
    training.folder.mkdir()
    (training.folder / "inputs.json").write_text(
        json.dumps({"inputs": {}, "resolved": {"max_train_steps": 9}})
    )
    (training.folder / doors.LOG).write_text(
        "Training UNet:  33%|███  | 3/9 [00:01<00:02,  1.83step/s, loss=0.1]\n"
    )
    now = training.progress
    assert (now.state, now.step, now.steps) == ("failed", 3, 9) and training.can_go_on
    assert training.stop() == "It does not run."
    with pytest.raises(UserInputError, match="no result yet"):
        file_for(training, "kohya")
    (training.folder / doors.LOG).write_text("Error: x.zip is empty: add files.\n")
    assert not training.can_go_on, "it would be refused again"
    (training.folder / "sdxl-train-1").mkdir()
    assert training.can_go_on, "it has a state"


def test_nothing_is_trained_without_pictures(tmp_path: Path):
    project = Projects(tmp_path).create()
    with pytest.raises(UserInputError, match="no pictures yet"):
        trainings.begin(project, {}, {})
    assert trainings.latest(project) is None
