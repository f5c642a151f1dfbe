"""Real photographs for benchmarks and tests. `README.md` says where they come from."""

from pathlib import Path

from PIL import Image


def photograph(name: str) -> Image.Image:
    """The pixels of the photograph in the file `name`, such as "chelsea", in RGB, without a colour profile."""
    [path] = Path(__file__).parent.glob(f"{name}.[jw]*")
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.info.clear()
    return picture
