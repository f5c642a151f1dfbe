"""Print the tables of inputs for README.md, from the same declarations as Cog's schema.

python -m tools.inputs_table
"""

import json
import sys
from pathlib import Path
from typing import Any

from tools.cog_schema import build


def table(root: Path, name: str) -> str:
    """A Markdown table of the inputs of the schema component `name` ("Input" or "TrainingInput")."""
    schemas = build(root / "cog.yaml")["components"]["schemas"]
    lines = ["| input | type | default | what it does |", "|---|---|---|---|"]
    for key, shape in schemas[name]["properties"].items():
        title = f"`{key}`" + (" (deprecated)" if shape.get("deprecated") else "")
        default = f"`{json.dumps(shape['default'])}`" if "default" in shape else "–"
        lines.append(
            f"| {title} | {_type(shape, schemas)} | {default} | {shape['description'].replace('|', '&#124;')} |"
        )
    return "\n".join(lines)


def _type(shape: dict[str, Any], schemas: dict[str, Any]) -> str:
    if "allOf" in shape:
        choices = schemas[shape["allOf"][0]["$ref"].rsplit("/", 1)[1]]["enum"]
        return " / ".join(f"`{choice}`" for choice in choices)
    kind = "file" if shape.get("format") == "uri" else shape["type"]
    low, high = shape.get("minimum"), shape.get("maximum")
    if low is None:
        return kind
    return f"{kind}, {low}–{high}" if high is not None else f"{kind}, from {low}"


if __name__ == "__main__":
    for component in ("TrainingInput", "Input"):
        sys.stdout.write(table(Path(), component) + "\n\n")
