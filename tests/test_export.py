"""Any fine-tune into any form, and back: the same tensors, the same pictures, and a word about what is lost."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import export
from dataset_and_utils import write_embeddings
from sdxl.files.archives import unpack
from sdxl.model import export_forms, fine_tune_files
from sdxl.model.ldm_names import UNET
from sdxl.model.weight_changes import LowRank
from sdxl.serving.combining import ReadFineTune, combine
from sdxl.serving.generation import generate
from sdxl.serving.request import GenerationRequest
from sdxl.serving.tuned_pipeline import ScaledFineTune, TunedPipeline
from tests.conftest import TINY_BASE, quiet_pipeline


@pytest.fixture(scope="module")
def tuned() -> TunedPipeline:
    return quiet_pipeline(TINY_BASE)


@pytest.fixture(scope="module")
def base(tuned: TunedPipeline) -> export_forms.LoadedBase:
    parameters = {name: value.detach().clone() for name, value in tuned.parameters.items()}
    return export_forms.LoadedBase(
        folder=TINY_BASE,
        vae=TINY_BASE / "vae",
        parameters=parameters,
        layers=tuned.layers,
        unet_config=tuned.pipeline.unet.config,
    )


def read(tuned: TunedPipeline, source: Path, folder: Path, scale: float = 1.0) -> ReadFineTune:
    files = fine_tune_files.read(source, folder / f"unpacked-{source.name}")
    return ReadFineTune(fine_tune=tuned.load(files), record={}, scale=scale)


def write(
    tuned: TunedPipeline,
    base: export_forms.LoadedBase,
    parts: list[ReadFineTune],
    form: str,
    folder: Path,
    **given: Any,
) -> tuple[Path, list[str]]:
    """Write the sum of `parts`; return its folder and what was lost."""
    exported, lost = combine(parts, base, tuned, form=form, **given)
    target = folder / form
    target.mkdir()
    return target, lost + export_forms.FORMS[form](target, exported, base)


def draw(pipeline: Any, token_map: Any) -> np.ndarray:
    request = GenerationRequest(
        prompt="a photo of TOK", width=64, height=64, num_inference_steps=3, guidance_scale=4.0, seed=0
    )
    return np.array(generate(pipeline, request, token_map)[0]).astype(int)


def draw_with(tuned: TunedPipeline, *parts: ReadFineTune) -> np.ndarray:
    tuned.apply(tuple(ScaledFineTune(fine_tune=part.fine_tune, scale=part.scale) for part in parts))
    try:
        return draw(tuned.pipeline, tuned.token_map)
    finally:
        tuned.apply(())


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def lora_file(
    path: Path, tuned: TunedPipeline, *, rank: int, dora: bool = False, seed: int = 0, word: str = ""
) -> Path:
    """A folder with a LoRA on all layers of the UNet's first attention and on a convolution."""
    chosen = [
        n
        for n in tuned.layers
        if n.startswith("unet.down_blocks.1.") and (".attn1." in n or n.endswith("conv1"))
    ]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in chosen:
        weight = tuned.parameters[f"{layer}.weight"].detach()
        kernel = weight.shape[2:]
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.1
        tensors[f"{layer}.lora_B.weight"] = (
            torch.randn(len(weight), rank, *(1 for _ in kernel), generator=generator) * 0.1
        )
        if dora:
            length = weight.flatten(1).norm(dim=1) * 1.1
            tensors[f"{layer}.lora_magnitude_vector"] = length.reshape(1, -1, 1, 1) if kernel else length
    path.mkdir()
    save_file(tensors, path / "lora.safetensors")
    if word:
        widths = [
            e.get_input_embeddings().weight.shape[1]
            for e in (tuned.pipeline.text_encoder, tuned.pipeline.text_encoder_2)
        ]
        write_embeddings(path / "embeddings.pti", [torch.randn(1, w, generator=generator) for w in widths])
        (path / "special_params.json").write_text(json.dumps({word: "<s0>"}))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# One fine-tune


@pytest.mark.parametrize("form", ["ours", "diffusers", "kohya", "onetrainer"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_lora_comes_back_to_the_last_bit(
    tuned: TunedPipeline, base: export_forms.LoadedBase, form: str, dora: bool, tmp_path: Path
):
    source = lora_file(tmp_path / "source", tuned, rank=3, dora=dora, word="TOK")
    folder, lost = write(tuned, base, [read(tuned, source, tmp_path)], form, tmp_path)
    assert lost == ([export_forms.DORA_ELSEWHERE] if dora and form in ("kohya", "onetrainer") else [])
    again, _ = write(tuned, base, [read(tuned, folder, tmp_path)], "lora", tmp_path)
    assert same(load_file(again / "lora.safetensors"), load_file(source / "lora.safetensors"))
    assert same(load_file(again / "embeddings.pti"), load_file(source / "embeddings.pti"))
    assert json.loads((again / "special_params.json").read_text()) == {"TOK": "<s0>"}


@pytest.mark.parametrize("form", ["ours", "diffusers", "kohya", "single_file"])
def test_a_trained_lora_draws_the_same(
    tuned: TunedPipeline,
    base: export_forms.LoadedBase,
    fine_tunes: dict[str, Path],
    form: str,
    tmp_path: Path,
):
    source = read(tuned, fine_tunes["lora"], tmp_path)
    folder, lost = write(tuned, base, [source], form, tmp_path)
    assert lost == []
    expected = draw_with(tuned, source)
    assert np.abs(expected - draw(tuned.pipeline, tuned.token_map)).max() > 20
    drawn = (
        draw_checkpoint(folder, tmp_path)
        if form == "single_file"
        else draw_with(tuned, read(tuned, folder, tmp_path))
    )
    assert np.abs(drawn - expected).max() <= 1


def test_the_files_for_web_uis_of_a_training_draw_the_same(
    tuned: TunedPipeline, fine_tunes: dict[str, Path], tmp_path: Path
):
    unpack(fine_tunes["lora"], tmp_path / "unpacked")
    theirs = read(tuned, tmp_path / "unpacked" / "web_ui", tmp_path)
    drawn = draw_with(tuned, theirs)
    assert np.abs(drawn - draw_with(tuned, read(tuned, fine_tunes["lora"], tmp_path))).max() <= 1


@pytest.mark.parametrize("form", ["ours", "single_file"])
def test_a_whole_unet_comes_back(
    tuned: TunedPipeline,
    base: export_forms.LoadedBase,
    fine_tunes: dict[str, Path],
    form: str,
    tmp_path: Path,
):
    source = read(tuned, fine_tunes["full"], tmp_path)
    folder, lost = write(tuned, base, [source], form, tmp_path)
    assert lost == []
    if form == "ours":
        unpack(fine_tunes["full"], tmp_path / "trained")
        assert same(
            load_file(folder / "unet.safetensors"), load_file(tmp_path / "trained" / "unet.safetensors")
        )
    drawn = (
        draw_checkpoint(folder, tmp_path)
        if form == "single_file"
        else draw_with(tuned, read(tuned, folder, tmp_path))
    )
    assert np.abs(drawn - draw_with(tuned, source)).max() <= 1


def draw_checkpoint(folder: Path, tmp_path: Path) -> np.ndarray:
    """Read a checkpoint with diffusers' own reader, and its words with ours."""
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(folder / "TOK_checkpoint.safetensors"),
        config=str(TINY_BASE),
        local_files_only=True,
        dtype=torch.float32,
    )
    pipeline.set_progress_bar_config(disable=True)
    tuned = TunedPipeline(pipeline)
    return draw_with(tuned, read(tuned, folder / "TOK.safetensors", tmp_path))


def test_a_checkpoint_says_that_its_base_predicts_v(
    tuned: TunedPipeline, base: export_forms.LoadedBase, tmp_path: Path
):
    source = read(tuned, lora_file(tmp_path / "source", tuned, rank=1), tmp_path)
    exported, _ = combine([source], base, tuned, form="single_file")
    about = export_forms.About.of(
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, 64, [], {}
    )
    for given, markers in ((exported.about, set()), (about, {"v_pred", "ztsnr"})):
        export_forms.single_file(tmp_path, dataclasses.replace(exported, about=given), base)
        tensors = load_file(tmp_path / "checkpoint.safetensors")
        assert {name for name in tensors if "." not in name} == markers
        assert tensors[UNET + "input_blocks.0.0.weight"].dtype == torch.float16


# ---------------------------------------------------------------------------------------------------------------------
# A LoRA from a whole UNet


def test_a_lora_is_found_again_in_a_whole_unet(
    tuned: TunedPipeline, base: export_forms.LoadedBase, tmp_path: Path
):
    lora = read(tuned, lora_file(tmp_path / "source", tuned, rank=3), tmp_path)
    exported, _ = combine([lora], base, tuned, form="single_file")
    whole = {name: value for name, value in base.parameters.items() if name.startswith("unet.")} | dict(
        exported.whole
    )
    fine_tune = ReadFineTune(fine_tune=_as_whole(lora, whole), record={})
    folder, lost = write(tuned, base, [fine_tune], "kohya", tmp_path, rank=3)
    assert "LoRA of rank 3 leaves 0.0" in lost[0]
    drawn, expected = draw_with(tuned, read(tuned, folder, tmp_path)), draw_with(tuned, lora)
    assert np.abs(drawn - expected).max() <= 1


def test_the_error_of_a_rank_is_told(
    tuned: TunedPipeline, base: export_forms.LoadedBase, fine_tunes: dict[str, Path], tmp_path: Path
):
    source = read(tuned, fine_tunes["full"], tmp_path)
    folder, lost = write(tuned, base, [source], "kohya", tmp_path, rank=4)
    with safe_open(folder / "TOK_lora.safetensors", framework="pt") as file:
        metadata = file.metadata()
    overall, by_layer = float(metadata["rank_error"]), json.loads(metadata["rank_error_by_layer"])
    assert 0.3 < overall < 1
    assert f"{overall:.2%}" in lost[0]

    # The same, computed from the file.
    layer = "unet.mid_block.resnets.0.conv2"
    change = source.fine_tune.whole[f"{layer}.weight"].float() - base.parameters[f"{layer}.weight"]
    kept = read(tuned, folder, tmp_path).fine_tune.lora[f"{layer}.weight"].delta(change)
    assert by_layer[layer] == pytest.approx(float((change - kept).norm() / change.norm()), abs=1e-3)
    best = torch.linalg.svdvals(change.flatten(1))
    assert by_layer[layer] == pytest.approx(float(best[4:].norm() / best.norm()), abs=1e-3)


def _as_whole(lora: ReadFineTune, whole: dict[str, Tensor]) -> Any:
    return dataclasses.replace(lora.fine_tune, whole=whole, lora={})


# ---------------------------------------------------------------------------------------------------------------------
# Several


@pytest.mark.parametrize("rank", [None, 5])
def test_loras_are_added_exactly(
    tuned: TunedPipeline, base: export_forms.LoadedBase, rank: int | None, tmp_path: Path
):
    parts = [
        read(tuned, lora_file(tmp_path / "a", tuned, rank=2, seed=0), tmp_path, 0.8),
        read(tuned, lora_file(tmp_path / "b", tuned, rank=3, seed=1), tmp_path, -0.5),
    ]
    folder, lost = write(tuned, base, parts, "kohya", tmp_path, rank=rank)
    assert lost == []
    merged = read(tuned, folder, tmp_path)
    assert {layer.down.shape[0] for layer in merged.fine_tune.lora.values()} == {5}
    assert np.abs(draw_with(tuned, merged) - draw_with(tuned, *parts)).max() <= 1


def test_a_smaller_rank_is_told(tuned: TunedPipeline, base: export_forms.LoadedBase, tmp_path: Path):
    source = read(tuned, lora_file(tmp_path / "a", tuned, rank=6), tmp_path)
    folder, [lost] = write(tuned, base, [source], "lora", tmp_path, rank=2)
    assert "The rank leaves" in lost
    assert {len(v) for k, v in load_file(folder / "lora.safetensors").items() if "lora_A" in k} == {2}


def test_a_dora_becomes_a_lora_if_it_must(
    tuned: TunedPipeline, base: export_forms.LoadedBase, tmp_path: Path
):
    dora = read(tuned, lora_file(tmp_path / "a", tuned, rank=2, dora=True), tmp_path)
    folder, lost = write(tuned, base, [dora], "kohya", tmp_path, rank=1024)
    assert "became plain LoRA" in lost[0]
    assert "leaves 0.00%" in lost[1]
    plain = read(tuned, folder, tmp_path)
    assert all(isinstance(change, LowRank) for change in plain.fine_tune.lora.values())
    assert np.abs(draw_with(tuned, plain) - draw_with(tuned, dora)).max() <= 1


def test_a_lora_on_a_whole_unet_is_a_whole_unet(
    tuned: TunedPipeline, base: export_forms.LoadedBase, fine_tunes: dict[str, Path], tmp_path: Path
):
    parts = [
        read(tuned, fine_tunes["full"], tmp_path),
        read(tuned, lora_file(tmp_path / "b", tuned, rank=3, dora=True), tmp_path, 0.7),
    ]
    folder, lost = write(tuned, base, parts, "ours", tmp_path)
    assert lost == []
    assert np.abs(draw_with(tuned, read(tuned, folder, tmp_path)) - draw_with(tuned, *parts)).max() <= 1


def test_half_of_a_whole_unet(
    tuned: TunedPipeline, base: export_forms.LoadedBase, fine_tunes: dict[str, Path], tmp_path: Path
):
    half = read(tuned, fine_tunes["full"], tmp_path, 0.5)
    exported, _ = combine([half, half], base, tuned, form="ours")
    name = "unet.conv_in.weight"
    torch.testing.assert_close(exported.whole[name], half.fine_tune.whole[name].float())


def test_a_word_of_two_fine_tunes_is_renamed(
    tuned: TunedPipeline, base: export_forms.LoadedBase, tmp_path: Path
):
    sources = [
        lora_file(tmp_path / name, tuned, rank=1, seed=seed, word="TOK") for seed, name in enumerate("ab")
    ]
    folder, [lost] = write(
        tuned, base, [read(tuned, source, tmp_path) for source in sources], "kohya", tmp_path
    )
    assert "TOK_2" in lost
    assert sorted(path.name for path in folder.iterdir()) == [
        "TOK.safetensors",
        "TOK_2.safetensors",
        "TOK_TOK_2_lora.safetensors",
    ]
    second = load_file(sources[1] / "embeddings.pti")
    assert torch.equal(load_file(folder / "TOK_2.safetensors")["clip_g"], second["text_encoders_1"])


def test_text_encoders_that_a_form_cannot_hold_are_told(
    tuned: TunedPipeline, base: export_forms.LoadedBase, fine_tunes: dict[str, Path], tmp_path: Path
):
    layer = next(name for name in tuned.layers if name.startswith("text_encoder_2."))
    weight = tuned.parameters[f"{layer}.weight"]
    tensors = {
        f"{layer}.lora_A.weight": torch.ones(1, weight.shape[1]),
        f"{layer}.lora_B.weight": torch.ones(len(weight), 1),
    }
    save_file(tensors, tmp_path / "te.safetensors")
    parts = [read(tuned, fine_tunes["full"], tmp_path), read(tuned, tmp_path / "te.safetensors", tmp_path)]
    _, [lost] = write(tuned, base, parts, "ours", tmp_path)
    assert "text encoders" in lost


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def test_the_command_line(fine_tunes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "out"
    assert (
        export.main([str(fine_tunes["lora"]), "--to", "kohya", "--precision", "fp16", "-o", str(output)]) == 0
    )
    printed = capsys.readouterr().out.split()
    assert printed == [str(output / "TOK.safetensors"), str(output / "TOK_lora.safetensors")]
    assert sorted(output.iterdir()) == sorted(map(Path, printed))
    down = next(v for k, v in load_file(printed[1]).items() if k.endswith("lora_down.weight"))
    assert down.dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["a", "b", "--scale", "1"], "once for each"),
        (["a", "--scale", "nan"], "--scale"),
        (["a", "--rank", "0"], "--rank"),
        (["a", "--prompt", "x"], "--push"),
        (["a", "--push", "o/n", "--picture", "x.png"], "more --picture"),
        (["a", "--push", "o/n", "--prompt", "x", "--picture", "missing.png"], "missing.png"),
    ],
)
def test_wrong_options_are_refused_at_once(options: list[str], told: str, capsys: pytest.CaptureFixture):
    assert export.main([*options, "--to", "kohya"]) == 2
    assert told in capsys.readouterr().err


def test_the_command_line_names_every_form():
    assert export.FORMS.keys() == export_forms.FORMS.keys()


def test_a_failed_export_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "x.safetensors").write_bytes(b"no weights")
    assert export.main([str(tmp_path / "x.safetensors"), "--to", "kohya", "-o", str(tmp_path / "out")]) == 1
    assert "x.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
