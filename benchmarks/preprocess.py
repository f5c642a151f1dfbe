"""Measure the speed and memory of preprocessing, and how many crops hold the subject.

    python -m benchmarks.preprocess

Writes `benchmarks/results/preprocess.json`:
- seconds and peak memory for 100 JPEG photographs of 12 megapixels, without models;
- whether equal inputs give equal bytes;
- the share of crops that hold the subject's box, on wide and tall scenes of the procedural world.
"""

import argparse
import hashlib
import importlib.metadata
import io
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.results_file import write_and_print
from sdxl.data.framing import Salience, crop_box, place_crop

RESULTS = Path(__file__).parent / "results" / "preprocess.json"


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preprocess", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--photographs", type=int, default=100)
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results = {**speed(arguments.photographs), **crops(arguments.scenes), **machine()}
    write_and_print(arguments.output, results)


def speed(count: int) -> dict[str, float | int | bool]:
    """Prepare `count` photographs twice, each time in a new process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = photographs(count, folder / "raw.zip")
        digests, seconds, memory, processor = [], [], [], [_processor_seconds()]
        for run in ("one", "two"):
            command = [
                *(sys.executable, "preprocess.py", "-i", f"files=@{archive}", "-i", "target_size=1024"),
                *("-o", str(folder / run)),
            ]
            started = time.monotonic()
            subprocess.run(
                command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
            )
            seconds.append(time.monotonic() - started)
            processor.append(_processor_seconds())
            memory.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)
            digests.append(hashlib.sha256((folder / run / "data.tar").read_bytes()).hexdigest())
    return {
        "photographs": count,
        "photograph_megapixels": 12,
        "seconds": round(min(seconds), 1),
        "seconds_slower_run": round(max(seconds), 1),
        "processor_seconds": round((processor[-1] - processor[0]) / 2, 1),
        "peak_memory_gib": round(max(memory), 2),
        "tars_are_equal": digests[0] == digests[1],
    }


def _processor_seconds() -> float:
    """Processor time of all finished child processes: other processes hardly change it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def photographs(count: int, archive: Path) -> Path:
    """A zip of `count` captioned JPEG files of 4000×3000 pixels, up to ten of them different.

    They have detail at all scales, so that decoding takes as long as for photographs.
    """
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(archive, "w") as opened:
        rows = ["image_file,caption"]
        files: list[bytes] = []
        for _ in range(min(count, 10)):
            scene = np.zeros((3000, 4000, 3), np.float32)
            for cells in (6, 24, 96, 384):
                noise = rng.integers(0, 255, (cells * 3 // 4, cells, 3), dtype=np.uint8)
                scene += np.asarray(Image.fromarray(noise).resize((4000, 3000), Image.Resampling.BICUBIC)) / 4
            buffer = io.BytesIO()
            Image.fromarray(scene.astype(np.uint8)).save(buffer, "JPEG", quality=90)
            files.append(buffer.getvalue())
        for index in range(count):
            opened.writestr(f"{index}.jpg", files[index % len(files)])
            rows.append(f"{index}.jpg,a photo of TOK")
        opened.writestr("captions.csv", "\n".join(rows) + "\n")
    return archive


def crops(count: int) -> dict[str, float | int]:
    """The share of square crops that hold the subject's box.

    The scenes have 256×256 pixels, extended to 2:1 with the subject anywhere along the longer side. The mask comes from
    the renderer, blurred like a segmenter's.
    """
    from tiny_world.parts import pad
    from tiny_world.raster import mask_box, render
    from tiny_world.subjects import random_shot, shot_parts, subject

    rng = np.random.default_rng(0)
    held = held_centred = seen = 0
    for identity in range(0, 2 * count, 2):
        parts = shot_parts(random_shot("TOK", rng), {"TOK": subject(identity)}, identity)
        mask = render(pad([parts])).masks[0, 0]
        box = mask_box(mask)
        if box is None:
            continue
        seen += 1
        wide = rng.random() < 0.5
        offset = int(rng.integers(0, 257))
        canvas = np.zeros((256, 512) if wide else (512, 256), np.float32)
        place = (
            (slice(None), slice(offset, offset + 256)) if wide else (slice(offset, offset + 256), slice(None))
        )
        canvas[place] = mask.numpy()
        left, top, right, bottom = box
        left, right = (left + offset, right + offset) if wide else (left, right)
        top, bottom = (top, bottom) if wide else (top + offset, bottom + offset)
        soft = np.asarray(Image.fromarray((canvas * 255).astype(np.uint8)).reduce(2), np.float32) / 255
        for salience in (Salience(mask=soft), None):
            framing = place_crop(canvas.shape, (256, 256), salience)  # type: ignore[arg-type]
            x0, y0, x1, y1 = crop_box(Image.fromarray(canvas), framing)
            holds = x0 <= left and y0 <= top and x1 >= right and y1 >= bottom
            held += holds and salience is not None
            held_centred += holds and salience is None
    return {
        "scenes": seen,
        "crops_that_hold_the_subject": round(held / seen, 4),
        "centred_crops_that_hold_the_subject": round(held_centred / seen, 4),
    }


def machine() -> dict[str, str | int]:
    """The machine and the versions of packages."""
    packages = ("numpy", "pillow", "torch", "transformers", "opencv-python-headless")
    return {
        "cpu_cores": os.cpu_count() or 0,
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name.replace("-", "_"): importlib.metadata.version(name) for name in packages},
    }


if __name__ == "__main__":
    main()
