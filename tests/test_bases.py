"""Names of bases: folders with mixed variants, single files, other autoencoders, and what is no SDXL."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor
from transformers import CLIPTextModelWithProjection

import train
from sdxl.errors import DownloadError, UserInputError, WeightsError
from sdxl.files.weight_files import WeightFile
from sdxl.model.base_checks import tell_of_distillation
from sdxl.model.bases import Base, digest, find_base
from sdxl.model.components import load_components
from sdxl.model.ldm_names import CLIP_G, CLIP_L, UNET, VAE
from sdxl.model.single_file_base import prediction_of
from sdxl.serving.pipeline import load_pipeline
from tests.conftest import QUICK, REPOSITORY, TINY_BASE, call, write_captioned_zip, write_zip
from tests.single_files import EXTRA, checkpoint, weights_of, write

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_FUSED = "transformer.resblocks.0.attn.in_proj_weight"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_CONFIG", str(TINY_BASE))


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """The miniature as a single-file checkpoint."""
    return checkpoint(TINY_BASE)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# Single files -----------------------------------------------------------------------------------------------------------


def test_a_single_file_becomes_the_folder_that_it_came_from(
    named_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SDXL_CONFIG", str(named_base))
    dtypes = {UNET: torch.float32, VAE: torch.bfloat16, CLIP_L: torch.float16, CLIP_G: torch.float32}
    cast = {
        name: value.to(next(dtype for prefix, dtype in dtypes.items() if name.startswith(prefix)))
        for name, value in checkpoint(named_base).items()
    }
    found = find_base(str(write(tmp_path / "a.safetensors", cast | EXTRA)))
    for part, dtype in zip(PARTS, dtypes.values(), strict=True):
        theirs = {name: value.to(dtype) for name, value in weights_of(named_base / part).items()}
        assert same(weights_of(found.folder / part), theirs)
    # What diffusers' converters make of the same file.
    unet: Any = UNet2DConditionModel.load_config(named_base / "unet")
    vae: Any = AutoencoderKL.load_config(named_base / "vae")
    assert same(weights_of(found.folder / "unet"), convert_ldm_unet_checkpoint(dict(cast), unet))
    assert same(weights_of(found.folder / "vae"), convert_ldm_vae_checkpoint(dict(cast), vae))


def test_a_training_on_the_single_file_is_that_on_its_folder(tensors: dict[str, Tensor], tmp_path: Path):
    single_file = write(tmp_path / "base.safetensors", tensors)
    archive = write_captioned_zip(tmp_path / "x.zip")
    quick = QUICK | {"max_train_steps": 2, "train_batch_size": 1}
    lora = {"is_lora": True, "lora_lr": 1e-2, "lora_rank": 2, "lora_targets": "attention"}
    files = {}
    for name, base in {"file": single_file, "folder": TINY_BASE}.items():
        tar = call(train.train, input_images=archive, base=str(base), **quick, **lora)
        with tarfile.open(tar) as opened:
            files[name] = {
                member.name: opened.extractfile(member).read()  # type: ignore[union-attr]
                for member in opened
            }
    # Equal results of equal steps: so were the losses, to the last bit.
    assert files["file"]["lora.safetensors"] == files["folder"]["lora.safetensors"]
    assert files["file"]["embeddings.pti"] == files["folder"]["embeddings.pti"]
    records = {name: json.loads(of["training.json"]) for name, of in files.items()}
    assert records["file"]["settings"].pop("base") == str(single_file)
    assert records["folder"]["settings"].pop("base") == str(TINY_BASE)
    assert records["file"] == records["folder"]
    assert records["file"]["prediction_type"] == "epsilon"
    assert records["file"]["zero_terminal_snr"] is False


def test_a_file_in_8_bits_with_marks_is_read(tensors: dict[str, Tensor], tmp_path: Path):
    eight = torch.float8_e4m3fn
    cast = {name: value.to(eight) if name.startswith(UNET) else value for name, value in tensors.items()}
    marks = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    found = find_base(str(write(tmp_path / "a.safetensors", cast | marks)))
    theirs = weights_of(TINY_BASE / "unet")
    assert same(weights_of(found.folder / "unet"), {n: v.to(eight).half() for n, v in theirs.items()})
    assert tuple(found.facts().values())[1:] == ("v_prediction", True)
    scheduler = load_components(found.folder, is_lora=True, device=CPU, **found.replaced()).noise_scheduler
    assert float(scheduler.alphas_cumprod[-1]) == 0


def test_a_file_is_converted_once(tensors: dict[str, Tensor], tmp_path: Path):
    file = write(tmp_path / "a.safetensors", tensors)
    first = find_base(str(file))
    state = (first.folder / "unet").stat()
    assert find_base(str(file)).folder == first.folder
    assert (first.folder / "unet").stat() == state
    os.utime(file, (1, 1))
    assert find_base(str(file)).folder != first.folder


@pytest.mark.parametrize(
    ("marks", "metadata", "prediction"),
    [
        ([], {}, None),
        (["ztsnr"], {}, None),
        (["v_pred"], {}, "v_prediction"),
        (["v_pred", "ztsnr"], {}, "v_prediction_ztsnr"),
        ([], {"modelspec.prediction_type": "v"}, "v_prediction"),
        ([], {"modelspec.prediction_type": "epsilon"}, None),
    ],
)
def test_marks_in_a_file_say_what_it_predicts(
    tmp_path: Path, marks: list[str], metadata: dict, prediction: str | None
):
    marked = {mark: torch.empty(0) for mark in ["other", *marks]}
    file = write(tmp_path / "a.safetensors", marked, metadata)
    assert prediction_of(WeightFile(file, file.name)) == prediction


@pytest.mark.parametrize("setting", ["epsilon", "v_prediction", "v_prediction_ztsnr"])
def test_a_setting_says_what_a_base_predicts(monkeypatch: pytest.MonkeyPatch, setting: str):
    monkeypatch.setenv("SDXL_PREDICTION", setting)
    facts = find_base(str(TINY_BASE)).facts()
    assert facts["prediction_type"] == setting.removesuffix("_ztsnr")
    assert facts["zero_terminal_snr"] == setting.endswith("_ztsnr")
    monkeypatch.setenv("SDXL_PREDICTION", "v")
    with pytest.raises(UserInputError, match="SDXL_PREDICTION is 'v', but must be one of epsilon"):
        find_base(str(TINY_BASE))


def without(tensors: dict[str, Tensor], beginning: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith(beginning)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, CLIP_L), "lacks the first text encoder"),
        (lambda t: without(t, CLIP_G), "lacks the second text encoder"),
        (lambda t: without(t, VAE), "holds no autoencoder: set SDXL_VAE"),
        (lambda t: without(t, UNET + "out.2"), r"lacks conv_out\.bias, conv_out\.weight of the unet"),
        (lambda t: without(t, CLIP_G + "text_projection"), r"lacks text_model|lacks text_projection"),
        (lambda t: without(t, VAE + "decoder.up.1"), "of the vae"),
        (lambda t: t | {UNET + "out.2.bias": torch.zeros(5)}, "set SDXL_CONFIG to the base"),
        (
            lambda t: t | {UNET + "out.2.bias": torch.zeros(4, dtype=torch.int8)},
            "set SDXL_CONFIG to the base",
        ),
        (lambda t: t | {CLIP_G + _FUSED: torch.zeros(2, 2)}, "another shape than SDXL's"),
        (lambda t: t | {VAE + "encoder.mid.attn_1.q.weight": torch.zeros(2)}, "another shape than SDXL's"),
        (lambda t: t | {CLIP_G + "text_projection": torch.zeros(2, 3)}, "set SDXL_CONFIG to the base"),
        (lambda t: t | {"edm_mean": torch.zeros(4)}, r"another kind of noise \(EDM\)"),
        (
            lambda t: t | {UNET + "input_blocks.0.0.weight": torch.zeros(2, 9, 3, 3)},
            "is an inpainting model",
        ),
        (lambda t: without(t, UNET), "no checkpoint with the UNet"),
        (lambda t: {"double_blocks.0.img_mod.lin.weight": torch.zeros(2)}, "another architecture"),
        (lambda t: {"lora_unet_mid.lora_up.weight": torch.zeros(2)}, "is a LoRA, not a base"),
        (lambda t: {"conv_in.weight": torch.zeros(2, 4, 3, 3)}, "is only a UNet, not a base"),
    ],
)
def test_a_file_that_is_no_sdxl_is_told(
    tensors: dict[str, Tensor], tmp_path: Path, change: Callable, message: str
):
    file = write(tmp_path / "a.safetensors", change(tensors))
    with pytest.raises(WeightsError, match=message) as caught:
        find_base(str(file))
    assert str(caught.value).startswith(str(file)) and len(str(caught.value)) < 300 + len(str(tmp_path))
    kept = tmp_path / "cache" / "bases"
    assert [path.name for path in kept.iterdir()] == ["locks"], "nothing half converted is left"


@pytest.mark.parametrize(
    ("width", "kind"), [(768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2"), (1280, "SDXL's refiner")]
)
def test_files_of_other_stable_diffusions_are_named(tmp_path: Path, width: int, kind: str):
    block = "input_blocks.4.1" if width == 1280 else "input_blocks.1.1"
    names = {
        "input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3),
        f"{block}.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, width),
    }
    file = write(tmp_path / "a.safetensors", {UNET + name: value for name, value in names.items()})
    with pytest.raises(WeightsError, match=f"is {kind}, not a base of SDXL"):
        find_base(str(file))


def test_a_pickle_and_a_cut_file_are_told(tensors: dict[str, Tensor], tmp_path: Path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.ckpt")
    with pytest.raises(WeightsError, match="is a pickle"):
        find_base(str(tmp_path / "a.ckpt"))
    whole = write(tmp_path / "a.safetensors", tensors)
    (tmp_path / "b.safetensors").write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(WeightsError, match="is damaged, since it has only"):
        find_base(str(tmp_path / "b.safetensors"))


# Folders ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY_BASE, tmp_path / "base"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"in_channels": 9}, "is an inpainting model, whose UNet takes 9 channels"),
        ("unet/config.json", {"in_channels": 8}, "edits pictures by instructions"),
        ("unet/config.json", {"cross_attention_dim": 768}, "is Stable Diffusion 1, not a base"),
        ("unet/config.json", {"cross_attention_dim": 1024}, "is Stable Diffusion 2, not a base"),
        ("unet/config.json", {"cross_attention_dim": 99}, "does not fit its text encoders"),
        ("unet/config.json", {"addition_embed_type": None}, "another kind of model"),
        ("unet/config.json", {"layers_per_block": 10**6}, "has layers_per_block 1000000, more than any SDXL"),
        ("text_encoder/config.json", {"hidden_size": 10**9}, "does not fit its text encoders"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "has num_hidden_layers 1000000000"),
        ("model_index.json", {"text_encoder": ["kolors", "ChatGLMModel"]}, "another kind of model"),
        ("model_index.json", {"text_encoder": [None, None]}, "is SDXL's refiner, not a base"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "another kind of noise"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "another kind of noise"),
    ],
)
def test_a_folder_that_is_no_sdxl_is_told(base: Path, file: str, changes: dict, message: str):
    edit(base / file, **changes)
    with pytest.raises(WeightsError, match=message) as caught:
        find_base(str(base))
    assert str(caught.value).startswith(str(base))


def test_other_folders_are_told(base: Path):
    with pytest.raises(WeightsError, match="is SDXL's refiner, not a base of SDXL"):
        find_base(str(REPOSITORY / "base_models" / "tiny-sdxl-refiner"))
    (base / "unet" / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="is not a complete SDXL"):
        find_base(str(base))
    (base / "unet").rename(base / "transformer")
    with pytest.raises(WeightsError, match="another architecture"):
        find_base(str(base))


def test_training_refuses_before_it_reads_pictures(base: Path, tmp_path: Path):
    edit(base / "unet" / "config.json", in_channels=9)
    archive = write_zip(tmp_path / "x.zip", {"0.png": b"no picture"})
    with pytest.raises(UserInputError, match="is an inpainting model"):
        call(train.train, input_images=archive, base=str(base))


@pytest.mark.parametrize(
    ("changes", "name", "told"),
    [
        ({}, "somebody/my-sdxl", False),
        ({"timestep_spacing": "trailing"}, "my-sdxl", True),
        ({"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, "my-sdxl", False),
        ({"_class_name": "LCMScheduler"}, "my-sdxl", True),
        ({}, "stabilityai/sdxl-turbo", True),
        ({}, "/models/turbo/juggernaut.safetensors", False),
    ],
)
def test_a_distilled_base_is_told(
    base: Path, changes: dict, name: str, told: bool, caplog: pytest.LogCaptureFixture
):
    edit(base / "scheduler" / "scheduler_config.json", **changes)
    tell_of_distillation(base, name)
    assert any("looks distilled" in message for message in caplog.messages) == told


def mixed(base: Path) -> None:
    """Rewrite the parts of the miniature: no variant, shards, and shards of a variant."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet", variant="fp16", dtype=torch.float16)
    encoder: Any = CLIPTextModelWithProjection.from_pretrained(
        base / "text_encoder_2", variant="fp16", dtype=torch.float16
    )
    for file in [*(base / "unet").glob("*.safetensors"), *(base / "text_encoder_2").glob("*.safetensors")]:
        file.unlink()
    unet.save_pretrained(base / "unet", max_shard_size="4MB")
    encoder.save_pretrained(base / "text_encoder_2", variant="fp16", max_shard_size="200KB")
    part = base / "text_encoder"
    (part / "model.fp16.safetensors").rename(part / "model.safetensors")
    assert len(list((base / "unet").glob("*-of-*.safetensors"))) > 1
    assert len(list((base / "text_encoder_2").glob("*.fp16-*.safetensors"))) > 1


def test_each_part_has_its_own_variant(base: Path):
    mixed(base)
    found = find_base(str(base))
    assert digest(base) == digest(TINY_BASE)
    ours, whole = (load_components(folder, is_lora=True, device=CPU) for folder in (found.folder, TINY_BASE))
    pipeline = load_pipeline(found.folder, CPU)
    for part, encoder in (("text_encoder", 0), ("text_encoder_2", 1)):
        theirs = whole.text_encoders[encoder].state_dict()
        assert same(ours.text_encoders[encoder].state_dict(), theirs)
        assert same(getattr(pipeline, part).state_dict(), theirs)
    assert same(ours.unet.state_dict(), whole.unet.state_dict())
    assert same(pipeline.unet.state_dict(), whole.unet.state_dict())
    assert same(pipeline.vae.state_dict(), whole.vae.state_dict())


@pytest.mark.parametrize("part", ["unet", "text_encoder_2"])
def test_a_copy_without_one_of_its_shards_is_not_whole(base: Path, part: str):
    mixed(base)
    next((base / part).glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(DownloadError, match=f"is incomplete, because {part} lacks safetensors weights"):
        find_base(str(base))


def test_an_index_leads_to_no_other_folder(base: Path):
    mixed(base)
    index = next((base / "unet").glob("*.index.json"))
    edit(index, weight_map={"conv_in.weight": "../vae/diffusion_pytorch_model.fp16.safetensors"})
    with pytest.raises(DownloadError, match="is incomplete, because unet"):
        find_base(str(base))


def test_the_digest_tells_bases_apart(base: Path):
    before = digest(base)
    edit(base / "unet" / "config.json", sample_size=64)
    (base / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert digest(base) == before
    tensors = weights_of(base / "unet")
    tensors["conv_out.bias"][0] += 1
    write(base / "unet" / "diffusion_pytorch_model.fp16.safetensors", tensors)
    assert digest(base) != before


# Another autoencoder ----------------------------------------------------------------------------------------------------


def is_used(found: Base, wanted: dict[str, Tensor]) -> bool:
    """Whether training and serving load an autoencoder with these weights."""
    wanted = {name: value.float() for name, value in wanted.items()}
    trained = load_components(found.folder, is_lora=True, device=CPU, **found.replaced())
    served = load_pipeline(found.folder, CPU, **found.replaced())
    return same(trained.vae.state_dict(), wanted) and same(served.vae.state_dict(), wanted)


@pytest.mark.parametrize("form", ["part", "pipeline", "ldm", "diffusers", "checkpoint"])
def test_another_autoencoder(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
):
    changed = {name: value + 1 for name, value in weights_of(TINY_BASE / "vae").items()}
    in_ldm = {name: value + 1 for name, value in tensors.items() if name.startswith(VAE)}
    source = tmp_path / "vae.safetensors"
    if form in ("part", "pipeline"):
        source = tmp_path / "other"
        part = source / "vae" if form == "pipeline" else source
        part.mkdir(parents=True)
        shutil.copy(TINY_BASE / "vae" / "config.json", part)
        write(part / "diffusion_pytorch_model.safetensors", changed)
    elif form == "ldm":
        write(source, {name.removeprefix(VAE): value for name, value in in_ldm.items()})
    else:
        write(source, changed if form == "diffusers" else tensors | in_ldm)
    monkeypatch.setenv("SDXL_VAE", str(source))
    found = find_base(str(TINY_BASE))
    assert same(weights_of(found.vae), changed)
    if form == "ldm":
        lacking = write(tmp_path / "lacking.safetensors", without(tensors, VAE))
        assert is_used(find_base(str(lacking)), changed)
        monkeypatch.delenv("SDXL_VAE")
        with pytest.raises(WeightsError, match="set SDXL_VAE"):
            find_base(str(lacking))


def test_an_autoencoder_of_another_model_is_refused(
    base: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
):
    edit(base / "vae" / "config.json", scaling_factor=0.18215)
    monkeypatch.setenv("SDXL_VAE", str(base / "vae"))
    with pytest.raises(WeightsError, match=r"makes other latents .*0\.18215.*give an autoencoder of SDXL"):
        find_base(str(TINY_BASE))
    monkeypatch.setenv("SDXL_VAE", str(write(base / "x.safetensors", without(tensors, VAE))))
    with pytest.raises(WeightsError, match="holds no autoencoder"):
        find_base(str(TINY_BASE))
    monkeypatch.setenv("SDXL_VAE", str(base / "scheduler"))
    with pytest.raises(DownloadError, match=r"SDXL_VAE=.* has no config\.json"):
        find_base(str(TINY_BASE))
