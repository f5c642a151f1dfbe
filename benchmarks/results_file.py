"""The files that benchmarks write their figures to, as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(file: Path, results: Mapping[str, Any]) -> None:
    """Write the results. The folder need not exist."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")


def write_and_print(file: Path, results: Mapping[str, Any]) -> None:
    """Write the results and print them."""
    write(file, results)
    sys.stdout.write(json.dumps(results, indent=2) + "\n")


def read(file: Path) -> dict[str, Any]:
    """The results so far; none if there is no such file."""
    return json.loads(file.read_text()) if file.is_file() else {}


def add_to(file: Path, **found: Any) -> None:
    """Add figures to a results file, which need not exist."""
    write(file, read(file) | found)
