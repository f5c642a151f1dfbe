"""The path of people who use a fine-tune with diffusers alone, in a folder of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from sdxl.files.archives import unpack
from tests.conftest import REPOSITORY, TINY_BASE, call

SCRIPT = """
import sys
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from dataset_and_utils import TokenEmbeddingsHandler

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32, variant="fp16")

tensors = {}
with safe_open("training_out/unet.safetensors", framework="pt", device="cpu") as f:
    for key in f.keys():
        tensors[key] = f.get_tensor(key)
result = pipe.unet.load_state_dict(tensors, strict=False)
assert not result.missing_keys and not result.unexpected_keys

text_encoders = [pipe.text_encoder, pipe.text_encoder_2]
tokenizers = [pipe.tokenizer, pipe.tokenizer_2]
embhandler = TokenEmbeddingsHandler(text_encoders, tokenizers)
embhandler.load_embeddings("training_out/embeddings.pti")

image = pipe(
    prompt="A photo of <s0><s1>", num_inference_steps=3, guidance_scale=4.0, width=64, height=64,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]
image.save("monster.png")
"""


def test_one_file_and_the_artifacts_are_enough(fine_tunes: dict[str, Path], tmp_path: Path):
    from predict import Predictor

    tar = fine_tunes["full"]
    folder = tmp_path / "elsewhere"
    unpack(tar, folder / "training_out")
    shutil.copy(REPOSITORY / "dataset_and_utils.py", folder)
    (folder / "use.py").write_text(SCRIPT)
    subprocess.run([sys.executable, "use.py", str(TINY_BASE)], cwd=folder, check=True)
    assert sorted(path.name for path in folder.glob("*.py")) == ["dataset_and_utils.py", "use.py"]

    predictor = Predictor()
    predictor.setup()
    [ours] = call(
        predictor.run,
        **{
            "prompt": "A photo of TOK",
            "width": 64,
            "height": 64,
            "num_inference_steps": 3,
            "guidance_scale": 4.0,
            "apply_watermark": False,
            "embed_metadata": False,
        },
        seed=0,
        replicate_weights=str(tar),
    )
    drawn, theirs = (np.array(Image.open(path)) for path in (ours, folder / "monster.png"))
    assert np.array_equal(drawn, theirs), "predict must draw what diffusers draws"
