"""Previews are what serving draws with the same weights, also when the text encoders have left the device."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_and_utils import TokenMap
from sdxl.model.components import Components, load_components
from sdxl.serving.previews import GUIDANCE, STEPS, PreviewDrawer, drawer
from sdxl.training.token_rows import NewTokens
from tests.conftest import TINY_BASE

TOK = TokenMap.parse("TOK:2")
PROMPTS = ["a photo of TOK", "a red house on a blue background", "TOK, " + "a green cup " * 30, "a fish"]
"""The third has more than one chunk of tokens."""


@pytest.fixture(scope="module")
def components() -> Components:
    loaded = load_components(TINY_BASE, is_lora=True, device=torch.device("cpu"))
    NewTokens(loaded, TOK, "", torch.Generator().manual_seed(0))
    return loaded


def previews(components: Components, folder: Path, *, at_once: int) -> PreviewDrawer:
    return PreviewDrawer(components, TOK, PROMPTS, folder / "previews", side=64, seed=3, at_once=at_once)


def pixels(folder: Path, names: list[str]) -> list[np.ndarray]:
    return [np.asarray(Image.open(folder / name), dtype=float) for name in names]


@pytest.mark.parametrize("at_once", [1, 4])
def test_previews_are_what_serving_draws(
    components: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
):
    shortened = pixels(tmp_path, previews(components, tmp_path, at_once=at_once)(6).pictures)
    monkeypatch.setattr("sdxl.serving.previews.SHALLOW", ())
    told = previews(components, tmp_path, at_once=at_once)(7)
    assert told.step == 7 and told.pictures == [f"previews/step-000007-{i}.jpg" for i in range(4)]
    draw = drawer(components, TOK)
    whole = pixels(tmp_path, told.pictures)
    for number, prompt in enumerate(PROMPTS):
        file = tmp_path / f"{number}.jpg"
        draw(prompt, side=64, steps=STEPS, guidance=GUIDANCE, seed=3).save(file, quality=90)
        [ours], [served] = pixels(tmp_path, [told.pictures[number]]), pixels(tmp_path, [file.name])
        assert np.abs(ours - served).mean() < 0.5
        distances = [np.abs(shortened[number] - other).mean() for other in whole]
        assert 0.5 < distances[number] == min(distances)


def test_frozen_texts_need_no_text_encoders(components: Components, tmp_path: Path):
    drawing = previews(components, tmp_path, at_once=4)
    before = pixels(tmp_path, drawing(1).pictures)
    drawing.freeze_text()
    kept = [encoder.state_dict() for encoder in components.text_encoders]
    for encoder in components.text_encoders:
        encoder.to("meta")  # type: ignore[arg-type]
    try:
        after = pixels(tmp_path, drawing(2).pictures)
    finally:
        for encoder, state in zip(components.text_encoders, kept, strict=True):
            encoder.to_empty(device="cpu")
            encoder.load_state_dict(state)
    assert all(map(np.array_equal, before, after))
