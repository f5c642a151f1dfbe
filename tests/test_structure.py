"""The rules of the house, held on the syntax trees."""

import ast
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

DOORS = {"train.py", "predict.py", "preprocess.py"}
SOURCES = sorted(
    path
    for pattern in ("*.py", "sdxl/*.py", "tools/*.py", "tiny_world/*.py", "benchmarks/*.py")
    for path in REPOSITORY.glob(pattern)
)
LAYERS = ["dataset_and_utils", "sdxl", "preprocess", "train", "predict", "demo"]
"""A module may import those before it in this list, and its own layer."""


def imported(path: Path) -> set[str]:
    """The top-level packages that a source imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            names.add((node.module or "").split(".")[0])
    return names


def layer(path: Path) -> str:
    return path.stem if path.parent == REPOSITORY else path.parent.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_only_the_doors_know_cog(path: Path):
    assert ("cog" in imported(path)) == (path.name in DOORS and path.parent == REPOSITORY)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_point_one_way(path: Path):
    ours = imported(path) & {*LAYERS, "tiny_world", "benchmarks", "tools", "tests"}
    name = layer(path)
    if name in LAYERS:
        above = set(LAYERS[LAYERS.index(name) + 1 :]) | {"tiny_world", "benchmarks", "tools", "tests"}
        assert not ours & above
    if name == "dataset_and_utils":
        assert not ours


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_files_stay_readable(path: Path):
    assert len(path.read_text().splitlines()) <= 350, "a file this long knows a second thing"
    assert ast.get_docstring(ast.parse(path.read_text())), "a module says what it knows"
