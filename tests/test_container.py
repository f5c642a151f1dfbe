"""What Cog puts into the image and sets in it. No image is built here: these are Docker's and Cog's rules for the files."""

import fnmatch
import re
from pathlib import Path, PurePosixPath

import pytest
import yaml

from sdxl.settings import VARIABLES
from tests.conftest import REPOSITORY
from tests.test_structure import imported

CONFIGS = ["cog.yaml", "cog.preprocess.yaml"]
REFUSED = (
    *("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONUNBUFFERED", "R8_*", "REPLICATE_*"),
    *("LIBRARY_PATH", "CUDA_*", "NVIDIA_*", "NV_*", "PGET_*", "HF_ENDPOINT", "HF_HUB_ENABLE_HF_TRANSFER"),
    *("KUBERNETES_*", "COG_OBSERVABILITY_*", "COG_TRACE_*", "COG_METRICS_*", "OTEL_*"),
)
"""Names that Cog refuses in `environment`: its pkg/config/env.go, and its page on environment variables."""
LARGEST_MB = 45
"""Of what a build copies from a clean clone: nearly all of it is the miniature."""


def environment(config: str) -> dict[str, str]:
    lines = yaml.safe_load((REPOSITORY / config).read_text())["environment"]
    pairs = dict(line.split("=", 1) for line in lines)
    assert len(pairs) == len(lines)
    return pairs


def ignored(path: str, rules: str = (REPOSITORY / ".dockerignore").read_text()) -> bool:
    """Whether Docker leaves `path` out: the last rule that matches it or a folder above it decides.

    Knows the kinds of rules that our file has: names, `*`, and `**/` in front of a name.
    """
    parts, found = PurePosixPath(path).parts, False
    for rule in [line.strip() for line in rules.splitlines()]:
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!").rstrip("/")
        if anywhere := pattern.startswith("**/"):
            pattern = pattern.removeprefix("**/")
        depth = pattern.count("/") + 1
        assert "**" not in pattern and not re.search(r"[?\[\\]", pattern), (
            "this test does not know such a rule"
        )
        starts = range(len(parts) - depth + 1) if anywhere else [0]
        if any(_matches(parts[start : start + depth], pattern.split("/")) for start in starts):
            found = not rule.startswith("!")
    return found


def _matches(parts: tuple[str, ...], names: list[str]) -> bool:
    return len(parts) == len(names) and all(map(fnmatch.fnmatchcase, parts, names))


@pytest.mark.parametrize("config", CONFIGS)
def test_cog_takes_our_variables(config: str):
    for name in environment(config):
        assert name in {*VARIABLES, "HF_HOME"}
        assert not any(fnmatch.fnmatchcase(name, pattern) for pattern in REFUSED)


@pytest.mark.parametrize("config", CONFIGS)
def test_what_outlives_a_container_is_under_src_and_in_neither_git_nor_the_image(config: str):
    in_git = (REPOSITORY / ".gitignore").read_text().splitlines()
    for folder in environment(config).values():
        inside = PurePosixPath(folder).relative_to("/src")
        assert ignored(str(inside / "x")) and ignored(str(inside))
        assert f"/{inside.parts[0]}/" in in_git or f"/{inside.parts[0]}/*" in in_git
    assert {"HF_HOME", "SDXL_CACHE", "SDXL_INPUTS"} <= environment(config).keys()


def test_states_of_trainings_outlive_the_container():
    assert environment("cog.yaml")["SDXL_STATE"].startswith("/src/")


def needed() -> set[Path]:
    """The entry points and all that they import from this project, with the files beside it that are no code."""
    found, new = set(), {REPOSITORY / f"{name}.py" for name in ("train", "predict", "preprocess", "export")}
    while new:
        found |= new
        names = {name for path in new for name in imported(path)}
        paths = {REPOSITORY.joinpath(*name.split(".")[:depth]) for name in names for depth in range(1, 5)}
        files = {path.with_suffix(".py") for path in paths} | {path / "__init__.py" for path in paths}
        new = {path for path in files if path.is_file()} - found
    beside = {file for path in found - {*REPOSITORY.glob("*.py")} for file in path.parent.iterdir()}
    return found | {file for file in beside if file.is_file()}


def test_the_image_holds_what_the_entry_points_need():
    files = {str(path.relative_to(REPOSITORY)) for path in needed()}
    assert {"sdxl/report/page.css", "sdxl/serving/painter.py", "dataset_and_utils.py"} <= files
    assert [file for file in files if ignored(file)] == []
    for file in (*CONFIGS, "requirements.txt", "base_models/tiny-sdxl/model_index.json"):
        assert not ignored(file)


def test_cog_can_build():
    """It writes to .cog, and refuses a .dockerignore that leaves that out."""
    assert not ignored(".cog") and not ignored(".cog/openapi_schema.json") and not ignored(".cog/tmp/x/a.txt")


@pytest.mark.parametrize(
    "path",
    [
        *(
            ".git/HEAD",
            ".venv/bin/python",
            "runs/x/log",
            "demo_out/a.png",
            "out/trained_model.tar",
            "weights.tar",
        ),
        *(
            "cache/sdxl/fine_tunes/x",
            "cache/states/x",
            "inputs/pictures.zip",
            "pictures.zip",
            "tests/conftest.py",
        ),
        *(
            "benchmarks/cases.py",
            "tiny_world/world.py",
            "docs/demo.jpg",
            "sdxl/__pycache__/a.pyc",
            "__pycache__/a",
        ),
    ],
)
def test_the_image_holds_nothing_else(path: str):
    assert ignored(path)


def test_the_image_takes_little_of_the_project():
    files = [path for folder in ("sdxl", "base_models") for path in (REPOSITORY / folder).rglob("*")]
    copied = [path for path in files if path.is_file() and not ignored(str(path.relative_to(REPOSITORY)))]
    assert sum(path.stat().st_size for path in copied) < LARGEST_MB * 10**6


def test_models_and_kernels_get_into_the_image_by_taking_away_number_signs():
    rules = (REPOSITORY / ".dockerignore").read_text()
    baked = re.sub(r"^# !", "!", rules, flags=re.MULTILINE)
    assert baked.count("\n!") == rules.count("\n!") + 2
    assert not ignored("cache/huggingface/hub/x", baked) and not ignored("cache/sdxl/compiled/x", baked)
    assert ignored("cache/states/x", baked) and ignored("cache/sdxl/urls/x", baked)
    paths = environment("cog.yaml")
    assert paths["HF_HOME"] == "/src/cache/huggingface" and paths["SDXL_CACHE"] == "/src/cache/sdxl"
