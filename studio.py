"""The studio: a page on this machine on which someone makes a fine-tune and draws with it, without a command line.

    python studio.py                    then open http://127.0.0.1:7860
    SDXL_BASE=base_models/tiny-sdxl python studio.py

Knows the command line; does not know the page. It needs the packages of requirements-studio.txt.
"""

import argparse
import functools
import os
import shutil
import sys
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl import settings
from sdxl.command_line import deliver
from sdxl.declared_inputs import REQUIRED, declared_inputs, require_known

_DRAWS = "--drawing-process"
"""What the page starts to draw."""


def resolve(inputs: Mapping[str, str], images: int, side: int) -> dict[str, Any]:
    """The settings that inputs of `train` become, for so many pictures of `side` pixels.

    Raises:
        UserInputError: an input is wrong, or there is no such input.
    """
    from sdxl.training.inputs import train_inputs
    from train import train

    declared = declared_inputs(train)
    for name in inputs:
        require_known(name, declared)
    given = {name: None if one.default is REQUIRED else one.default for name, one in declared.items()}
    given |= {name: declared[name].parse(text) for name, text in inputs.items()}
    checked = train_inputs(given | {"input_images": "pictures.tar"})
    size = checked.resolution or side
    return checked.training_config(resolution=size, images=images, base=checked.source_of_base).as_json()


def draw(folder: Path, inputs: Mapping[str, Any]) -> list[Path]:
    """Draw into `folder` with these inputs of `predict`; the others have their defaults. The model stays loaded."""
    run = _predictor().run
    defaults = {name: declared.default for name, declared in declared_inputs(run).items()}
    folder.mkdir(parents=True, exist_ok=True)
    return deliver(run(**{**defaults, **inputs}), folder)


@functools.cache
def _predictor() -> Any:
    from predict import Predictor

    return Predictor()


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("studio_out"), help="folder for the projects"
    )
    parser.add_argument("--port", type=int, default=7860, help="port on 127.0.0.1")
    parser.add_argument("--no-browser", action="store_true", help="do not open the page in a browser")
    parser.add_argument(_DRAWS, action="store_true", dest="draws", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.draws:
        from sdxl.studio.drawing import serve as serve_drawing

        serve_drawing(draw)
        return 0
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    uploads = arguments.output.absolute() / "uploads"
    shutil.rmtree(uploads, ignore_errors=True)  # copies of what is in the projects
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    try:
        from sdxl.studio.server import HOST, serve
    except ImportError as error:
        print(
            f"{error}. Run `make studio`, or pip install --no-deps -r requirements-studio.txt.",
            file=sys.stderr,
        )
        return 2
    from sdxl.studio.drawing import Drawer
    from sdxl.studio.projects import Projects
    from sdxl.studio.shared import Studio

    command = [sys.executable, str(Path(__file__).absolute()), _DRAWS]
    studio = Studio(
        projects=Projects(arguments.output.absolute()),
        drawer=Drawer(command, arguments.output.absolute() / "drawing"),
        resolve=resolve,
        base=settings.base_name(),
    )
    address = f"http://{HOST}:{arguments.port}"
    print(f"The studio is at {address}. Ctrl-C ends it; a training goes on.", flush=True)
    if not arguments.no_browser:
        webbrowser.open(address)
    serve(studio, arguments.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
