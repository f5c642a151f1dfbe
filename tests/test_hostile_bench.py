"""The benches of hostile inputs and of killed trainings run through, and the inputs can be made again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hostile_damage import Materials, pack
from benchmarks.hostile_inputs import CONTROL_EVERY, make
from tests.conftest import REPOSITORY


def test_inputs_can_be_made_again():
    files = {"lora.safetensors": b"x", "embeddings.pti": b"y", "special_params.json": b"{}"}
    materials = Materials(pack(files, "tar"))
    made = [make(0, index, materials) for index in range(60)]
    again = [make(0, index, materials) for index in range(60)]
    assert [one.damage for one in made] == [one.damage for one in again]
    assert all(
        one.content == other.content and one.given == other.given
        for one, other in zip(made, again, strict=True)
    )
    assert [bool(one.damage) for one in made] == [index % CONTROL_EVERY > 0 for index in range(60)]
    assert {one.door for one in made} == {"dataset", "weights", "request"}


BENCHES = """
import sys
from benchmarks import hostile, resumed_kills

base, folder = sys.argv[1:]
hostile.main(["--inputs", "11", "--kills", "1", "--output", f"{folder}/hostile.json"])
few = ["--trainings", "1", "--most-kills", "1", "--kind", "lora"]
resumed_kills.main([*few, "--base", base, "--output", f"{folder}/resumed.json"])
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, narrow_base: Path) -> dict[str, dict[str, Any]]:
    """What both benches wrote. They fork, so they share a process that is not this one."""
    folder = tmp_path_factory.mktemp("benches")
    command = [sys.executable, "-c", BENCHES, str(narrow_base), str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("hostile", "resumed")}


def test_hostile_inputs_and_a_kill(results: dict[str, dict[str, Any]]):
    result = results["hostile"]
    assert result["inputs"] == result["used"] + result["refused"] == 11, result["what_was_bad"]
    assert result["used"] >= result["undamaged"] == 2
    assert (result["kills"], result["lost"]) == (1, 0), result["what_was_lost"]


def test_a_killed_training_goes_on_to_the_last_bit(results: dict[str, dict[str, Any]]):
    result = results["resumed"]
    assert (result["kills"], result["wrong"]) == (1, 0), result["what_was_wrong"]
