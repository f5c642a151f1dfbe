"""`python -m benchmarks.dreambench pictures/ --base DIR`: compare the methods on real SDXL, with DINO and CLIP as judges.

`pictures/` holds one folder of pictures for each subject, named after what it shows: `dog`, `bear_plushie2`.

- DINO: the mean cosine between drawn and real pictures of a subject, in the CLS output of DINOv2.
- CLIP-I: the same in the image vectors of CLIP ViT-B/32.
- CLIP-T: the mean cosine between a picture and its prompt without the token.

`SDXL_DINO` and `SDXL_CLIP` name other models. Source: DreamBooth (arXiv:2208.12242), section 4.1, which takes the first
DINO and OpenAI's CLIP: its figures cannot be compared with these.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch
from PIL import Image, ImageOps
from torch import Tensor

from benchmarks.judging import draw
from benchmarks.subject_job import Method, learn, write_raw
from sdxl.data.picture_encoders import PictureEncoders, as_tensor, cosine_of_different, picture_encoders
from sdxl.errors import UserInputError
from sdxl.files.pipelines import local_folder
from sdxl.serving.pipeline import load_pipeline
from sdxl.serving.tuned_pipeline import TunedPipeline

_LORA = {"is_lora": True}
METHODS = (
    Method(name="untuned base", trained=False),
    Method(name="textual inversion only", settings=_LORA | {"lora_lr": 0.0, "pivot_fraction": 1.0}),
    Method(name="LoRA without TI", settings=_LORA | {"pivot_fraction": 0.0}),
    Method(name="full UNet without TI", settings={"pivot_fraction": 0.0}),
    Method(name="LoRA + pivotal", settings=_LORA),
    Method(name="full UNet + pivotal"),
)
PROMPTS = (
    "a {} in a snowy forest",
    "a {} on a sandy beach",
    "a {} on cobblestones",
    "a {} on a red carpet",
    "a {} with a city at night behind it",
    "a {} with a blue house behind it",
    "a {} on top of a wooden table",
    "a {} on top of green grass with sunflowers around it",
    "a {} floating on water",
    "a {} seen from above",
    "a red {}",
    "a shiny {}",
)
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def main(arguments: list[str] | None = None) -> None:
    """Run every subject and method, print the table and write it as JSON."""
    args = _arguments(arguments)
    base = local_folder(args.base)
    subjects = {
        folder.name: _pictures(folder) for folder in sorted(args.pictures.iterdir()) if folder.is_dir()
    }
    if not subjects:
        raise UserInputError(f"{args.pictures} holds no folders: give one folder of pictures per subject.")
    encoders = picture_encoders()
    chosen = [method for method in METHODS if args.methods is None or method.name in args.methods]
    scores: dict[str, list[dict[str, float]]] = {"real pictures": []}
    for name, pictures in subjects.items():
        with encoders.on(torch.device(args.device)):
            scores["real pictures"].append(
                real_scores(encoders, [as_tensor(picture) for picture in pictures])
            )
        for method in chosen:
            scores.setdefault(method.name, []).append(job(name, pictures, method, base, encoders, args))
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(
                json.dumps({"subjects": list(subjects), "scores": scores}, indent=2) + "\n"
            )
    sys.stdout.write(markdown(scores) + "\n")


def job(
    name: str,
    pictures: list[Image.Image],
    method: Method,
    base: Path,
    encoders: PictureEncoders,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Learn one subject by one method, draw all prompts and score the pictures."""
    thing = name.rstrip("0123456789").replace("_", " ").strip()
    with tempfile.TemporaryDirectory() as work:
        folder, tuned = Path(work), None
        if method.trained:
            write_raw(folder / "raw", pictures, [f"a photo of TOK {thing}"] * len(pictures))
            tuned = learn(
                folder / "raw",
                folder,
                method,
                base=base,
                token_map="TOK:2",
                resolution=args.resolution,
                steps=args.steps,
                batch_size=args.batch_size,
                device=args.device,
                gradient_checkpointing=True,
            )
        pipeline = TunedPipeline(load_pipeline(base, torch.device(args.device)))
        pipeline.activate(tuned)
        named = f"TOK {thing}" if method.trained else thing
        drawn = [
            picture
            for i, prompt in enumerate(PROMPTS[: args.prompts])
            for picture in draw(
                pipeline,
                [prompt.format(named)] * args.seeds,
                1000 * i,
                side=args.resolution,
                steps=args.sampling_steps,
            )
        ]
    plain = [prompt.format(thing) for prompt in PROMPTS[: args.prompts] for _ in range(args.seeds)]
    real = [as_tensor(picture) for picture in pictures]
    with encoders.on(torch.device(args.device)):
        return {
            "dino": float((encoders.likeness(drawn) @ encoders.likeness(real).T).mean()),
            "clip_i": float((encoders.shown(drawn) @ encoders.shown(real).T).mean()),
            "clip_t": float((encoders.shown(drawn) * encoders.texts(plain)).sum(1).mean()),
        }


def real_scores(encoders: PictureEncoders, real: list[Tensor]) -> dict[str, float]:
    """The scores of real pictures of a subject against each other, as means over pairs of different pictures."""
    result = {}
    for key, vectors in (("dino", encoders.likeness(real)), ("clip_i", encoders.shown(real))):
        result[key] = cosine_of_different(vectors, vectors)
    return result


def markdown(scores: dict[str, list[dict[str, float]]]) -> str:
    """The table in Markdown: one row for each method, with means over the subjects."""
    lines = ["| method | DINO | CLIP-I | CLIP-T |", "|---|---|---|---|"]
    for method, rows in scores.items():
        cells = [
            f"{mean(row[key] for row in rows):.3f}" if key in rows[0] else "-"
            for key in ("dino", "clip_i", "clip_t")
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _pictures(folder: Path) -> list[Image.Image]:
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in EXTENSIONS]
    if len(files) < 2:
        raise UserInputError(f"{folder} holds {len(files)} pictures: give at least 2 of the subject.")
    return [_picture(file) for file in files]


def _picture(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dreambench", description=__doc__)
    parser.add_argument("pictures", type=Path, help="folder with one folder of pictures for each subject")
    parser.add_argument("--base", required=True, help="SDXL as a folder or a hub name")
    parser.add_argument("--methods", nargs="+", help="measure only these methods")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each method")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many of the prompts to draw")
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each prompt")
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/dreambench.json"))
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
