"""The whole preprocessor: masks, crops, captions, sizes, the dataset folder, the report."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import preprocess
from benchmarks.photographs import photograph
from dataset_and_utils import TokenMap
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.errors import DatasetError, DownloadError, UserInputError
from sdxl.files.archives import unpack
from sdxl.model.components import load_components
from sdxl.training.examples import cache_examples
from tests.conftest import TINY_BASE, call, png, write_zip
from tests.tiny_helpers import write_captioner, write_segmenter


def jpeg(name: str, size: tuple[int, int] | None = None) -> bytes:
    picture = photograph(name)
    buffer = io.BytesIO()
    (picture.resize(size) if size else picture).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def mask_png(size: tuple[int, int], box: tuple[int, int, int, int]) -> bytes:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return buffer.getvalue()


def run(tmp_path: Path, archive: Path, name: str = "out", **inputs) -> Path:
    """Run the entry point and unpack its tar; return the folder."""
    tar = call(preprocess.Preprocessor().run, files=archive, **{"target_size": 64, **inputs})
    unpack(tar, tmp_path / name)
    return tmp_path / name


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("L" if ".mask." in path.name else "RGB"), dtype=np.float32)


def test_faces_are_masked_and_never_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    astronaut = photograph("astronaut").reduce(2)
    wide = Image.new("RGB", (700, 256), "grey")
    wide.paste(astronaut, (444, 0))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    archive = write_zip(tmp_path / "x.zip", {"0.png": buffer.getvalue(), "1.jpg": jpeg("coffee", (300, 200))})
    out = run(tmp_path, archive, target_size=128, use_face_detection_instead=True)
    mask = picture(out / "0.mask.png")
    assert mask.shape == picture(out / "0.src.png").shape[:2] == (128, 128)
    _, columns = np.nonzero(mask > 127)
    assert columns.min() > 0
    assert columns.max() < 127
    assert 0 < (mask > 127).mean() < 0.2
    assert (picture(out / "1.mask.png") == 255).all()
    assert "No face was found in 1.jpg" in caplog.text
    table = pd.read_csv(out / "captions.csv")
    assert table.loc[0, "crop_left"] > 111  # of the 222 pixels outside the crop


def test_things_are_masked_by_the_segmenter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SDXL_SEGMENTER", str(write_segmenter(tmp_path / "clipseg")))
    own = mask_png((96, 80), (0, 0, 48, 80))
    files = {"0.src.png": png(0), "0.mask.png": own, "1.png": png(1)}
    out = run(tmp_path, write_zip(tmp_path / "x.zip", files), mask_target_prompts="a dog, a cat")
    assert picture(out / "1.mask.png").shape == (64, 64)
    assert picture(out / "1.mask.png").max() > 0
    given = picture(out / "0.mask.png")
    assert given[:, :20].min() > 250  # the mask in the archive stays: its left half is white
    assert given[:, 50:].max() < 5


def test_masks_that_were_asked_for_are_never_omitted_silently(tmp_path: Path):
    archive = write_zip(tmp_path / "x.zip", {"1.png": png(1)})
    with pytest.raises(DownloadError, match="set SDXL_SEGMENTER"):
        run(tmp_path, archive, mask_target_prompts="a dog")
    assert list((tmp_path / "workspace").iterdir()) == []


def test_without_models_the_rest_works_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    out = run(tmp_path, write_zip(tmp_path / "x.zip", {"1.png": png(1)}), target_size=128)
    assert picture(out / "0.src.png").shape == (128, 128, 3)
    assert pd.read_csv(out / "captions.csv").loc[0, "caption"] == "a photo of TOK"
    assert "enlarged by plain interpolation" in caplog.text
    assert 'All pictures get the caption "a photo of TOK"' in caplog.text


def test_with_models_pictures_are_captioned_and_enlarged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upscaler_folder: Path
):
    monkeypatch.setenv("SDXL_CAPTIONER", str(write_captioner(tmp_path / "blip")))
    monkeypatch.setenv("SDXL_UPSCALER", str(upscaler_folder))
    small = jpeg("astronaut", (80, 60))
    archive = write_zip(tmp_path / "x.zip", {"0.jpg": small})
    out = run(tmp_path, archive, target_size=128)
    caption = pd.read_csv(out / "captions.csv").loc[0, "caption"]
    assert caption.startswith("a photo of TOK ")
    plain = Image.open(io.BytesIO(small)).crop((10, 0, 70, 60)).resize((128, 128), Image.Resampling.LANCZOS)
    drawn, expected = picture(out / "0.src.png"), np.asarray(plain, np.float32)
    assert np.corrcoef(drawn.ravel(), expected.ravel())[0, 1] > 0.9  # the same place
    assert np.abs(drawn - expected).mean() > 0.5  # drawn by the model


def test_given_captions_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SDXL_CAPTIONER", str(write_captioner(tmp_path / "blip")))
    archive = write_zip(tmp_path / "x.zip", {"1.png": png(1), "1.txt": "my TOK"})
    assert pd.read_csv(run(tmp_path, archive) / "captions.csv").loc[0, "caption"] == "my TOK"


def test_placeholders_are_refused_as_captions(tmp_path: Path):
    with pytest.raises(UserInputError, match=r"holds <s0>.*write a word such as TOK"):
        run(tmp_path, write_zip(tmp_path / "x.zip", {"1.png": png(1)}), caption_text="a photo of <s0>")


def test_a_prepared_tar_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upscaler_folder: Path
):
    monkeypatch.setenv("SDXL_UPSCALER", str(upscaler_folder))
    files = {"a.src.png": png(0, (150, 100)), "b.jpg": jpeg("coffee")}
    files["a.mask.png"] = mask_png((150, 100), (100, 0, 150, 100))
    files["captions.csv"] = "image_file,caption\na.src.png,left TOK\nb.jpg,coffee TOK\n"
    first = run(tmp_path, write_zip(tmp_path / "x.zip", files), target_size=128, bucketing=True)
    members = {path.name: path.read_bytes() for path in first.iterdir()}
    assert {"contact_sheet.jpg", "advice.txt"} < set(members)
    config = PreprocessConfig(target_size=128, token_map=TokenMap.parse("TOK:2"))
    again = prepare_dataset(write_zip(tmp_path / "y.zip", members), tmp_path / "again", config=config)
    kept = {path.name: path.read_bytes() for path in again.iterdir()}
    assert kept == {
        name: members[name] for name in members if name not in ("contact_sheet.jpg", "advice.txt")
    }
    components = load_components(TINY_BASE, is_lora=True, device=torch.device("cpu"))
    examples = cache_examples(again, components, TokenMap.parse("TOK:2"), seed=0).examples
    assert examples[0].time_ids.tolist() == [100, 150, 5, 0, 96, 160]
    assert examples[0].latents.shape == (4, 12, 20)
    assert examples[0].mask[0, :, -1].min() == 1
    assert examples[0].mask[0, :, 0].max() == 0

    smaller = PreprocessConfig(target_size=64, crop_based_on_salience=False)
    third = prepare_dataset(tmp_path / "y.zip", tmp_path / "third", config=smaller)
    row = pd.read_csv(third / "captions.csv").iloc[0]
    assert (row["original_height"], row["original_width"]) == (100, 150)
    assert picture(third / row["image_file"]).shape == (64, 64, 3)
    assert (row["crop_top"], row["crop_left"]) == (round(5 * 64 / 96), (round(160 * 64 / 96) - 64) // 2)


def test_a_prepared_set_gets_masks_that_are_asked_for(tmp_path: Path):
    first = run(tmp_path, write_zip(tmp_path / "x.zip", {"0.jpg": jpeg("astronaut")}), target_size=256)
    assert not (first / "0.mask.png").exists()
    members = {path.name: path.read_bytes() for path in first.iterdir()}
    archive = write_zip(tmp_path / "y.zip", members)
    again = run(tmp_path, archive, "again", target_size=256, use_face_detection_instead=True)
    assert (again / "0.src.png").read_bytes() == members["0.src.png"]
    mask = picture(again / "0.mask.png")
    assert mask.max() == 255 and 0.01 < (mask > 127).mean() < 0.5


def off_centre() -> dict[str, bytes]:
    """A wide picture whose mask is white at the far right only."""
    return {"0.png": png(0, (400, 100)), "0.mask.png": mask_png((400, 100), (350, 20, 390, 80))}


def test_masks_are_never_black_and_faces_never_cut_even_in_centred_crops(tmp_path: Path, caplog):
    astronaut = photograph("astronaut").reduce(2)
    wide = Image.new("RGB", (700, 256), "grey")
    wide.paste(astronaut, (444, 0))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    archive = write_zip(tmp_path / "x.zip", {"0.png": buffer.getvalue()})
    centred = {"target_size": 128, "crop_based_on_salience": False}
    assert (
        picture(run(tmp_path, archive, **centred, use_face_detection_instead=True) / "0.mask.png").max()
        == 255
    )
    archive = write_zip(tmp_path / "y.zip", off_centre())
    assert picture(run(tmp_path, archive, "own", **centred) / "0.mask.png").max() == 255
    assert "The centre of 0.png shows nothing of its mask" in caplog.text


@pytest.mark.parametrize("name", ["0.mask.png", "0.png.MASK.PNG", "0.mask.bmp"])
def test_masks_are_found_by_the_name_of_their_picture(tmp_path: Path, name: str):
    files = off_centre()
    content = io.BytesIO()
    Image.open(io.BytesIO(files.pop("0.mask.png"))).save(content, "BMP" if name.endswith("bmp") else "PNG")
    out = run(tmp_path, write_zip(tmp_path / "x.zip", files | {name: content.getvalue()}))
    written = {path.name for path in out.glob("*.png")}
    assert written - {"0.large.png"} == {"0.mask.png", "0.src.png"}


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize(
    ("mode", "ground", "paint"), [("RGBA", "#00000000", "black"), ("RGB", "black", "red")]
)
def test_masks_in_any_paint_become_grey_masks(
    tmp_path: Path, mode: str, ground: str, paint: str, prepared: bool
):
    """Also in a dataset folder, whose grey masks are copied."""
    mask = Image.new(mode, (64, 64), ground)
    mask.paste(paint, (0, 0, 32, 64))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    table = (
        "image_file,caption,original_height,original_width,crop_top,crop_left\n0.src.png,a TOK,64,64,0,0\n"
    )
    files = {"0.src.png": png(0, (64, 64)), "0.mask.png": buffer.getvalue()}
    out = run(tmp_path, write_zip(tmp_path / "x.zip", files | ({"captions.csv": table} if prepared else {})))
    with Image.open(out / "0.mask.png") as opened:
        assert opened.mode == "L"
    grey = picture(out / "0.mask.png")
    assert grey[:, :32].min() == 255 and grey[:, 32:].max() == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.png": png(0), "1.mask.png": png(1)}, r"1\.mask\.png is the mask of no picture"),
        ({"0.png": png(0), "0.mask.png": png(1), "0.png.mask.png": png(1)}, "has several masks"),
        ({"0.png": png(0), "0.mask.png": mask_png((96, 80), (0, 0, 0, 0))}, "is black"),
        ({"0.png": png(0), "0.mask.png": b"<html>"}, r"0\.mask\.png cannot be .* because it is a web page"),
    ],
)
def test_masks_without_a_picture_and_black_masks_are_refused(tmp_path: Path, files: dict, message: str):
    with pytest.raises(DatasetError, match=message):
        run(tmp_path, write_zip(tmp_path / "x.zip", files))


def test_captions_name_a_token_once(tmp_path: Path):
    archive = write_zip(tmp_path / "x.zip", {"0.png": png(0)})
    with pytest.raises(UserInputError, match="names TOK twice"):
        run(tmp_path, archive, caption_text="TOK, a photo of TOK")


def test_different_small_things_on_a_plain_background_are_not_nearly_equal(tmp_path: Path):
    files = {}
    for index, place in enumerate([(20, 20, 60, 60), (70, 70, 110, 110)]):
        drawn = Image.new("RGB", (128, 128), "white")
        drawn.paste("navy", place)
        buffer = io.BytesIO()
        drawn.save(buffer, "PNG")
        files |= {f"{index}/thing.png": buffer.getvalue(), f"{index}/same.png": buffer.getvalue()}
    advice = (run(tmp_path, write_zip(tmp_path / "x.zip", files)) / "advice.txt").read_text()
    assert advice.count("nearly the same") == 2
    assert "0/thing.png is nearly the same as 0/same.png" in advice


def test_wrong_numbers_in_a_table_are_refused(tmp_path: Path):
    rows = "image_file,caption,original_height,original_width,crop_top,crop_left\n0.src.png,TOK,64,-5,0,0\n"
    archive = write_zip(tmp_path / "x.zip", {"0.src.png": png(0, (64, 64)), "captions.csv": rows})
    with pytest.raises(DatasetError, match=r"row of 0\.src\.png"):
        run(tmp_path, archive)


def test_masks_must_have_their_pictures_size(tmp_path: Path):
    files = {"0.src.png": png(0), "0.mask.png": mask_png((50, 50), (0, 0, 9, 9))}
    with pytest.raises(DatasetError, match=r"50×50, but 0\.src\.png is 96×80"):
        run(tmp_path, write_zip(tmp_path / "x.zip", files))


def test_equal_inputs_give_equal_tars(tmp_path: Path):
    small = {"astronaut": (192, 192), "rocket": (160, 106)}
    files = {f"{index}.jpg": jpeg(name, size) for index, (name, size) in enumerate(small.items())}
    archive = write_zip(tmp_path / "x.zip", files)
    one, two = (
        call(preprocess.Preprocessor().run, files=archive, target_size=96, use_face_detection_instead=True)
        for _ in range(2)
    )
    assert one.read_bytes() == two.read_bytes()


def test_advice_names_the_file_and_the_remedy(tmp_path: Path):
    sharp = photograph("coffee").resize((900, 600), Image.Resampling.BICUBIC)
    buffers = {}
    for name, made in {
        "sharp.png": sharp,
        "twin.png": sharp.resize((840, 560)),
        "blurred.png": photograph("chelsea").reduce(12).resize((700, 600), Image.Resampling.BICUBIC),
        "dark.png": photograph("rocket").point([value // 8 for value in range(256)] * 3),
        "tiny.png": photograph("astronaut").resize((60, 60)),
        "wide.png": photograph("astronaut")
        .crop((0, 0, 512, 256))
        .resize((1024, 512), Image.Resampling.BICUBIC),
    }.items():
        buffer = io.BytesIO()
        made.save(buffer, "PNG")
        buffers[name] = buffer.getvalue()
    rows = "".join(f"{name},{'a cup' if name == 'sharp.png' else 'TOK'}\n" for name in buffers)
    files = {**buffers, "captions.csv": "image_file,caption\n" + rows}
    advice = (run(tmp_path, write_zip(tmp_path / "x.zip", files), target_size=512) / "advice.txt").read_text()
    assert "twin.png is nearly the same as sharp.png" in advice
    assert "blurred.png is blurred" in advice
    assert "dark.png is very dark" in advice
    assert "tiny.png is tiny (60×60) and was enlarged 8.5 times" in advice
    assert "wide.png (1024×512) lost 50% in the crop" in advice
    assert 'sharp.png has the caption "a cup" without TOK' in advice
    assert "tiny.png (60×60), wide.png (1024×512) differ in shape from the rest" in advice
    assert len(advice.splitlines()) == 7, advice
    same = {name: content for name, content in files.items() if name != "captions.csv"}
    advice = run(tmp_path, write_zip(tmp_path / "y.zip", same), target_size=512) / "advice.txt"
    assert 'All captions are "a photo of TOK"' in advice.read_text()
