"""The demo: teach the miniature one subject, then draw it in new scenes.

It runs on a CPU, without network or account: `make demo`.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from sdxl import miniature
from sdxl.data.contact_sheet import Row, contact_sheet
from sdxl.data.picture_reader import IMAGE_SUFFIXES, read_image
from sdxl.errors import UserInputError
from sdxl.files.archives import unpack
from sdxl.model import fine_tune_files
from sdxl.model.components import default_device
from sdxl.process import configure_logging
from sdxl.serving.generation import generate
from sdxl.serving.pipeline import load_pipeline
from sdxl.serving.request import GenerationRequest
from sdxl.serving.tuned_pipeline import TunedPipeline

BASE = Path("base_models/tiny-sdxl")
EXAMPLES = Path("example_datasets/crowny.zip")
TRAINING: dict[str, Any] = {
    "input_images": f"@{EXAMPLES}",
    "token_map": "TOK:2",
    "token_init": "TOK:toy",
    **miniature.TRAINING,
    "max_train_steps": miniature.STEPS,
    "seed": 0,
    "preview_prompts": "a photo of a large TOK in the middle on a plain red background"
    "|a photo of TOK on the left on a yellow dotted background|a photo of a red house on a plain blue background",
    "checks": 4,
}
"""Inputs of train.py."""
PROMPTS = [
    "a photo of a large TOK in the middle on a plain red background",
    "a photo of TOK on the right on a blue striped background",
    "a photo of a large TOK in the middle on a white checkered background",
    "a photo of TOK in the bottom left on a plain green background",
]


def main() -> None:
    """Train, draw, and write `contact_sheet.png`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo_out"), help="folder for the results")
    output = parser.parse_args().output
    started = time.monotonic()

    print(f"1. Train on the pictures of {EXAMPLES}:\n", flush=True)
    train(output)

    print("\n2. Draw each prompt twice, without and with the fine-tune:\n", flush=True)
    configure_logging()
    before, after = draw(output / "trained_model.tar")
    for index, picture in enumerate(after):
        picture.save(output / f"after-{index}.png")
    rows = [
        Row(title="Four of the eight training pictures", pictures=training_pictures()),
        Row(title="Before training: the base does not know TOK", pictures=before),
        Row(title="After training", pictures=after, captions=PROMPTS),
    ]
    contact_sheet(rows, text=20).save(output / "contact_sheet.png")
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(
        f"\nDone in {minutes} min {seconds} s. Look at {output / 'contact_sheet.png'} and {output / 'report.html'}"
    )


def train(output: Path) -> None:
    """Run train.py as anyone would, and print its command line.

    Raises UserInputError if it fails.
    """
    inputs = [word for name, value in TRAINING.items() for word in ("-i", f"{name}={value}")]
    command = [sys.executable, "train.py", *inputs, "-o", str(output)]
    print(f"SDXL_BASE={BASE} {shlex.join(command)}\n", flush=True)
    done = subprocess.run(command, env=os.environ | {"SDXL_BASE": str(BASE)}, check=False)
    if done.returncode:
        raise UserInputError(
            "the training failed. The lines above say why; the command at the top repeats it."
        )


def draw(tar: Path) -> tuple[list[Image.Image], list[Image.Image]]:
    """Pictures of the prompts by the base, and by the fine-tune in `tar` from the same seeds."""
    tuned = TunedPipeline(load_pipeline(BASE, default_device()))
    side = tuned.pipeline.default_sample_size * tuned.pipeline.vae_scale_factor

    def draw_all() -> list[Image.Image]:
        requests = [
            GenerationRequest(prompt=prompt, width=side, height=side, seed=index, **miniature.DRAWING)
            for index, prompt in enumerate(PROMPTS)
        ]
        return [generate(tuned.pipeline, request, tuned.token_map)[0] for request in requests]

    before = draw_all()
    with tempfile.TemporaryDirectory() as unpacked:
        tuned.activate(fine_tune_files.read(tar, Path(unpacked)))
    return before, draw_all()


def training_pictures() -> list[Image.Image]:
    """The first pictures of the example archive, as many as there are prompts."""
    with tempfile.TemporaryDirectory() as unpacked:
        files = sorted(path for path in unpack(EXAMPLES, Path(unpacked)) if path.suffix in IMAGE_SUFFIXES)
        return [read_image(path)[0] for path in files[: len(PROMPTS)]]


if __name__ == "__main__":
    try:
        main()
    except UserInputError as error:
        sys.exit(f"The demo failed: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped.")
