"""`python -m benchmarks.dreambench pictures/ --base DIR`: compare the methods on real SDXL, with DINO and CLIP as judges.

`pictures/` holds one folder of pictures for each subject, named after what it shows: `dog`, `bear_plushie2`.

- DINO: the mean cosine between drawn and real pictures of a subject, in the CLS output of DINO ViT-S/16.
- CLIP-I: the same in the image vectors of CLIP ViT-B/32.
- CLIP-T: the mean cosine between a picture and its prompt without the token.

Source: DreamBooth (arXiv:2208.12242), section 4.1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from benchmarks.judging import draw
from benchmarks.scores import cosine_of_different
from benchmarks.subject_job import Method, learn, write_raw
from sdxl.errors import UserInputError
from sdxl.files.pipelines import local_folder
from sdxl.serving.pipeline import load_pipeline
from sdxl.serving.tuned_pipeline import TunedPipeline

DINO, CLIP = "facebook/dino-vits16", "openai/clip-vit-base-patch32"
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


class Encoders:
    """DINO and CLIP as judges. Every method returns unit vectors on the CPU."""

    def __init__(self, dino: str, clip: str, device: str) -> None:
        self.device = device
        self.dino: Any = ViTModel.from_pretrained(dino, add_pooling_layer=False).to(device).eval()  # type: ignore[arg-type]
        self.clip: Any = CLIPModel.from_pretrained(clip).to(device).eval()  # type: ignore[arg-type]
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(clip)

    @torch.inference_mode()
    def dino_images(self, pictures: list[Tensor]) -> Tensor:
        """DINO's CLS output [n, d] for pictures [3, h, w] in 0..1."""
        mean_, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        pixels = self._pixels(pictures, self.dino.config.image_size, mean_, std)
        return F.normalize(self.dino(pixel_values=pixels).last_hidden_state[:, 0], dim=1).cpu()

    @torch.inference_mode()
    def clip_images(self, pictures: list[Tensor]) -> Tensor:
        """CLIP's vectors [n, d] for pictures [3, h, w] in 0..1."""
        mean_, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        pixels = self._pixels(pictures, self.clip.config.vision_config.image_size, mean_, std)
        pooled = self.clip.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.clip.visual_projection(pooled), dim=1).cpu()

    @torch.inference_mode()
    def clip_texts(self, prompts: list[str]) -> Tensor:
        """CLIP's vectors [n, d] for prompts."""
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        return F.normalize(
            self.clip.text_projection(self.clip.text_model(**tokens).pooler_output), dim=1
        ).cpu()

    def _pixels(
        self, pictures: list[Tensor], side: int, mean_: tuple[float, ...], std: tuple[float, ...]
    ) -> Tensor:
        """The centre square of each picture, resized and normalised as in the encoders' training: [n, 3, side, side]."""
        squares = []
        for picture in pictures:
            short = min(picture.shape[1:])
            top, left = (picture.shape[1] - short) // 2, (picture.shape[2] - short) // 2
            square = picture[None, :, top : top + short, left : left + short]
            squares.append(F.interpolate(square, (side, side), mode="bicubic", antialias=True).clamp(0, 1))
        pixels = torch.cat(squares)
        return ((pixels - torch.tensor(mean_).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)).to(
            self.device
        )


def main(arguments: list[str] | None = None) -> None:
    """Run every subject and method, print the table and write it as JSON."""
    args = _arguments(arguments)
    base = local_folder(args.base)
    subjects = {
        folder.name: _pictures(folder) for folder in sorted(args.pictures.iterdir()) if folder.is_dir()
    }
    if not subjects:
        raise UserInputError(f"{args.pictures} holds no folders: give one folder of pictures per subject.")
    encoders = Encoders(args.dino, args.clip, args.device)
    chosen = [method for method in METHODS if args.methods is None or method.name in args.methods]
    scores: dict[str, list[dict[str, float]]] = {"real pictures": []}
    for name, pictures in subjects.items():
        scores["real pictures"].append(real_scores(encoders, [_tensor(picture) for picture in pictures]))
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
    encoders: Encoders,
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
    real = [_tensor(picture) for picture in pictures]
    return {
        "dino": float((encoders.dino_images(drawn) @ encoders.dino_images(real).T).mean()),
        "clip_i": float((encoders.clip_images(drawn) @ encoders.clip_images(real).T).mean()),
        "clip_t": float((encoders.clip_images(drawn) * encoders.clip_texts(plain)).sum(1).mean()),
    }


def real_scores(encoders: Encoders, real: list[Tensor]) -> dict[str, float]:
    """The scores of real pictures of a subject against each other, as means over pairs of different pictures."""
    result = {}
    for key, vectors in (("dino", encoders.dino_images(real)), ("clip_i", encoders.clip_images(real))):
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


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


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
    parser.add_argument("--dino", default=DINO)
    parser.add_argument("--clip", default=CLIP)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/dreambench.json"))
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
