"""The autoencoder's precision: what it encodes is learned, and what it decodes is seen."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sdxl.model.components import load_components
from sdxl.serving.generation import _encode, decode
from sdxl.serving.pipeline import _vae_dtype, load_pipeline
from tests.conftest import TINY_BASE


@pytest.mark.parametrize(
    ("upcast", "wanted"), [(True, torch.float32), (None, torch.float32), (False, torch.float16)]
)
def test_an_autoencoder_that_overflows_in_fp16_is_fp32(tmp_path: Path, upcast: bool | None, wanted):
    config = json.loads((TINY_BASE / "vae" / "config.json").read_text())
    config |= {"force_upcast": upcast}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    assert _vae_dtype(tmp_path, torch.float16) == wanted
    assert _vae_dtype(tmp_path, torch.float32) == torch.float32


def test_it_keeps_its_precision_where_training_draws_under_autocast():
    pipeline = load_pipeline(TINY_BASE, torch.device("cpu"))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        [plain] = decode(pipeline, latents)
        encoded = _encode(pipeline, plain, torch.device("cpu"), torch.float32, 1)
        with torch.autocast("cpu", torch.bfloat16):
            [under] = decode(pipeline, latents)
            again = _encode(pipeline, plain, torch.device("cpu"), torch.float32, 1)
            rounded = pipeline.vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
    assert rounded.dtype == torch.bfloat16  # what autocast would do
    assert np.array_equal(np.asarray(plain), np.asarray(under)) and torch.equal(encoded, again)


def test_training_encodes_in_fp32_from_weights_stored_in_bf16(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(TINY_BASE / "vae", tmp_path / "vae")
    [file] = (tmp_path / "vae").glob("*.safetensors")
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file)
    components = load_components(TINY_BASE, is_lora=True, device=torch.device("cpu"), vae=tmp_path / "vae")
    assert {p.dtype for p in components.vae.parameters()} == {torch.float32}
