"""The demo: teach the embedded miniature SDXL one subject, then draw it in new scenes, before and after side by side.

Runs on a CPU, without network or account: `make demo`.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from sdxl import settings
from sdxl.data.contact_sheet import Row, contact_sheet
from sdxl.data.decoding import IMAGE_SUFFIXES, read_image
from sdxl.files import hub
from sdxl.files.archives import unpack
from sdxl.model import fine_tune_files
from sdxl.model.components import default_device
from sdxl.process import configure_logging
from sdxl.serving.generation import generate
from sdxl.serving.pipeline import load_pipeline
from sdxl.serving.request import GenerationRequest
from sdxl.serving.tuned_pipeline import TunedPipeline

EXAMPLES = Path("example_datasets/crowny.zip")
# The rates are for a UNet of 7 million parameters; the defaults of train.py are for SDXL. So short a run sees no views.
TRAINING = {
    "input_images": f"@{EXAMPLES}",
    "token_map": "TOK:2",
    "max_train_steps": "550",
    "unet_learning_rate": "3e-4",
    "ti_lr": "5e-3",
    "random_views": "0",
    "lr_scheduler": "cosine",
    "seed": "0",
}
PROMPTS = [
    "a photo of a large TOK in the middle on a red background",
    "a photo of TOK on a blue striped background",
    "a photo of a large TOK in the middle on a white checkered background",
    "a small TOK in the top left on a green background",
    "a photo of a large TOK in the middle on a purple dotted background",
]


def main() -> None:
    """Train, draw, and write `contact_sheet.png`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo_out"), help="folder for the results")
    output = parser.parse_args().output
    started = time.monotonic()

    print(f"1. Training on the pictures of {EXAMPLES}, as anyone would:\n", flush=True)
    command = [
        sys.executable,
        "train.py",
        *(f"-i {name}={value}" for name, value in TRAINING.items()),
        f"-o {output}",
    ]
    print("   python " + " ".join(command[1:]) + "\n", flush=True)
    subprocess.run([word for part in command for word in part.split(" ", 1)], check=True)

    print("\n2. Drawing each prompt with the base alone, then with the fine-tune:\n", flush=True)
    configure_logging()
    before, after = draw(output / "trained_model.tar")
    for index, picture in enumerate(after):
        picture.save(output / f"after-{index}.png")
    rows = [
        Row(title="The pictures it learned from", pictures=training_pictures()),
        Row(title="Before: the base does not know TOK", pictures=before, captions=PROMPTS),
        Row(title="After training", pictures=after, captions=PROMPTS),
    ]
    contact_sheet(rows).save(output / "contact_sheet.png")
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\nDone in {minutes} min {seconds} s. Look at {output / 'contact_sheet.png'}")


def draw(tar: Path) -> tuple[list[Image.Image], list[Image.Image]]:
    """The prompts' pictures by the base, and by the fine-tune in `tar`, from the same seeds."""
    base = hub.local_folder(settings.base_name())
    tuned = TunedPipeline(load_pipeline(base, default_device()))
    side = tuned.pipeline.default_sample_size * tuned.pipeline.vae_scale_factor

    def draw_all() -> list[Image.Image]:
        requests = [
            GenerationRequest(
                prompt=prompt, width=side, height=side, num_inference_steps=25, guidance_scale=5, seed=index
            )
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
    main()
