"""The schema tool reads what Cog reads, and rejects the rest."""

import json
from pathlib import Path

import pytest

from predict import Predictor
from preprocess import Preprocessor
from sdxl.declared_inputs import declared_inputs
from tests.conftest import REPOSITORY
from tools.cog_schema import TARGET, SchemaError, build, main

MODELS = {"predict": Predictor().run, "preprocess": Preprocessor().run}
CONFIG = 'run: "predict.py:Predictor"\ntrain: "train.py:train"\n'
TRAIN = """
from cog import Input, Path
def train(data: Path = Input(description="Data.")) -> Path: ...
"""


def project(folder: Path, parameters: str, *, module: str = "", train: str = TRAIN) -> Path:
    """A project whose predictor takes `parameters`."""
    (folder / "cog.yaml").write_text(CONFIG)
    (folder / "train.py").write_text(train)
    (folder / "predict.py").write_text(
        f"{module}\nclass Predictor(BaseRunner):\n    def run(\n        self,\n{parameters}\n    ) -> list[Path]: ...\n"
    )
    return folder


def inputs(root: Path, name: str = "Input") -> dict:
    return build(root / "cog.yaml")["components"]["schemas"][name]


@pytest.mark.parametrize(
    ("config", "model"), [("cog.yaml", "predict"), ("cog.preprocess.yaml", "preprocess")]
)
def test_cog_can_read_our_inputs(tmp_path: Path, config: str, model: str):
    assert main(["--config", str(REPOSITORY / config), "--folder", str(tmp_path)]) == 0
    schemas = json.loads((tmp_path / TARGET).read_text())["components"]["schemas"]
    assert schemas["Input"]["properties"].keys() == declared_inputs(MODELS[model]).keys()
    assert ("TrainingInput" in schemas) == (model == "predict")


def test_a_server_that_reads_the_schema_meanwhile_reads_all_of_it(tmp_path: Path):
    arguments = ["--config", str(REPOSITORY / "cog.yaml"), "--folder", str(tmp_path)]
    target = tmp_path / TARGET
    target.parent.mkdir()
    target.write_text("the old one")
    with target.open() as reader:
        assert main(arguments) == 0
        assert reader.read() == "the old one"
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_what_cog_cannot_read_is_told_and_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = project(tmp_path, "        a: int = 1,")
    assert main(["--config", str(root / "cog.yaml")]) == 1
    assert "a needs an Input(...) default" in capsys.readouterr().err
    assert not (root / TARGET).exists()


def test_declarations_become_properties_in_order(tmp_path: Path):
    root = project(
        tmp_path,
        """
        a: str = Input(description="A."),
        b: int = Input(default=-2, description="B.", ge=-3, le=4),
        c: Optional[float] = Input(default=None, description="C.", deprecated=True),
        d: str = Input(default="x", description="D.", choices=KINDS),
        e: str = Input(default="y", description="E.", choices=list(TABLE.keys())),
        """,
        module='KINDS = ["x"]\nTABLE = {"y": 1}',
    )
    shape = inputs(root)
    assert shape["required"] == ["a"]
    assert [value["x-order"] for value in shape["properties"].values()] == [0, 1, 2, 3, 4]
    assert shape["properties"]["b"] == {
        "x-order": 1,
        "description": "B.",
        "title": "B",
        "type": "integer",
        "default": -2,
        "minimum": -3,
        "maximum": 4,
    }
    optional = shape["properties"]["c"]
    assert (optional["nullable"], optional["deprecated"], optional["type"]) == (True, True, "number")
    schemas = build(root / "cog.yaml")["components"]["schemas"]
    assert (schemas["d"]["enum"], schemas["e"]["enum"]) == (["x"], ["y"])
    assert schemas["Output"]["items"] == {"type": "string", "format": "uri"}
    assert inputs(root, "TrainingInput")["properties"]["data"]["format"] == "uri"


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ("a: int = Input(default=None, description='A.'),", "Optional"),
        ("a: int = Input(default=1024 * 1024, description='A.'),", "single literal"),
        ("a: int = Input(default=1, description='A.', le=LIMIT),", "le must be a single literal"),
        ("a: int = Input(default=1, description='A' + 'B'),", "description must be a single literal"),
        ("a: int = Input(default=1, description=f'{1}'),", "description must be a single literal"),
        ("a: int = Input(default=1),", "needs a description"),
        ("a: str = Input(default='x', description='A.', choices=IMPORTED),", "choices must be a list"),
        ("a: str = Input(default='x', description='A.', choices=[*OTHERS]),", "single literal"),
        ("a: Literal['x'] = Input(default='x', description='A.'),", "needs a type"),
        ("a: int = 3,", r"needs an Input"),
        ("a: int,", "every parameter"),
    ],
)
def test_declarations_that_cog_would_misread_are_rejected(tmp_path: Path, declaration: str, message: str):
    with pytest.raises(SchemaError, match=message) as caught:
        build(project(tmp_path, f"        {declaration}") / "cog.yaml")
    assert "predict.py" in str(caught.value)


def test_one_choices_name_has_one_meaning(tmp_path: Path):
    train = TRAIN.replace(
        ") -> Path", ', kind: str = Input(default="b", description="K.", choices=["b"])) -> Path'
    )
    root = project(
        tmp_path, '        kind: str = Input(default="a", description="K.", choices=["a"]),', train=train
    )
    with pytest.raises(SchemaError, match="kind has other choices"):
        build(root / "cog.yaml")
