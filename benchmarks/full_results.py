"""`python -m benchmarks.full_results FINE_TUNE`: what each form of a full fine-tune costs, and how far its pictures are off.

FINE_TUNE is the tar of a full training of the miniature. Each form is written and read again as a training and a server do.
Pictures are compared with those of the whole UNet from the same seeds, in levels of 255.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from benchmarks import full_size
from benchmarks.quality import about
from benchmarks.results_file import write
from benchmarks.subject_job import BASE
from dataset_and_utils import TokenMap
from demo import PROMPTS
from sdxl.files.archives import unpack
from sdxl.model import fine_tune_files
from sdxl.model.bases import find_base
from sdxl.model.fine_tune_files import EMBEDDINGS, TOKENS, UNET, TrainedFineTune
from sdxl.model.full_results import in_form
from sdxl.model.merging import DEFAULT_RANK
from sdxl.serving.generation import generate
from sdxl.serving.pipeline import load_pipeline
from sdxl.serving.request import GenerationRequest
from sdxl.serving.tuned_pipeline import TunedPipeline

ALL_PROMPTS = [
    *PROMPTS,
    "a photo of a red house on a plain blue background",
    "a blue mushroom right of a brown tree on a plain pink background",
]
FORMS = ("whole", "difference", "lora")


def draw(tuned: TunedPipeline, folder: Path | None) -> np.ndarray:
    """A picture of each prompt with the fine-tune in `folder`, [prompts, height, width, 3]; by the base for None."""
    tuned.activate(None if folder is None else fine_tune_files.read(folder, folder))
    pictures = []
    for seed, prompt in enumerate(ALL_PROMPTS):
        request = GenerationRequest(
            prompt=prompt, width=256, height=256, num_inference_steps=20, guidance_scale=3, seed=seed
        )
        pictures.append(np.asarray(generate(tuned.pipeline, request, tuned.token_map)[0]).astype(int))
    return np.stack(pictures)


def bytes_at_full_size() -> dict[str, int]:
    """Bytes of the weights of each form for SDXL 1.0's UNet."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**full_size.UNET)
    parameters = list(unet.parameters())
    layers = [module.weight for module in unet.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    matrices = [(len(weight), weight[0].numel()) for weight in layers]
    return {
        "whole": sum(2 * one.numel() for one in parameters),
        "difference": sum(
            one.numel() + 4 * len(one) if one.ndim > 1 else 2 * one.numel() for one in parameters
        ),
        "lora": sum(2 * min(DEFAULT_RANK, *sides) * sum(sides) for sides in matrices),
    }


def main() -> None:
    """Write the results as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("fine_tune", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/full_results.json"))
    args = parser.parse_args()
    tuned, sizes, forms = TunedPipeline(load_pipeline(BASE, torch.device("cpu"))), bytes_at_full_size(), {}
    with tempfile.TemporaryDirectory() as made:
        top = Path(made)
        unpack(args.fine_tune, top / "tar")
        rows = load_file(top / "tar" / EMBEDDINGS)
        trained = TrainedFineTune(
            kind="unet",
            weights=load_file(top / "tar" / UNET),
            token_rows=[rows[f"text_encoders_{i}"] for i in (0, 1)],
            token_map=TokenMap.read(top / "tar" / TOKENS),
        )
        record = fine_tune_files.read_record(top / "tar")
        base, whole = draw(tuned, None), None
        for form in FORMS:
            folder = top / form
            fine_tune_files.write(in_form(trained, form, find_base(str(BASE))), folder, record)
            pictures = draw(tuned, folder)
            whole = pictures if whole is None else whole
            off = np.abs(pictures - whole)
            [file] = folder.glob("*.safetensors")
            forms[form] = {
                "share_of_whole": round(
                    file.stat().st_size / (2 * sum(w.numel() for w in trained.weights.values())), 3
                ),
                "share_of_whole_sdxl": round(sizes[form] / sizes["whole"], 3),
                "gigabytes_sdxl": round(sizes[form] / 1e9, 2),
                "levels_mean": round(float(off.mean()), 3),
                "levels_99_percent": round(float(np.percentile(off, 99)), 1),
                "levels_most": int(off.max()),
            }
            sys.stdout.write(f"{form} {forms[form]}\n")
    found = {
        "settings": {name: record["settings"][name] for name in ("max_train_steps", "unet_learning_rate")},
        "base_instead_levels_mean": round(float(np.abs(base - whole).mean()), 2),
        "forms": forms,
    } | about("cpu")
    write(args.output, found)


if __name__ == "__main__":
    main()
