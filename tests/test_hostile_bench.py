"""The benchmark of hostile inputs runs through, and its inputs can be made again."""

import json
import subprocess
import sys
from pathlib import Path

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


def test_hostile_inputs_and_a_kill(tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks.hostile", "--inputs", "11", "--kills", "1"]
    subprocess.run(
        [*command, "--output", str(tmp_path / "r.json")], cwd=REPOSITORY, check=True, capture_output=True
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["inputs"] == result["used"] + result["refused"] == 11, result["what_was_bad"]
    assert result["used"] >= result["undamaged"] == 2
    assert (result["kills"], result["lost"]) == (1, 0), result["what_was_lost"]
