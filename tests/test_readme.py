"""The README says what the code does."""

import pytest

from tests.conftest import REPOSITORY
from tools.inputs_table import table
from tools.speed_tables import tables

README = (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("component", ["TrainingInput", "Input"])
def test_the_tables_of_inputs_are_those_of_the_declarations(component: str):
    assert table(REPOSITORY, component) in README, "run `python -m tools.inputs_table` and paste its tables"


def test_the_tables_of_speed_are_those_of_the_results():
    for speeds in tables(REPOSITORY):
        assert speeds in README, "run `python -m tools.speed_tables` and paste its tables"


def test_commands_and_files_it_names_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in ("demo", "test", "serve", "serve-train"):
        assert f"make {target}" in README
        assert f"\n{target}:" in makefile
    for name in ("docs/demo.jpg", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "example_datasets/README.md"):
        assert (REPOSITORY / name).is_file()
