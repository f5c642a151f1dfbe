"""The structure of the code, checked on the syntax trees."""

import ast
import importlib
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

ENTRY_POINTS = {"train", "predict", "preprocess"}
ROOMS = {
    "errors": {"dataset_and_utils"},
    "settings": {"errors"},
    "gpu": {"errors"},
    "process": {"settings"},
    "workspace": {"errors", "settings"},
    "shutdown": {"settings"},
    "history": set(),
    "miniature": set(),
    "declared_inputs": {"errors", "settings", "files"},
    "command_line": {"declared_inputs", "errors", "files"},
    "files": {"errors", "settings"},
    "speed": {"errors", "settings", "gpu"},
    "model": {"dataset_and_utils", "errors", "settings", "workspace", "files", "gpu"},
    "data": {"dataset_and_utils", "errors", "settings", "files"},
    "training": {
        "dataset_and_utils",
        "errors",
        "settings",
        "gpu",
        "history",
        "shutdown",
        "declared_inputs",
        "files",
        "model",
        "data",
        "speed",
    },
    "serving": {
        "dataset_and_utils",
        "errors",
        "settings",
        "gpu",
        "history",
        "files",
        "model",
        "data",
        "speed",
    },
    "report": {
        "dataset_and_utils",
        "settings",
        "history",
        "workspace",
        "files",
        "model",
        "data",
        "training",
    },
    "training_run": {
        "dataset_and_utils",
        "settings",
        "history",
        "process",
        "workspace",
        "model",
        "data",
        "training",
        "serving",
        "report",
    },
    # A leaf: nothing imports it. It starts the entry points as processes.
    "studio": {
        "errors",
        "settings",
        "history",
        "miniature",
        "workspace",
        "files",
        "data",
        "report",
    },
}
"""Room, or module directly in `sdxl` → what it may import from this project besides itself."""
TOP = {
    "dataset_and_utils": set(),
    "preprocess": {"dataset_and_utils", "sdxl"},
    "train": {"dataset_and_utils", "sdxl", "preprocess"},
    "predict": {"dataset_and_utils", "sdxl"},
    "export": {"sdxl"},
    "demo": {"dataset_and_utils", "sdxl"},
    "studio": {"sdxl", "train", "predict"},
}
"""File at the top level → what it may import from this project."""
OUTSIDE = {"tiny_world", "benchmarks", "tools", "deploy"}
"""Packages that may import everything in the project. The product never imports them."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


PRODUCT = sorted(REPOSITORY.glob("*.py")) + sources("sdxl")
ALL = PRODUCT + sources(*OUTSIDE)


def by_name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def imported(path: Path) -> set[str]:
    """The full names of all modules that a source imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def room_of(module: str) -> str:
    """The room of a module in `sdxl`, such as "files" for "sdxl.files.archives.unpack"."""
    return module.split(".")[1]


@pytest.mark.parametrize("path", ALL, ids=by_name)
def test_only_the_entry_points_know_cog(path: Path):
    assert ("cog" in packages(path)) == (path.stem in ENTRY_POINTS and path.parent == REPOSITORY)


@pytest.mark.parametrize("path", ALL, ids=by_name)
def test_only_two_files_know_ray(path: Path):
    assert ("ray" in packages(path)) == (by_name(path) in {"deploy/ray_serve.py", "deploy/ray_train.py"})


@pytest.mark.parametrize("path", sources("sdxl"), ids=by_name)
def test_rooms_import_what_the_table_allows(path: Path):
    module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    if module == "sdxl.__init__":
        assert imported(path) == set()
        return
    room = room_of(module)
    assert room in ROOMS, "a new room needs a row in the table and a docstring that says what it knows"
    project = {*TOP, *OUTSIDE, "sdxl", "tests"}
    names = {room_of(name) if name.startswith("sdxl.") else name.split(".")[0] for name in imported(path)}
    ours = names & (set(ROOMS) | project)
    assert ours - {room} <= ROOMS[room]


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("*.py")), ids=by_name)
def test_top_level_files_import_what_the_table_allows(path: Path):
    ours = packages(path) & {*TOP, *OUTSIDE, "sdxl", "tests"}
    assert ours <= TOP[path.stem]


def test_the_table_names_every_room():
    rooms = {path.stem for path in (REPOSITORY / "sdxl").glob("*.py")} - {"__init__"}
    rooms |= {path.parent.name for path in (REPOSITORY / "sdxl").glob("*/__init__.py")}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("path", sources("sdxl"), ids=by_name)
def test_settings_alone_read_the_environment(path: Path):
    """`torchrun` reads its own variables, and `process` and `command_line` set some."""
    names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    allowed = path.stem in ("settings", "process", "command_line", "torchrun")
    assert allowed or not names & {"environ", "getenv"}


def test_the_recipe_is_short_and_free_of_machinery():
    text = (REPOSITORY / "sdxl" / "training" / "recipe.py").read_text()
    functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    recipe = functions["fine_tune"]
    assert recipe.end_lineno is not None and recipe.end_lineno - recipe.lineno + 1 <= 80
    machinery = [
        word for word in ("graph", "capture", "cuda", "autocast", "zero_grad") if word in text.lower()
    ]
    assert not machinery, "how a step is computed belongs in step.py"


@pytest.mark.parametrize("path", ALL, ids=by_name)
def test_files_stay_readable(path: Path):
    text = path.read_text()
    tree = ast.parse(text)
    # Cog reads the inputs of an entry point from its source, so they must stand there one by one.
    declared = [
        function.body[0].lineno - function.lineno
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and path.stem in ENTRY_POINTS
    ]
    lines = len(text.splitlines()) - max(declared, default=0)
    assert lines <= 350, "the file is too long: move its second topic out"
    assert ast.get_docstring(tree), "the module needs a docstring"


@pytest.mark.parametrize("room", sorted(path.parent for path in (REPOSITORY / "sdxl").glob("*/__init__.py")))
def test_a_room_says_what_it_knows_and_what_not(room: Path):
    docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    assert "Knows" in docstring
    assert "does not know" in docstring


@pytest.mark.parametrize("path", sources("benchmarks", "tools"), ids=by_name)
def test_benchmarks_and_tools_import(path: Path):
    """Tests rarely run them, so a renamed function could break them unnoticed."""
    importlib.import_module(".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
