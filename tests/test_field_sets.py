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
from tests.field.sets import CASES, COLOURS, Case

CONFIG = PreprocessConfig(target_size=64, token_map=TokenMap.parse("TOK:2"))

KNOWN_GAPS = {
    "avif_in_table",
    "caption_suffix",
    "captions_txt_alone",
    "colon",
    "comma_in_last_row",
    "commas",
    "commas_caption_first",
    "cut_zip",
    "damaged_jsonl",
    "decomposed_names",
    "empty_cells",
    "empty_rows",
    "formats",
    "header_in_capitals",
    "huge_number",
    "json_beside",
    "json_without_caption",
    "jsonl",
    "lfs_pointer",
    "line_break_in_quotes",
    "lower_case",
    "metadata_csv",
    "names_without_utf8_flag",
    "other_case",
    "picture_itself",
    "psd_in_table",
    "same_column_twice",
    "same_column_with_space",
    "semicolons",
    "seven_zip",
    "stems",
    "table_of_another_name",
    "tabs",
    "tar_that_ends_with_a_zip",
    "text_column",
    "tsv",
    "txt_after_the_suffix",
    "txt_in_a_folder",
    "unreadable_table",
    "utf16",
    "web_page",
    "zip_in_zip",
}
"""Cases that are not handled as they should be yet. A case that starts to pass must leave this list."""


def nearest_colour(path: Path) -> int:
    """Which picture a prepared file shows."""
    with Image.open(path) as opened:
        mean = np.asarray(opened.convert("RGB"), dtype=float).mean((0, 1))
    return int(np.abs(np.array(COLOURS) - mean).sum(1).argmin())


def marked(case: Case):
    """The case, expected to fail if it is a known gap."""
    gap = pytest.mark.xfail(strict=True, reason="a known gap") if case.name in KNOWN_GAPS else ()
    return pytest.param(case, id=case.name, marks=gap)


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
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
