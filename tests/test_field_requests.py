"""Pictures, masks and weights as people send them: used as meant, or refused in one sentence."""

import base64
import http.server
import logging
import urllib.parse
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from predict import Predictor
from sdxl.errors import UserInputError
from sdxl.serving.canvas import Canvas, lay_out
from sdxl.serving.picture_files import read_inputs, read_parameters
from sdxl.serving.request import RANGES, LayoutOptions
from tests.cog_server import http_server
from tests.conftest import call
from tests.field.requests import BOX, CASES, HOLE, SIZE, Case, file, painted
from tests.field.weights import PAGE, WEIGHTS, WeightCase, lora, pickled


def is_one_sentence(said: str) -> bool:
    return "\n" not in said and len(said) <= 400 and said.endswith(".")


def canvas_of(case: Case, folder: Path) -> Canvas:
    paths = []
    for name, write in (("image", case.image), ("mask", case.mask)):
        (folder / name).mkdir()
        paths.append(None if write is None else write(folder / name))
    image, mask = read_inputs(paths[0], paths[1], folder / "fetched")
    return lay_out(LayoutOptions(image=image, mask=mask), native=64)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_masks_are_used_as_meant_or_refused(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    if case.repaints == "refused":
        with pytest.raises(UserInputError) as caught:
            canvas_of(case, tmp_path)
        said = str(caught.value)
        assert is_one_sentence(said)
    else:
        mask = canvas_of(case, tmp_path).mask
        said = caplog.text
        if case.repaints == "no mask":
            assert mask is None
            assert said == ""
        else:
            assert mask is not None
            values = np.asarray(mask) >= 128
            half = np.arange(SIZE[0]) >= SIZE[0] // 2
            meant = {"box": np.asarray(painted(0, 1, "L")), "all": np.ones((1, 1)), "half": half[None]}
            wrong = values != (np.broadcast_to(meant[case.repaints], values.shape) > 0)
            if case.repaints == "half":
                wrong = wrong[:, np.abs(np.arange(SIZE[0]) - SIZE[0] // 2) > 2]
            assert wrong.mean() < 0.01
            assert not (tmp_path / "fetched").exists()
    for part in case.says:
        assert part in said
    assert case.mask is not None or "mask is " not in said.replace("no mask is given", "")


SMALL = {"prompt": "a red fish", "num_inference_steps": 2, "guidance_scale": 4.0, "seed": 0}
SQUARE = {"width": 64, "height": 64}


def draw(predictor: Predictor, **inputs: object) -> list[np.ndarray]:
    files = call(predictor.run, **{**SMALL, **inputs})
    return [np.asarray(Image.open(path)) for path in files]


def test_a_hole_is_drawn_like_its_mask(predictor: Predictor, tmp_path: Path):
    hole = file(HOLE, "hole.png")(tmp_path)
    mask = file(painted((0, 0, 0, 0), "black", "RGBA"), "mask.png")(tmp_path)
    [one] = draw(predictor, image=hole)
    [other] = draw(predictor, image=hole, mask=mask)
    assert np.array_equal(one, other)
    kept = np.ones(SIZE[::-1], bool)
    kept[BOX[1] - 4 : BOX[3] + 4, BOX[0] - 4 : BOX[2] + 4] = False
    before = np.asarray(HOLE.convert("RGB"))
    assert np.array_equal(one[kept], before[kept])
    inside = (slice(BOX[1], BOX[3]), slice(BOX[0], BOX[2]))
    assert not np.array_equal(one[inside], before[inside])


@pytest.fixture(scope="module")
def reference(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """What the plain LoRA draws."""
    file = tmp_path_factory.mktemp("lora") / "plain.safetensors"
    file.write_bytes(lora())
    [drawn] = draw(predictor, **SQUARE, replicate_weights=str(file))
    [base] = draw(predictor, **SQUARE)
    assert np.abs(drawn.astype(int) - base).max() > 20
    return drawn


@pytest.mark.parametrize("case", WEIGHTS, ids=lambda case: case.name)
def test_weights_are_used_as_meant_or_refused(
    case: WeightCase, predictor: Predictor, reference: np.ndarray, tmp_path: Path
):
    source = str(case.write(tmp_path))
    if not case.says:
        [drawn] = draw(predictor, **SQUARE, replicate_weights=source)
        assert np.array_equal(drawn, reference)
        return
    for inputs in ({"replicate_weights": source}, {"extra_lora": [source]}):
        with pytest.raises(UserInputError) as caught:
            draw(predictor, **SQUARE, **inputs)
        said = str(caught.value)
        assert case.says in said
        assert is_one_sentence(said)


def test_downloads_are_named_after_their_url(predictor: Predictor, reference: np.ndarray, tmp_path: Path):
    """Also one whose name is that of a folder of the cache."""
    for name, data in {"dog.zip": PAGE, "content": lora(), "my%20dog.bin": pickled()}.items():
        (tmp_path / urllib.parse.unquote(name)).write_bytes(data)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http_server(handler) as url:
        [drawn] = draw(predictor, **SQUARE, replicate_weights=f"{url}/content?token=secret")
        assert np.array_equal(drawn, reference)
        for name, says in {
            "dog.zip": "dog.zip is a web page",
            "my%20dog.bin": "my dog.bin is a pickle",
        }.items():
            with pytest.raises(UserInputError, match=f"^{says}"):
                draw(predictor, **SQUARE, replicate_weights=f"{url}/{name}")


@pytest.mark.parametrize(
    "written",
    [base64.encodebytes, lambda data: base64.urlsafe_b64encode(data).rstrip(b"=")],
)
def test_weights_in_data_uris_are_decoded(predictor: Predictor, reference: np.ndarray, written):
    uri = f"data:application/octet-stream;base64,{written(lora()).decode()}"
    [drawn] = draw(predictor, **SQUARE, replicate_weights=uri)
    assert np.array_equal(drawn, reference)


def test_pictures_after_the_largest_seed_can_be_drawn_again(predictor: Predictor, tmp_path: Path):
    largest = RANGES["seed"][1]
    files = call(
        predictor.run, **{**SMALL, "seed": float(largest), "num_outputs": 2, "width": 64.0, "height": 64}
    )
    told = read_parameters(files[1])
    assert told is not None and "Seed: 0," in told
    [again] = draw(predictor, seed=0, width=64, height=64)
    assert np.abs(np.asarray(Image.open(files[1])).astype(int) - again).max() <= 1


def test_empty_files_are_not_given(predictor: Predictor):
    [plain] = draw(predictor, **SQUARE)
    [empty] = draw(
        predictor, **SQUARE, image="", mask="", replicate_weights="", extra_lora=[""], extra_lora_scale=[1.0]
    )
    assert np.array_equal(plain, empty)
