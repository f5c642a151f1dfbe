"""The doors of `benchmarks.hostile`: an input goes through the code that a server runs, in a folder that is watched.

Knows the entry points and what counts as bad; does not know how inputs are made.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import re
import shutil
import traceback
from collections.abc import Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load

import predict
from benchmarks.hostile_damage import BASE, COLOURS, Input, Materials, mask
from benchmarks.serving import declared_defaults
from dataset_and_utils import UserInputError
from preprocess import prepare_dataset
from sdxl import settings
from sdxl.data.dataset_folder import read_dataset_folder
from sdxl.files.fetching import fetch
from sdxl.serving.delivery import Delivery
from sdxl.serving.fine_tune_cache import FineTuneCache
from sdxl.serving.painter import Painter
from sdxl.serving.request import FineTuneOptions, GenerationRequest
from sdxl.settings import CacheLimits
from sdxl.training.early_check import early_check
from sdxl.training.inputs import train_inputs
from sdxl.workspace import workspace_of_run
from train import train

SIZE = 64
LARGEST = 128 * 128
"""Pixels; larger pictures are laid out and delivered, but not drawn."""
LONGEST = 400
"""Characters of a message."""
OUTSIDE = Path("/tmp/hostile-outside")
"""Where absolute names in archives lead."""


class WrongDataError(Exception):
    """An undamaged input did not become what it should."""


class _SmallPainter(Painter):
    """Draws small pictures in at most two steps, and blank ones instead of large ones."""

    def draw_all(
        self, requests: Sequence[GenerationRequest], options: FineTuneOptions
    ) -> Generator[Image.Image]:
        request = requests[0]
        steps = min(2, request.num_inference_steps)
        if request.width * request.height <= LARGEST:
            short = {"num_inference_steps": steps, "refine_steps": steps}
            return super().draw_all([dataclasses.replace(one, **short) for one in requests], options)
        self.apply(options)
        return (Image.new("RGB", (request.width, request.height)) for _ in range(1))


class _Content:
    """Judges nothing."""

    name = "nobody"

    def is_unsafe(self, picture: Image.Image) -> bool:
        return False


class Doors:
    """The entry points with one loaded base, as behind a server."""

    def __init__(self, materials: Materials) -> None:
        self.materials = materials
        self.predictor = predict.Predictor()
        self.painter = self.predictor.painter = _SmallPainter()
        self.painter.tuned.pipeline.set_progress_bar_config(disable=True)
        self.predictor.delivery = Delivery(_Content(), model=BASE.name)
        self.base = {name: value.detach().clone() for name, value in self._parameters().items()}
        self.inputs = train_inputs(
            {
                **declared_defaults(train),
                "input_images": "given.zip",
                "resolution": SIZE,
                "max_train_steps": 1,
                "train_batch_size": 1,
            }
        )
        predict.server = SimpleNamespace(active=True)  # type: ignore[assignment]

    def _parameters(self) -> dict[str, torch.Tensor]:
        pipeline = self.painter.tuned.pipeline
        parts = {"unet": pipeline.unet, "one": pipeline.text_encoder, "two": pipeline.text_encoder_2}
        return {
            f"{part}.{name}": value for part, root in parts.items() for name, value in root.named_parameters()
        }

    def judge(self, made: Input, root: Path) -> tuple[str, str]:
        """Put an input through its door, in the folder `root`; "used", "refused" or "bad", and what was said."""
        box = root / "a" / "b" / "c" / "box"
        for name in ("given", "workspace", "cache"):
            (box / name).mkdir(parents=True)
        os.environ |= {"SDXL_WORKSPACE": str(box / "workspace"), "SDXL_FINE_TUNES": str(box / "given")}
        self.painter.fine_tunes = FineTuneCache(
            box / "cache", CacheLimits(disk=1 << 30, memory=0), self.painter.tuned.load
        )
        settings.set_behind_server(True)
        file = box / "given" / made.name
        file.write_bytes(made.content)
        try:
            getattr(self, f"_{made.door}")(made, file)
            outcome, said = "used", ""
        except UserInputError as error:
            said = str(error)
            outcome = "refused"
            if made.expected is not None:
                outcome = "bad"
            elif not said.isprintable() or len(said) > LONGEST or str(root) in said:
                outcome, said = "bad", f"unclear: {said!r}"
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            own = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
            place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
            outcome = "bad"
            said = f"{type(error).__name__}: {str(error)[:300]} ({place}, {Path(last.filename).name}:{last.lineno})"
        self.painter.tuned.restore()
        if made.door != "dataset" and any(
            not torch.equal(self.base[name], value) for name, value in self._parameters().items()
        ):
            outcome, said = "bad", "the base is not restored"
        if strange := self._strangers(root, box, file, outcome):
            outcome, said = "bad", f"files where none should be: {strange[:3]} {said}"
        shutil.rmtree(root, ignore_errors=True)
        return outcome, said

    @staticmethod
    def _strangers(root: Path, box: Path, file: Path, outcome: str) -> list[str]:
        """Files outside the folders of the run, and what a failed run left in them."""
        found = [path for path in root.rglob("*") if not path.is_dir() or path.is_symlink()]
        allowed = [box / "cache", *([box / "workspace"] if outcome == "used" else [])]
        strange = [
            path for path in found if path != file and not any(path.is_relative_to(a) for a in allowed)
        ]
        strange += [path for path in (box / "cache").glob(".partial-*")]
        strange += [OUTSIDE] if OUTSIDE.exists() else []
        return [str(path.relative_to(root)) if path.is_relative_to(root) else str(path) for path in strange]

    def _dataset(self, made: Input, file: Path) -> None:
        """As `train` and `preprocess` read their archive."""
        with workspace_of_run("train") as workspace:
            config = self.inputs.preprocess_config(SIZE)
            archive = fetch(str(file), workspace / "fetched")
            check = early_check(self.inputs, BASE, SIZE)
            folder = workspace / "dataset"
            prepare_dataset(archive, folder, config=config, report=workspace, check=check)
            pictures = read_dataset_folder(folder)
            if made.expected is None:
                return
            captions, masked = made.expected
            right = [one.caption for one in pictures] == captions
            for index, one in enumerate(pictures):
                with Image.open(one.picture) as opened:
                    colour = np.asarray(opened.convert("RGB")).reshape(-1, 3)
                    right &= opened.size == (SIZE, SIZE)
                right &= bool(abs(np.median(colour, axis=0) - COLOURS[index]).max() < 12)
                right &= (one.mask is not None) == (index in masked)
            if not right:
                raise WrongDataError(f"{[(one.caption, one.mask) for one in pictures]}")

    def _weights(self, made: Input, file: Path) -> None:
        """As a request names a fine-tune of the server."""
        inputs = {"prompt": "a photo of TOK", "width": SIZE, "height": SIZE, "num_inference_steps": 1}
        inputs |= {"seed": 1, "disable_safety_checker": True, "replicate_weights": file.name}
        self._run(inputs)
        tuned = self.painter.tuned
        if made.expected in ("ours", "kohya"):
            for name, (down, up) in self.materials.matrices.items():
                change = self._parameters()[f"unet.{name}.weight"] - self.base[f"unet.{name}.weight"]
                if not torch.allclose(change, up @ down, atol=1e-3):
                    raise WrongDataError(f"{name} is not changed by the LoRA")
        if made.expected in ("trained", "embeddings"):
            wanted = json.loads(self.materials.trained["special_params.json"])
            now = self._parameters()
            changed = any(not torch.equal(v, now[n]) for n, v in self.base.items() if n.startswith("unet."))
            right = tuned.token_map.placeholders == wanted and (made.expected == "embeddings" or changed)
            rows = load(self.materials.trained["embeddings.pti"])
            pipeline = tuned.pipeline
            pairs = (
                (pipeline.tokenizer, pipeline.text_encoder),
                (pipeline.tokenizer_2, pipeline.text_encoder_2),
            )
            for index, (tokenizer, encoder) in enumerate(pairs):
                ids = tokenizer.convert_tokens_to_ids(["<s0>", "<s1>"])
                table = encoder.get_input_embeddings().weight
                right &= torch.allclose(table[ids], rows[f"text_encoders_{index}"].to(table), atol=1e-3)
            if not right:
                raise WrongDataError("not the tokens and weights of the training")

    def _request(self, made: Input, file: Path) -> None:
        """As Cog hands a request over: files are `data:` URIs, and values have their declared types."""
        stands_for = {"FILE": _data_uri(file.read_bytes()), "MASK": _data_uri(mask())}
        inputs = {
            name: stands_for.get(value, value) if isinstance(value, str) else value
            for name, value in made.given.items()
        }
        drawn = self._run(inputs)
        if made.expected is not None:
            with Image.open(drawn[0]) as opened:
                if opened.size != made.expected:
                    raise WrongDataError(f"the picture has {opened.size} instead of {made.expected}")

    def _run(self, inputs: dict[str, Any]) -> list[Any]:
        return self.predictor.run(**{**declared_defaults(self.predictor.run), **inputs})


def _data_uri(content: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"


def memory_kb(name: str) -> int:
    """A number of this process's status, such as VmHWM, in KiB."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) if found else 0


def forget_peak() -> None:
    """Make the resident memory of now the highest so far."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
