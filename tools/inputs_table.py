"""The tables of inputs and environment variables in docs/inputs.md, from the declarations in the code.

python -m tools.inputs_table           print them
python -m tools.inputs_table --write   write them into docs/inputs.md
"""

import json
import sys
from pathlib import Path
from typing import Any

from sdxl.settings import VARIABLES
from tools.cog_schema import build
from tools.page_blocks import main

PAGE = Path("docs/inputs.md")


def blocks(root: Path) -> dict[str, str]:
    """Name of a block in `PAGE` → its Markdown table."""
    return {
        "training": inputs_table(root / "cog.yaml", "TrainingInput"),
        "prediction": inputs_table(root / "cog.yaml", "Input"),
        "preprocessing": inputs_table(root / "cog.preprocess.yaml", "Input"),
        "environment": variables_table(),
    }


def inputs_table(config: Path, name: str) -> str:
    """A table of the inputs in the schema component `name` ("Input" or "TrainingInput") of a Cog configuration."""
    schemas = build(config)["components"]["schemas"]
    required = schemas[name].get("required", [])
    lines = ["| input | type | default | what it does |", "|---|---|---|---|"]
    for key, shape in schemas[name]["properties"].items():
        title = f"`{key}`" + (" (deprecated)" if shape.get("deprecated") else "")
        default = f"`{json.dumps(shape['default'])}`" if "default" in shape else "–"
        default = "required" if key in required else default
        lines.append(f"| {title} | {_type(shape, schemas)} | {default} | {_cell(shape['description'])} |")
    return "\n".join(lines)


def variables_table() -> str:
    """A table of the `SDXL_*` environment variables."""
    rows = [f"| `{name}` | {_cell(meaning)} |" for name, meaning in VARIABLES.items()]
    return "\n".join(["| variable | what it sets |", "|---|---|", *rows])


def _type(shape: dict[str, Any], schemas: dict[str, Any]) -> str:
    if "allOf" in shape:
        choices = schemas[shape["allOf"][0]["$ref"].rsplit("/", 1)[1]]["enum"]
        return " / ".join(f"`{choice}`" for choice in choices)
    if shape.get("type") == "array":
        return f"list, each a {shape['items']['type']}"
    kind = "file" if shape.get("format") == "uri" else shape["type"]
    low, high = shape.get("minimum"), shape.get("maximum")
    if low is None:
        return kind
    return f"{kind}, {low}–{high}" if high is not None else f"{kind}, from {low}"


def _cell(text: str) -> str:
    return text.replace("|", "&#124;").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main(PAGE, blocks(Path()), (__doc__ or "").splitlines()[0]))
