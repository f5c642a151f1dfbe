"""Full fine-tunes in smaller forms: as difference from the base and as LoRA, written, read, refused and used everywhere."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dataset_and_utils import TokenMap
from sdxl.errors import WeightsError
from sdxl.files.archives import unpack
from sdxl.files.weight_files import WeightFile
from sdxl.model import export_forms, fine_tune_files
from sdxl.model.bases import find_base
from sdxl.model.components import Components, load_components
from sdxl.model.differences import base_digest
from sdxl.model.fine_tune_files import DIFFERENCE, LORA, UNET, TrainedFineTune
from sdxl.model.full_results import in_form
from sdxl.model.loaded_fine_tune import load_for
from sdxl.serving.combining import ReadFineTune, combine
from sdxl.serving.generation import generate
from sdxl.serving.request import GenerationRequest
from sdxl.serving.tuned_pipeline import ScaledFineTune, TunedPipeline
from sdxl.training.starting_point import StartingPoint
from tests.conftest import TINY_BASE, quiet_pipeline
from tests.test_init_from import STILL, begun


@pytest.fixture(scope="module")
def folders(fine_tunes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each form of the full fine-tune."""
    top = tmp_path_factory.mktemp("forms")
    unpack(fine_tunes["full"], top / "whole", skip=lambda path: path.parts[0] == "web_ui")
    rows = load_file(top / "whole" / "embeddings.pti")
    trained = TrainedFineTune(
        kind="unet",
        weights=load_file(top / "whole" / UNET),
        token_rows=[rows[f"text_encoders_{i}"] for i in (0, 1)],
        token_map=TokenMap.parse("TOK:2"),
    )
    record = fine_tune_files.read_record(top / "whole")
    for form in ("difference", "lora"):
        fine_tune_files.write(in_form(trained, form, find_base(str(TINY_BASE))), top / form, record)
    return {form: top / form for form in ("whole", "difference", "lora")}


@pytest.fixture(scope="module")
def tuned() -> TunedPipeline:
    return quiet_pipeline(TINY_BASE)


@pytest.fixture(scope="module")
def components() -> Components:
    return load_components(TINY_BASE, is_lora=False, device=torch.device("cpu"))


def read(tuned: TunedPipeline, folder: Path, scale: float = 1.0) -> ScaledFineTune:
    return ScaledFineTune(fine_tune=tuned.load(fine_tune_files.read(folder, folder)), scale=scale)


def draw(tuned: TunedPipeline, *applied: ScaledFineTune) -> np.ndarray:
    request = GenerationRequest(
        prompt="a photo of TOK", width=64, height=64, num_inference_steps=3, guidance_scale=4.0, seed=0
    )
    tuned.apply(applied)
    try:
        return np.array(generate(tuned.pipeline, request, tuned.token_map)[0]).astype(int)
    finally:
        tuned.apply(())


def values(tuned: TunedPipeline) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tuned.parameters.items()}


def test_a_difference_is_half_as_large_and_draws_the_same(folders: dict[str, Path], tuned: TunedPipeline):
    sizes = {
        form: sum(f.stat().st_size for f in folder.glob("*.safetensors")) for form, folder in folders.items()
    }
    assert sizes["difference"] < 0.53 * sizes["whole"]
    base = draw(tuned)
    whole, difference = (draw(tuned, read(tuned, folders[form])) for form in ("whole", "difference"))
    assert np.abs(whole - base).max() > 50, "the training has changed something"
    assert np.abs(whole - difference).max() <= 3
    assert np.array_equal(draw(tuned), base)


def test_each_weight_is_within_half_a_step(folders: dict[str, Path], tuned: TunedPipeline):
    before = values(tuned)
    whole = read(tuned, folders["whole"]).fine_tune.whole
    tuned.apply((read(tuned, folders["difference"]),))
    after = values(tuned)
    tuned.apply(())
    assert whole.keys() == {name for name in before if name.startswith("unet.")}
    for name, value in whole.items():
        change = value.float() - before[name]
        step = change.flatten(1).abs().amax(1) / 127 if change.ndim > 1 else change.abs() / 1024
        left = (after[name] - value.float()).flatten(1) if change.ndim > 1 else after[name] - value.float()
        bound = step[:, None] if change.ndim > 1 else step
        assert (left.abs() <= bound * 0.51 + 1e-7).all(), name


def test_a_difference_has_a_strength_and_can_be_added_to_another(
    folders: dict[str, Path], tuned: TunedPipeline
):
    difference = read(tuned, folders["difference"])
    before, name = values(tuned), "unet.conv_in.weight"
    tuned.apply((dataclasses.replace(difference, scale=0.5), dataclasses.replace(difference, scale=0.25)))
    three_quarters = values(tuned)[name] - before[name]
    tuned.apply((difference,))
    torch.testing.assert_close(three_quarters, 0.75 * (values(tuned)[name] - before[name]), rtol=0, atol=1e-6)
    tuned.apply(())


def test_it_is_read_while_another_fine_tune_is_applied(folders: dict[str, Path], tuned: TunedPipeline):
    tuned.apply((read(tuned, folders["whole"]),))
    again = read(tuned, folders["difference"])
    tuned.apply(())
    assert again.fine_tune.is_full


def test_the_digest_of_a_base_does_not_depend_on_its_precision(tuned: TunedPipeline):
    base = values(tuned)
    assert base_digest(base) == base_digest({name: value.half() for name, value in base.items()})
    other = base | {"unet.conv_out.bias": base["unet.conv_out.bias"] + 0.01}
    assert base_digest(base) != base_digest(other)


def test_another_base_is_refused(folders: dict[str, Path], components: Components):
    files = fine_tune_files.read(folders["difference"], folders["difference"])
    weight = components.unet.conv_in.weight
    weight.data += 0.01
    try:
        with pytest.raises(WeightsError, match=r"difference from another base .* trained on, tiny-sdxl"):
            load_for(components, files)
    finally:
        weight.data -= 0.01


Damage = Callable[[dict[str, Tensor]], dict[str, Tensor]]
WEIGHT = "unet.conv_in.weight"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "another shape": (lambda t: t | {f"{WEIGHT}.steps": t[f"{WEIGHT}.steps"][:-1]}, "does not fit this base"),
    "more outputs": (
        lambda t: t | {f"{WEIGHT}.step_size": torch.ones(1000)},
        "does not fit this base",
    ),
    "other numbers": (
        lambda t: t | {f"{WEIGHT}.steps": t[f"{WEIGHT}.steps"].float()},
        "does not fit this base",
    ),
    "NaN in a size": (
        lambda t: t | {f"{WEIGHT}.step_size": torch.full_like(t[f"{WEIGHT}.step_size"], torch.nan)},
        "too large or none",
    ),
    "an endless bias": (
        lambda t: (
            t
            | {"unet.conv_in.bias.difference": torch.full_like(t["unet.conv_in.bias.difference"], torch.inf)}
        ),
        "too large or none",
    ),
    "a huge size": (
        lambda t: t | {f"{WEIGHT}.step_size": t[f"{WEIGHT}.step_size"] + 1e38},
        "too large or none",
    ),
    "no sizes": (lambda t: {n: v for n, v in t.items() if n != f"{WEIGHT}.step_size"}, "lacks a part of"),
    "no steps": (lambda t: {n: v for n, v in t.items() if n != f"{WEIGHT}.steps"}, "lacks a part of"),
    "a stranger's weight": (
        lambda t: t | {"unet.other.weight.steps": torch.zeros(4, 4, dtype=torch.int8)},
        "no diff",
    ),
    "a weight of a text encoder": (
        lambda t: t | {"text_encoder.final_layer_norm.bias.difference": torch.zeros(32, dtype=torch.float16)},
        "no difference from a weight",
    ),
    "a name that is long": (lambda t: t | {"x" * 5000: torch.zeros(1)}, "no difference from a weight"),
    "a matrix as a bias": (
        lambda t: t | {f"{WEIGHT}.difference": torch.zeros(1, dtype=torch.float16)},
        "no difference from a weight",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_bad_files_are_refused_in_a_sentence(
    name: str, folders: dict[str, Path], components: Components, tmp_path: Path
):
    damage, told = DAMAGES[name]
    file = folders["difference"] / DIFFERENCE
    save_file(damage(load_file(file)), tmp_path / "any.safetensors", WeightFile(file, "").metadata)
    with pytest.raises(WeightsError, match=told) as error:
        load_for(components, fine_tune_files.read(tmp_path / "any.safetensors", tmp_path))
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)


def test_one_fine_tune_has_only_one_form(folders: dict[str, Path], tmp_path: Path):
    for form, file in (("whole", UNET), ("difference", DIFFERENCE)):
        (tmp_path / file).write_bytes((folders[form] / file).read_bytes())
    with pytest.raises(WeightsError, match="keep only the one that you trained"):
        fine_tune_files.read(tmp_path, tmp_path)


def test_a_training_of_the_whole_unet_begins_with_a_difference(
    folders: dict[str, Path], components: Components
):
    result, loaded = begun(folders["difference"], is_lora=False)
    wanted = load_file(folders["whole"] / UNET)
    for name, value in components.unet.named_parameters():
        bound = (wanted[name] - value).abs().max() / 200 + wanted[name].abs().max() / 1024
        assert (result.weights[name] - wanted[name]).abs().max() <= bound, name
    with pytest.raises(WeightsError, match="is a whole UNet"):
        StartingPoint(fine_tune=loaded, config=dataclasses.replace(STILL, is_lora=True))


@pytest.mark.parametrize("form", ["ours", "single_file", "lora"])
def test_a_difference_is_exported_as_the_whole_is(
    form: str, folders: dict[str, Path], tuned: TunedPipeline, tmp_path: Path
):
    base = export_forms.LoadedBase(
        folder=TINY_BASE,
        vae=TINY_BASE / "vae",
        parameters=values(tuned),
        layers=tuned.layers,
        unet_config=tuned.pipeline.unet.config,
    )
    made = {}
    for source in ("whole", "difference"):
        one = ReadFineTune(fine_tune=read(tuned, folders[source]).fine_tune, record={})
        exported, _ = combine([one], base, tuned, form=form, rank=8)
        (tmp_path / source).mkdir()
        export_forms.FORMS[form](tmp_path / source, exported, base)
        made[source] = exported
    names = [{file.name for file in (tmp_path / source).rglob("*.safetensors")} for source in made]
    assert names[0] == names[1]
    assert made["whole"].whole.keys() == made["difference"].whole.keys()
    assert made["whole"].lora.keys() == made["difference"].lora.keys()
    assert bool(made["difference"].whole) == (form != "lora")


def test_the_lora_of_a_full_fine_tune_comes_near(folders: dict[str, Path], tuned: TunedPipeline):
    assert [file.name for file in folders["lora"].glob("*.safetensors")] == [LORA]
    base, whole = draw(tuned), draw(tuned, read(tuned, folders["whole"]))
    lora = draw(tuned, read(tuned, folders["lora"]))
    assert np.abs(lora - whole).mean() < 0.3 * np.abs(base - whole).mean()
