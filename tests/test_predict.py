"""predict.py called as a function: base and fine-tunes in one process."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from predict import Predictor
from sdxl.errors import UserInputError
from sdxl.files.archives import unpack
from sdxl.model import fine_tune_files
from sdxl.serving.samplers import SCHEDULERS
from tests.conftest import TINY_BASE, call

SMALL = {
    "prompt": "a photo of TOK",
    "width": 64,
    "height": 64,
    "num_inference_steps": 2,
    "guidance_scale": 4.0,
}


@pytest.fixture(scope="module")
def tars(fine_tunes: dict[str, Path]) -> dict[str, Path]:
    """A full fine-tune and a LoRA, each with its tar."""
    return fine_tunes


def draw(predictor: Predictor, **inputs) -> list[np.ndarray]:
    files = call(predictor.run, **{**SMALL, "seed": 0, **inputs})
    return [np.array(Image.open(file)) for file in files]


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_base_and_fine_tunes_take_turns_without_a_trace(predictor: Predictor, tars: dict[str, Path]):
    base = draw(predictor)
    full = draw(predictor, replicate_weights=str(tars["full"]))
    lora = draw(predictor, replicate_weights=str(tars["lora"]))
    assert not equal(base, full)
    assert not equal(base, lora)
    assert not equal(full, lora)
    assert equal(draw(predictor), base)
    assert equal(draw(predictor, replicate_weights=str(tars["full"])), full)
    assert equal(draw(predictor, replicate_weights=str(tars["lora"])), lora)
    assert equal(draw(predictor), base)


def test_a_fine_tune_that_does_not_fit_leaves_the_base(
    predictor: Predictor, tars: dict[str, Path], tmp_path: Path
):
    base = draw(predictor)
    unpack(tars["full"], tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "unet.safetensors")
    weights["conv_in.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "broken" / "unet.safetensors")
    fine_tune_files.pack(tmp_path / "broken", tmp_path / "broken.tar")
    with pytest.raises(UserInputError, match=r"unet\.safetensors does not fit"):
        draw(predictor, replicate_weights=str(tmp_path / "broken.tar"))
    assert equal(draw(predictor), base)


def test_a_whole_unet_is_no_extra_lora(predictor: Predictor, tars: dict[str, Path]):
    for main in (None, str(tars["lora"])):
        with pytest.raises(UserInputError, match=r"full\.tar is a whole UNet"):
            draw(predictor, replicate_weights=main, extra_lora=[str(tars["full"])], extra_lora_scale=[0.3])


def test_a_prompt_without_the_fine_tunes_words_is_remarked(
    predictor: Predictor, tars: dict[str, Path], caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    for prompt, remarks in (("a photo of tok", 1), ("a photo of TOK", 0), ("a photo of <s0><s1>", 0)):
        caplog.clear()
        draw(predictor, replicate_weights=str(tars["lora"]), prompt=prompt)
        assert caplog.text.count("write TOK, in the same case") == remarks, prompt


def test_lora_scale_zero_is_nearly_the_embeddings_alone(predictor: Predictor, tars: dict[str, Path]):
    off = draw(predictor, replicate_weights=str(tars["lora"]), lora_scale=0.0, prompt="a red circle")
    assert equal(off, draw(predictor, prompt="a red circle"))
    half = draw(predictor, replicate_weights=str(tars["lora"]), lora_scale=0.5, prompt="a red circle")
    assert not equal(off, half)


def test_inputs_without_effect_are_told(
    predictor: Predictor, tars: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    useless = "lora_scale has no effect without a LoRA as replicate_weights."
    words = tmp_path / "words.safetensors"
    save_file({"clip_l": torch.zeros(1, 96), "clip_g": torch.zeros(1, 128)}, words)
    for weights, told in (
        (None, 1),
        (str(tars["full"]), 1),
        (str(words), 1),
        (str(tars["lora"]), 0),
    ):
        caplog.clear()
        draw(predictor, replicate_weights=weights, lora_scale=0.5, refine_steps=3)
        assert caplog.messages.count(useless) == told, weights
        assert caplog.messages.count("refine_steps has no effect without refine=base_image_refiner.") == 1
    caplog.clear()
    draw(predictor, replicate_weights=str(tars["lora"]))
    assert "no effect" not in caplog.text


def test_a_lora_of_the_text_encoders_has_a_strength_of_its_own(
    predictor: Predictor, tars: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    keys, random = {}, torch.Generator().manual_seed(0)
    for name, module in predictor.painter.tuned.pipeline.text_encoder.named_modules():
        if name.endswith("q_proj"):
            layer = f"lora_te1_text_model_{name.removeprefix('text_model.').replace('.', '_')}"
            keys[f"{layer}.lora_down.weight"] = torch.randn(4, module.in_features, generator=random)
            keys[f"{layer}.lora_up.weight"] = torch.randn(module.out_features, 4, generator=random)
    save_file(keys, tmp_path / "words.safetensors")
    given = {"replicate_weights": str(tmp_path / "words.safetensors"), "prompt": "a red fish"}
    base = draw(predictor, prompt="a red fish")
    assert equal(draw(predictor, **given, text_encoder_lora_scale=0.0), base)
    tuned = draw(predictor, **given)
    assert not equal(tuned, base)
    assert equal(draw(predictor, **given, lora_scale=0.5, text_encoder_lora_scale=1.0), tuned)
    also = {"extra_lora": [given.pop("replicate_weights")], "extra_lora_scale": [0.5], **given}
    assert equal(draw(predictor, **also, extra_lora_text_encoder_scale=[1.0]), tuned)
    assert equal(draw(predictor, **also, extra_lora_text_encoder_scale=[0]), base)
    assert "text_encoder" not in caplog.text
    lora = str(tars["lora"])
    draw(predictor, replicate_weights=lora, text_encoder_lora_scale=1.0)
    draw(predictor, extra_lora=[lora], extra_lora_text_encoder_scale=[1.0])
    assert "text_encoder_lora_scale has no effect: replicate_weights is no LoRA of the text" in caplog.text
    assert "extra_lora_text_encoder_scale has no effect: no LoRA in extra_lora is one of" in caplog.text


def test_tokens_count_in_the_negative_prompt_too(predictor: Predictor, tars: dict[str, Path]):
    weights = str(tars["full"])
    plain = draw(predictor, replicate_weights=weights, negative_prompt="stock")
    assert equal(plain, draw(predictor, replicate_weights=weights, negative_prompt="stock"))
    assert equal(
        draw(predictor, replicate_weights=weights, negative_prompt="TOK"),
        draw(predictor, replicate_weights=weights, negative_prompt="<s0><s1>"),
    )


def test_pictures_of_one_request_are_those_of_single_requests(predictor: Predictor):
    three = draw(predictor, num_outputs=3, seed=5)
    for index, picture in enumerate(three):
        single = draw(predictor, seed=5 + index)[0]
        assert np.abs(picture.astype(int) - single).max() <= 1  # sums of a batch may round differently
    assert not np.array_equal(three[0], three[1])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws_and_repeats(predictor: Predictor, scheduler: str):
    one = draw(predictor, scheduler=scheduler, num_inference_steps=4)
    assert equal(one, draw(predictor, scheduler=scheduler, num_inference_steps=4))
    assert one[0].std() > 1


def test_weights_given_at_setup_serve_requests_that_name_none(tars: dict[str, Path], predictor: Predictor):
    tuned = Predictor()
    tuned.setup(str(tars["full"]))  # type: ignore[arg-type]
    own = draw(tuned)
    assert equal(own, draw(predictor, replicate_weights=str(tars["full"])))
    assert not equal(draw(tuned, replicate_weights=str(tars["lora"])), own)
    assert equal(draw(tuned), own)


def test_unmarked_fine_tunes_are_read_the_old_way_and_leave_no_trace(
    predictor: Predictor, tars: dict[str, Path], tmp_path: Path
):
    """A fine-tune of 2023–24 says nothing of pooling: its pooled prompt is taken at the new token."""
    base, marked = draw(predictor), draw(predictor, replicate_weights=str(tars["full"]))
    unpack(tars["full"], tmp_path / "old")
    save_file(load_file(tmp_path / "old" / "embeddings.pti"), tmp_path / "old" / "embeddings.pti")
    fine_tune_files.pack(tmp_path / "old", tmp_path / "old.tar")
    old = {"replicate_weights": str(tmp_path / "old.tar"), "prompt": "TOK on a red background"}
    assert not equal(
        draw(predictor, **old), draw(predictor, **{**old, "replicate_weights": str(tars["full"])})
    )
    encoder = predictor.painter.tuned.pipeline.text_encoder_2
    draw(predictor, **old)
    assert encoder.config.eos_token_id == 2
    assert equal(draw(predictor, replicate_weights=str(tars["full"])), marked)
    assert equal(draw(predictor), base)
    assert encoder.config.eos_token_id == predictor.painter.tuned.pipeline.tokenizer_2.eos_token_id


def test_the_unet_file_loads_into_a_plain_pipeline(tars: dict[str, Path], tmp_path: Path):
    unpack(tars["full"], tmp_path / "out")
    pipe = StableDiffusionXLPipeline.from_pretrained(TINY_BASE, variant="fp16", dtype=torch.float32)
    result = pipe.unet.load_state_dict(load_file(tmp_path / "out" / "unet.safetensors"), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


def test_the_lora_file_loads_with_diffusers(tars: dict[str, Path], tmp_path: Path):
    unpack(tars["lora"], tmp_path / "out")
    pipe = StableDiffusionXLPipeline.from_pretrained(TINY_BASE, variant="fp16", dtype=torch.float32)
    pipe.load_lora_weights(str(tmp_path / "out"), weight_name="lora.safetensors")
    assert any("lora" in name for name, _ in pipe.unet.named_parameters())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"width": 100}, "width is 100"),
        ({"height": 8}, "height is 8"),
        ({"num_outputs": 5}, "num_outputs"),
        ({"scheduler": "EULER"}, "must be one of"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"replicate_weights": "/nowhere/trained_model.tar"}, "does not exist"),
        ({"replicate_weights": "data:application/x-tar;base64,####"}, "cannot be decoded"),
        ({"replicate_weights": "data:application/x-tar;base64,aGVsbG8="}, "data: URI is a text file: give"),
        ({"replicate_weights": "data:application/x-tar;base64,AAECAwQ="}, "neither a zip nor a tar"),
        ({"replicate_weights": "http://127.0.0.1:9/trained_model.tar"}, "could not be fetched"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(
    predictor: Predictor, tmp_path: Path, inputs: dict, message: str
):
    with pytest.raises(UserInputError, match=message):
        draw(predictor, **inputs)
    assert list((tmp_path / "workspace").iterdir()) == []


def test_tars_that_are_no_fine_tune_are_refused(predictor: Predictor, tmp_path: Path):
    (tmp_path / "note.txt").write_text("x")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "note.txt", "note.txt")
    with pytest.raises(UserInputError, match="holds neither"):
        draw(predictor, replicate_weights=str(tmp_path / "x.tar"))
    (tmp_path / "unet.safetensors").write_bytes(b"\x00" * 40)
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        tar.add(tmp_path / "unet.safetensors", "unet.safetensors")
    with pytest.raises(UserInputError, match="damaged"):
        draw(predictor, replicate_weights=str(tmp_path / "y.tar"))
