"""Real photographs for benchmarks and tests. `README.md` says where they come from."""

from pathlib import Path

from PIL import Image


def photograph(name: str) -> Image.Image:
    """The photograph in the file `name`, such as "chelsea", in RGB."""
    [path] = Path(__file__).parent.glob(f"{name}.[jw]*")
    with Image.open(path) as opened:
        return opened.convert("RGB")
