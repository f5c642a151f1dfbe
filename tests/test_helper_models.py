"""The captioner, segmenter and upscaler, as real classes with small weights; the face detector with its real weights."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.photographs import photograph
from sdxl.data.caption_text import join_caption, tokens_in
from sdxl.data.captioner import captioner
from sdxl.data.config import split_prompts
from sdxl.data.face_detector import find_faces
from sdxl.data.face_masks import face_salience
from sdxl.data.segmenter import segmenter
from sdxl.data.upscaler import TILE, upscaler
from sdxl.errors import DownloadError, UserInputError, WeightsError
from sdxl.files.hub import CAPTIONER, UPSCALER, helper_folder
from tests.tiny_helpers import write_captioner, write_segmenter


@pytest.fixture
def astronaut() -> Image.Image:
    return photograph("astronaut")


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32)


def test_enlarging_keeps_places(
    astronaut: Image.Image, upscaler_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SDXL_UPSCALER", str(upscaler_folder))
    small = astronaut.crop((100, 30, 308, 86))  # wider than a tile
    assert small.width > TILE
    with upscaler() as model:
        large, shifted = (values(model.enlarge(picture)) for picture in (small, small.crop((1, 1, 208, 56))))
        assert model.enlarge(small.crop((0, 0, 3, 5))).size == (12, 20)
    assert large.shape == (224, 832, 3)
    differences = {
        step: np.abs(large[step : step + 200, step : step + 800] - shifted[:200, :800]).mean()
        for step in (0, 2, 3, 4, 5, 6, 8)
    }
    assert (
        min(differences, key=differences.__getitem__) == 4
    )  # one pixel of the input becomes four of the output
    assert differences[4] < 0.5

    # No seams between tiles and no frame: columns differ as much as those of plain interpolation.
    plain = values(small.resize((832, 224), Image.Resampling.BICUBIC))
    steps, expected = (np.abs(np.diff(picture, axis=1)).mean((0, 2)) for picture in (large, plain))
    assert (steps < 2 * expected + 3).all()
    assert np.corrcoef(large.ravel(), plain.ravel())[0, 1] > 0.9


def test_a_caption_continues_its_prefix(astronaut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SDXL_CAPTIONER", str(write_captioner(tmp_path / "blip")))
    with captioner() as model:
        caption = model.caption(astronaut, "a photo of TOK,")
    assert caption.startswith("a photo of TOK, ")
    assert len(caption) > len("a photo of TOK, ")
    assert caption.lower().count("tok") == 1


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a photo of tok sitting on a sofa .", "a photo of TOK sitting on a sofa"),
        ("a photo of tok, a tok and a tok dog", "a photo of TOK a and a dog"),
        ("sitting on a sofa", "a photo of TOK sitting on a sofa"),
        ("a photo of tok", "a photo of TOK"),
        ("a photo of tokyo", "a photo of TOK yo"),
        ("stock of tok", "a photo of TOK stock of"),
    ],
)
def test_joining_captions(written: str, expected: str):
    assert join_caption("a photo of TOK", written) == expected


def test_names_and_accents_in_prefixes():
    assert join_caption("a photo of Zeke", "a photo of zeke zeke on a sofa") == "a photo of Zeke on a sofa"
    begun = "a photo of TOK in a café"
    assert join_caption(begun, "a photo of tok in a cafe with people") == f"{begun} with people"


def test_tokens_are_words_in_capitals():
    assert tokens_in("a photo of TOK next to MT_TOK, a Dog") == ["TOK", "MT_TOK"]
    assert tokens_in("A dog") == []


def test_masks_of_things(astronaut: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SDXL_SEGMENTER", str(write_segmenter(tmp_path / "clipseg")))
    with segmenter() as model:
        model.model.decoder.transposed_convolution.bias.data.fill_(0.0)
        one, both = (
            model.mask(astronaut, prompts, 1.0) for prompts in (["a dog"], ["a dog", "the moon over water"])
        )
        hard, soft = (model.mask(astronaut, ["a dog"], temperature) for temperature in (0.5, 5.0))
        model.model.decoder.transposed_convolution.bias.data.fill_(float("nan"))
        with pytest.raises(WeightsError, match="the segmenter returns infinite or undefined numbers"):
            model.mask(astronaut, ["a dog"], 1.0)
        model.model.decoder.transposed_convolution.bias.data.fill_(-100.0)
        assert model.mask(astronaut, ["a dog"], 1.0) is None
    for mask in (one, both, hard, soft):
        assert mask is not None
        assert mask.dtype == np.float32
        assert mask.ndim == 2
        assert mask.min() >= 0
        assert mask.max() == 1
    assert one is not None and hard is not None and soft is not None
    assert soft.min() > one.min() > hard.min() - 1e-12
    assert soft.std() < one.std()


def test_prompts_are_separated_by_commas():
    assert split_prompts("a dog, a red ball,") == ["a dog", "a red ball"]
    assert split_prompts(None) == split_prompts("") == []
    with pytest.raises(UserInputError, match="must name something"):
        split_prompts(" , ")


def overlap(one, two) -> float:
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    shared = max(0, width) * max(0, height)
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, two))
    return shared / (area - shared)


FACE = (178, 72, 270, 182)
"""The astronaut's face, marked by hand from ear to ear and from the hairline to the chin."""


def test_a_face_is_found_on_a_photograph(astronaut: Image.Image):
    (face,) = find_faces(astronaut.reduce(2))
    assert overlap([2 * side for side in face], FACE) >= 0.6
    turned = astronaut.rotate(15, center=(224, 127), resample=Image.Resampling.BICUBIC)
    (face,) = find_faces(turned.crop((74, 0, 374, 300)))
    assert overlap((face[0] + 74, face[1], face[2] + 74, face[3]), FACE) >= 0.6


def test_all_faces_are_found(astronaut: Image.Image):
    pair = Image.new("RGB", (350, 160), "grey")
    pair.paste(astronaut.crop((80, 0, 400, 320)).resize((160, 160)), (0, 0))
    pair.paste(astronaut.crop((80, 0, 400, 320)).resize((120, 120)), (215, 20))
    salience = face_salience(pair, 1.0)
    assert salience is not None
    assert len(salience.keep) == len(salience.face_heights) == 2
    mask = salience.mask
    assert mask.shape == (117, 256)
    assert mask[127 * 256 // 700, 144 * 256 // 700] > 0.9
    assert mask[0, 140] < 0.01


@pytest.mark.parametrize("name", ["chelsea", "coins"])
def test_cats_cups_and_coins_are_no_faces(name: str):
    assert face_salience(photograph(name), 1.0) is None


def test_missing_and_damaged_models_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DownloadError, match="set SDXL_UPSCALER"):
        helper_folder(UPSCALER)
    monkeypatch.setenv("SDXL_UPSCALER", str(tmp_path))
    with pytest.raises(DownloadError, match=r"no config\.json"):
        helper_folder(UPSCALER)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(WeightsError, match="the upscaler in"), upscaler():
        pass
    whole = write_captioner(tmp_path / "blip")
    monkeypatch.setenv("SDXL_CAPTIONER", str(whole))
    for file in whole.glob("*processor*"):
        file.unlink()
    with pytest.raises(WeightsError, match="the captioner in"), captioner():
        pass


def test_an_interrupted_download_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Offline, the hub's library returns a snapshot even if files of it are missing."""
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("SDXL_CAPTIONER", "some/model")
    with pytest.raises(DownloadError, match="is incomplete in the hub's cache"):
        helper_folder(CAPTIONER)
    (snapshot / "model.safetensors").write_bytes(b"x")
    assert helper_folder(CAPTIONER) == snapshot
