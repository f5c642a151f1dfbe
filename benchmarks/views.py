"""`python -m benchmarks.views`: measure how sharp the views are that a training learns.

Photographs are prepared and cropped as in a training. Each crop is compared with the same crop
of the original, resized in one step: the energy of its finest detail, which is the difference of each pixel from the mean
of its four neighbours. 1 means as sharp as the original. Writes `benchmarks/results/views.json`; takes seconds on a CPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean

import numpy as np
from PIL import Image

from benchmarks.photographs import photograph
from benchmarks.results_file import write_and_print
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.data.dataset_folder import read_dataset_folder
from sdxl.training.random_views import View, views_of

RESULTS = Path(__file__).parent / "results" / "views.json"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")
SHARES = {"twice": 2.0, "1.3 times": 1.3, "1.1 times": 1.1, "no more": 1.0}
"""Shorter side of the originals, as a multiple of the resolution."""


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.views", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--crops", type=int, default=30, help="crops of each photograph")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results = {name: measure(share, arguments.crops) for name, share in SHARES.items()}
    write_and_print(arguments.output, results)


def measure(share: float, crops: int) -> dict[str, float]:
    """Figures of the views of all photographs whose shorter side has `share` times the resolution in pixels.

    sharpness: mean ratio of the energies to those of the original; sharpness_worst: that of the softest crop.
    zoom: the largest zoom of a crop; 1 if there are no crops.
    enlarged: mean ratio if the same crops were cut from the prepared picture, and so enlarged.
    """
    ratios, enlarged, zooms, counts = [], [], [1.0], []
    for index, name in enumerate(PHOTOGRAPHS):
        original = photograph(name)
        side = int(min(original.size) / share) // 8 * 8
        if share == 1.0:
            original = original.crop((0, 0, side, side))
        whole, *cut = _views(original, side, crops, index)
        counts.append(len(cut))
        for view in cut:
            direct = _energy(cut_of(original, view))
            zoom = view.resized_width / whole.resized_width
            ratios.append(_energy(view.picture) / direct)
            enlarged.append(_energy(_enlarged(whole, view, zoom)) / direct)
            zooms.append(zoom)
    figures = {"crops_of_each": mean(counts), "largest_zoom": round(max(zooms), 3)}
    if ratios:
        figures |= {"sharpness": round(mean(ratios), 3), "sharpness_worst": round(min(ratios), 3)}
        figures |= {"sharpness_if_enlarged": round(mean(enlarged), 3)}
    return figures


def _views(original: Image.Image, side: int, crops: int, seed: int) -> list[View]:
    with tempfile.TemporaryDirectory() as work:
        raw = Path(work) / "raw"
        raw.mkdir()
        original.save(raw / "a.png")
        config = PreprocessConfig(target_size=side, global_caption="TOK")
        (prepared,) = read_dataset_folder(prepare_dataset(raw, Path(work) / "dataset", config=config))
        return views_of(prepared, np.random.default_rng(seed), crops=crops, flip=False)


def cut_of(original: Image.Image, view: View) -> Image.Image:
    """What the time ids of a view say, resized from the original in one step."""
    scale = view.resized_width / original.width
    top, left = view.crop_top_left
    width, height = view.picture.size
    box = (left / scale, top / scale, (left + width) / scale, (top + height) / scale)
    return original.resize((width, height), Image.Resampling.LANCZOS, box=box)


def _enlarged(whole: View, view: View, zoom: float) -> Image.Image:
    """The view, cut from the prepared picture."""
    width, height = whole.picture.size
    top, left = (
        (place - start * zoom) / zoom
        for place, start in zip(view.crop_top_left, whole.crop_top_left, strict=True)
    )
    box = (left, top, min(left + width / zoom, width), min(top + height / zoom, height))
    return whole.picture.resize((width, height), Image.Resampling.LANCZOS, box=box)


def _energy(picture: Image.Image) -> float:
    """Mean square of the differences of each grey pixel from the mean of its four neighbours."""
    grey = np.asarray(picture.convert("L"), np.float32)
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float(((grey[1:-1, 1:-1] - around / 4) ** 2).mean())


if __name__ == "__main__":
    main()
