"""Archives as people bring them, through the preparation of a training: used as meant, or refused in one sentence."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_and_utils import TokenMap, UserInputError
from preprocess import prepare_dataset
from sdxl.data.config import PreprocessConfig
from sdxl.data.dataset_folder import read_dataset_folder
from tests.field import sets, sets_of_programs
from tests.field.sets import COLOURS, Case

CONFIG = PreprocessConfig(target_size=64, token_map=TokenMap.parse("TOK:2"))


def nearest_colour(path: Path) -> int:
    """Which picture a prepared file shows."""
    with Image.open(path) as opened:
        mean = np.asarray(opened.convert("RGB"), dtype=float).mean((0, 1))
    return int(np.abs(np.array(COLOURS) - mean).sum(1).argmin())


@pytest.mark.parametrize("case", [*sets.CASES, *sets_of_programs.CASES], ids=lambda case: case.name)
def test_a_set_is_used_as_meant_or_refused(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    archive = case.write(tmp_path)
    caplog.set_level(logging.INFO)
    if case.refused:
        with pytest.raises(UserInputError) as caught:
            prepare_dataset(archive, tmp_path / "dataset", config=CONFIG)
        said = str(caught.value)
        assert "\n" not in said
        assert len(said) <= 400
        assert said[-1] == "."
    else:
        folder = prepare_dataset(archive, tmp_path / "dataset", config=CONFIG)
        learned = {nearest_colour(one.picture): one.caption for one in read_dataset_folder(folder)}
        assert learned == dict(case.captions)
        said = caplog.text
    for part in case.says:
        assert part.lower() in said.lower()
