"""The README, docs/ and CONTRIBUTING say what the code does: tables, commands, links, names, and in plain sentences."""

import ast
import functools
import itertools
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch.distributed.run import get_args_parser

import dataset_and_utils
import export
import predict
import train
from predict import Predictor
from preprocess import Preprocessor
from sdxl.command_line import run_command_line
from sdxl.declared_inputs import declared_inputs
from sdxl.settings import VARIABLES
from tests.conftest import REPOSITORY
from tools import inputs_table, speed_tables
from tools.page_blocks import with_blocks

LONGEST_README = 150
"""Lines: the README is one page."""
LONGEST_SENTENCE = 30
"""Words."""
STILTED = (
    "door",
    "doors",
    "embedded base",
    "in the place of",
    "parted by",
    "whole number",
    "gone through",
    "beside it",
)
"""Words and turns that these pages once used and that readers stumble over."""
MESSAGES_OF_OTHERS = {"CUDA out of memory", "Failed to find C compiler"}
"""Messages of PyTorch and Triton that docs/troubleshooting.md quotes."""
ENTRY_POINTS: dict[str, Callable[..., Any]] = {
    "train": train.train,
    "predict": Predictor().run,
    "preprocess": Preprocessor().run,
}

DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
READMES = [REPOSITORY / folder / "README.md" for folder in (".", "example_datasets", "inputs", "tiny_world")]
PAGES = [*READMES, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md", *DOCS]

_FENCED = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_CODE_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\[([^\]]*)\]\(([^)]+)\)")


def by_name(value: object) -> str:
    """A page's path, or the beginning of a command, as the name of a test case."""
    if isinstance(value, Path):
        return str(value.relative_to(REPOSITORY))
    return " ".join(str(value).split()[:3])


def code(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language in a page."""
    return [match[3] for match in _FENCED.finditer(page.read_text()) if match[2] == language]


def without_code(page: Path) -> str:
    return re.sub(r"^    .*$", "", _FENCED.sub("", page.read_text()), flags=re.MULTILINE)


COMMANDS = [
    (page, line)
    for page in PAGES
    for block in code(page, "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


# ---------------------------------------------------------------------------------------------------------------------
# Tables


@pytest.mark.parametrize("tool", [inputs_table, speed_tables], ids=["inputs_table", "speed_tables"])
def test_generated_tables_are_up_to_date(tool: Any):
    page = (REPOSITORY / tool.PAGE).read_text()
    assert with_blocks(page, tool.blocks(REPOSITORY)) == page, f"run `python -m {tool.__name__} --write`"


def test_a_page_without_its_block_is_refused():
    with pytest.raises(ValueError, match="one"):
        with_blocks("No block here.", {"one": "text"})


def test_the_readme_is_one_page():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= LONGEST_README


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=by_name)
def test_commands_work(page: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Command lines of the entry points are parsed by the real parser; make targets and modules exist."""
    words = shlex.split(line)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    match words:
        case ["cog", ("train" | "run") as name, *arguments]:
            own = without_cogs_options(arguments)
            assert_accepted("predict" if name == "run" else name, own, tmp_path, monkeypatch)
        case ["cog", "build", *arguments]:
            assert without_cogs_options(arguments) == []
        case ["docker", "run", *arguments]:
            assert_container(arguments)
        case ["python", "-m", module, *arguments]:
            assert_module_takes(module, arguments)
        case ["python", "export.py", *arguments]:
            export.parser().parse_args(arguments)
        case ["python", script, *arguments]:
            assert_accepted(script.removesuffix(".py"), arguments, tmp_path, monkeypatch)
        case ["torchrun", *arguments]:
            parsed = get_args_parser().parse_args(arguments)
            assert parsed.training_script == "train.py"
            assert_accepted("train", parsed.training_script_args, tmp_path, monkeypatch)
        case ["make", target]:
            assert_target(target)
        case ["curl", *_]:
            trains = any(word.endswith("/trainings") for word in words)
            assert_request(words[words.index("-d") + 1], "train" if trains else "predict")
        case ["serve" | "kubectl" | "pip" | "docker", *_, file]:  # the last word is what the command reads
            assert (REPOSITORY / file).exists()
        case _:
            pytest.fail(f"{page.name} shows {words[0]}, which this test cannot check")


def assert_accepted(name: str, arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the command line of an entry point, in a folder where the files that it names exist."""
    monkeypatch.chdir(folder)
    for argument in arguments:
        _, at, path = argument.replace("=inputs/", "=@inputs/").partition("=@")
        if path.startswith("example_datasets/"):
            assert (REPOSITORY / path).is_file()
        if at:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
    if "--prompts-file" in arguments:
        (folder / arguments[arguments.index("--prompts-file") + 1]).write_text("a fish\na cup")
    entry_point = ENTRY_POINTS[name]
    given: dict[str, Any] = {}

    @functools.wraps(entry_point)
    def record(**inputs: Any) -> list[Path]:
        given.update(inputs)
        Image.new("RGB", (8, 8)).save(folder / "made.png")
        return [folder / "made.png"]

    many = predict.PROMPTS_FILE if name == "predict" else None
    assert run_command_line(record, description="", argv=arguments, many=many) == 0
    assert given.keys() == declared_inputs(entry_point).keys()


def without_cogs_options(arguments: list[str]) -> list[str]:
    """Command line of Cog without the options that only Cog knows. A named config exists."""
    rest, own = iter(arguments), []
    for argument in rest:
        if argument not in ("-e", "-f", "-t", "--setup-timeout"):
            own.append(argument)
            continue
        value = next(rest)
        assert argument != "-f" or (REPOSITORY / value).is_file()
        assert argument != "--setup-timeout" or value.isdecimal()
    return own


def assert_container(arguments: list[str]) -> None:
    """A container's variables exist, and what is mounted is what the configuration of Cog names."""
    named = (REPOSITORY / "cog.yaml").read_text()
    for option, value in itertools.pairwise(arguments):
        if option == "-e":
            assert value.partition("=")[0] in {*VARIABLES, "HF_HUB_OFFLINE"}
        if option == "-v":
            assert value.partition(":")[2] in named


def assert_module_takes(module: str, arguments: list[str]) -> None:
    file = REPOSITORY / (module.replace(".", "/") + ".py")
    assert file.is_file()
    sources = "".join(path.read_text() for path in file.parent.glob("*.py"))
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert f'"{option}"' in sources


@functools.cache
def assert_target(target: str) -> None:
    subprocess.run(["make", "--dry-run", target], cwd=REPOSITORY, check=True, capture_output=True)


def assert_request(body: str, name: str = "predict") -> None:
    """A request to a server has only declared inputs."""
    assert json.loads(body)["input"].keys() <= declared_inputs(ENTRY_POINTS[name]).keys()


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_code_blocks_are_valid(page: Path):
    for block in code(page, "json"):
        assert_request(block)
    for block in code(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "dataset_and_utils":
                assert all(hasattr(dataset_and_utils, alias.name) for alias in node.names)
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("replicate."):
                name = "train" if "trainings" in ast.unparse(node.func) else "predict"
                inputs = next(keyword.value for keyword in node.keywords if keyword.arg == "input")
                assert isinstance(inputs, ast.Dict)
                assert {ast.literal_eval(key) for key in inputs.keys if key} <= declared_inputs(
                    ENTRY_POINTS[name]
                ).keys()


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_mentioned_targets_and_modules_exist(page: Path):
    for span in _CODE_SPAN.findall(without_code(page)):
        if target := re.match(r"(?:[A-Z_]+=\S+ )*make ([\w-]+)", span):
            assert_target(target[1])
        if module := re.match(r"python -m ((?:benchmarks|tools|tiny_world)\.\w+)", span):
            assert_module_takes(module[1], span.split())


# ---------------------------------------------------------------------------------------------------------------------
# Links and names


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_somewhere(page: Path):
    for _, target in _LINK.findall(without_code(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=by_name)
def test_named_files_exist(page: Path):
    folders = "sdxl|tests|tools|benchmarks|docs|tiny_world|base_models|example_datasets"
    for span in _CODE_SPAN.findall(without_code(page)):
        if re.fullmatch(rf"(?:{folders})/[\w./-]*", span):
            assert (REPOSITORY / span).exists(), f"{page.name} names {span}"


def test_contributing_says_where_things_are():
    """Each file in its table exists and contains the names of its row; each room has a line."""
    page = (REPOSITORY / "CONTRIBUTING.md").read_text()
    section = page.split("## What you want to change")[1].split("\n## ")[0]
    for row in re.findall(r"^\|.*\| (.*`.*) \|$", section, re.MULTILINE):
        spans = _CODE_SPAN.findall(row)
        files = [REPOSITORY / span for span in spans if span.endswith(".py")]
        sources = "".join(file.read_text() for file in files)
        for name in (span for span in spans if not span.endswith(".py")):
            assert re.search(rf"\b{name}\b", sources), f"{name} is not in {row}"
    folders = {f"sdxl/{path.parent.name}/" for path in (REPOSITORY / "sdxl").glob("*/__init__.py")}
    modules = {f"sdxl/{path.name}" for path in (REPOSITORY / "sdxl").glob("*.py")} - {"sdxl/__init__.py"}
    for room in folders | modules:
        assert f"| `{room}` |" in page


def test_troubleshooting_quotes_messages_of_the_code():
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    table = page.split("## The run stopped with a message")[1].split("\n## ")[0]
    messages = [
        span for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for span in _CODE_SPAN.findall(row)
    ]
    sources = [*(REPOSITORY / "sdxl").rglob("*.py"), *REPOSITORY.glob("*.py")]
    texts = [
        node.value
        for source in sources
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert len(messages) > 10
    for message in set(messages) - MESSAGES_OF_OTHERS:
        for part in filter(None, (part.strip() for part in message.split("…"))):
            assert any(part in text for text in texts), f"no message contains {part!r}"


def test_the_readme_ends_with_every_file_and_folder():
    tree = code(REPOSITORY / "README.md", "text")[-1]
    named = {line.split()[0] for line in tree.splitlines()}
    assert all((REPOSITORY / name).exists() for name in named)
    files = {path.name for pattern in ("*.py", "cog*.yaml") for path in REPOSITORY.glob(pattern)}
    packages = {f"{path.parent.name}/" for path in REPOSITORY.glob("[a-z]*/__init__.py")}
    assert files | packages <= named


# ---------------------------------------------------------------------------------------------------------------------
# Plain English


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_sentences_are_short_and_plain(page: Path):
    for sentence in sentences(page):
        assert len(sentence.split()) <= LONGEST_SENTENCE, sentence
        for stilted in STILTED:
            assert not re.search(rf"\b{stilted}\b", sentence.lower()), sentence


def sentences(page: Path) -> list[str]:
    """The sentences of a page's paragraphs and lists; not those in tables and code."""
    text = re.sub(r"^(\||#|<!--).*$", "", without_code(page), flags=re.MULTILINE)
    text = _CODE_SPAN.sub("code", text)
    text = _LINK.sub(r"\1", text).replace("**", "")
    paragraphs = re.split(r"\n\s*\n|\n\s*(?:-|\d+\.) ", text)
    return [
        part for paragraph in paragraphs for part in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))
    ]
