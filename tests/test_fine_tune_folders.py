"""Whole weights, words and folders as other tools leave them are found and become the base's parameters and tokens."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dataset_and_utils import TokenMap, write_embeddings
from sdxl.errors import WeightsError
from sdxl.files.archives import pack_tar
from sdxl.model import fine_tune_files
from sdxl.model.ldm_names import CLIP_G, CLIP_L, UNET, VAE, clip_g_to_ldm, unet_names, vae_to_ldm
from sdxl.model.token_files import read_rows
from sdxl.serving.tuned_pipeline import TunedPipeline
from tests.conftest import quiet_pipeline
from tests.named_base import WIDTHS, base_of, changed

LAYER = "mid_block.attentions.0.proj_in"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tuned(named_base: Path) -> TunedPipeline:
    made = quiet_pipeline(named_base)
    base_of(made)
    return made


@pytest.fixture(scope="module")
def other(tuned: TunedPipeline) -> Tensors:
    """Other values of all parameters of the UNet and the text encoders, in half precision."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: (value.detach() + 0.05 * torch.randn(value.shape, generator=generator)).half()
        for name, value in tuned._parameters.items()
    }


def of_part(weights: Tensors, part: str) -> Tensors:
    return {
        name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")
    }


def save(folder: Path, name: str, tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    return folder / name


def applied(tuned: TunedPipeline, source: Path) -> Tensors:
    """The parameters with a fine-tune. Afterwards the base is as it was."""
    tuned.activate(fine_tune_files.read(source, source.parent / "unpacked"))
    found = changed(tuned)
    tuned.activate(None)
    assert not changed(tuned)
    return found


def equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name].float()) for name, value in found.items())


def unet_of(other: Tensors) -> Tensors:
    return {name: value for name, value in other.items() if name.startswith("unet.")}


# Whole weights -------------------------------------------------------------------------------------------------------


def in_ldm(tuned: TunedPipeline, other: Tensors, prefix: str) -> Tensors:
    unet = of_part(other, "unet")
    names = unet_names(unet, tuned.pipeline.unet.config)
    assert names.keys() == unet.keys()
    return {prefix + names[name]: value for name, value in unet.items()}


@pytest.mark.parametrize("prefix", ["", UNET, "diffusion_model."])
def test_a_unet_with_the_names_of_checkpoints(
    tuned: TunedPipeline, other: Tensors, tmp_path: Path, prefix: str
):
    equal(applied(tuned, save(tmp_path, "x.safetensors", in_ldm(tuned, other, prefix))), unet_of(other))


@pytest.mark.parametrize("prefix", ["", "unet.", UNET])
def test_a_unet_with_the_names_of_diffusers(
    tuned: TunedPipeline, other: Tensors, tmp_path: Path, prefix: str
):
    tensors = {prefix + name: value for name, value in of_part(other, "unet").items()}
    projection = f"{prefix}{LAYER}.weight"
    tensors[projection] = tensors[projection][:, :, None, None]  # as a convolution
    equal(applied(tuned, save(tmp_path, "x.safetensors", tensors)), unet_of(other))


def test_a_single_file_checkpoint(tuned: TunedPipeline, other: Tensors, tmp_path: Path, caplog):
    """The UNet and both text encoders are applied; the autoencoder is told."""
    first = of_part(other, "text_encoder")
    tensors = in_ldm(tuned, other, UNET)
    tensors |= {CLIP_L + name.removeprefix("text_model."): value for name, value in first.items()}
    tensors |= {
        CLIP_G + name: value for name, value in clip_g_to_ldm(of_part(other, "text_encoder_2")).items()
    }
    tensors |= {
        VAE + name: value
        for name, value in vae_to_ldm(tuned.pipeline.vae.state_dict(), tuned.pipeline.vae.config).items()
    }
    tensors |= {
        f"{CLIP_L}embeddings.position_ids": torch.arange(77)[None],
        f"{CLIP_G}logit_scale": torch.tensor(4.6),
    }
    tensors |= {
        "v_pred": torch.zeros(0),
        "denoiser.sigmas": torch.zeros(1000),
        "model_ema.num_updates": torch.tensor(1),
    }
    equal(applied(tuned, save(tmp_path, "pony.safetensors", tensors)), other)
    assert "pony.safetensors holds an autoencoder, which is not used" in caplog.text


@pytest.mark.parametrize("kind", ["plain", "variants", "shards", "unet alone", "the folder unet"])
def test_a_pipeline_of_diffusers(tuned: TunedPipeline, other: Tensors, tmp_path: Path, kind: str):
    folder = tmp_path / "pipeline"
    unet, expected = of_part(other, "unet"), other
    if kind == "shards":
        names = sorted(unet)
        for shard in range(3):
            part = {name: unet[name] for name in names[shard::3]}
            save(folder / "unet", f"diffusion_pytorch_model-0000{shard + 1}-of-00003.safetensors", part)
    else:
        save(folder / "unet", "diffusion_pytorch_model.fp16.safetensors", unet)
    if kind == "variants":
        save(
            folder / "unet",
            "diffusion_pytorch_model.safetensors",
            {name: value.float() for name, value in unet.items()},
        )
        save(
            folder / "unet",
            "diffusion_pytorch_model.non_ema.safetensors",
            {name: value * 0 for name, value in unet.items()},
        )
        save(
            folder / "unet_ema",
            "diffusion_pytorch_model.safetensors",
            {name: value * 0 for name, value in unet.items()},
        )
    if kind in ("unet alone", "the folder unet"):
        expected = unet_of(other)
    else:
        for part in ("text_encoder", "text_encoder_2"):
            save(folder / part, "model.safetensors", of_part(other, part))
        save(
            folder / "vae",
            "diffusion_pytorch_model.safetensors",
            {"decoder.conv_in.weight": torch.zeros(4, 4)},
        )
    (folder / "model_index.json").write_text("{}")
    equal(applied(tuned, folder / "unet" if kind == "the folder unet" else folder), expected)
    if kind == "plain":
        tar = tmp_path / "pipeline.tar"
        pack_tar(
            {f"my/{path.relative_to(folder)}": path for path in folder.rglob("*") if path.is_file()}, tar
        )
        equal(applied(tuned, tar), expected)


def test_a_missing_shard_is_told(tuned: TunedPipeline, other: Tensors, tmp_path: Path):
    file = save(
        tmp_path / "unet", "diffusion_pytorch_model-00001-of-00002.safetensors", of_part(other, "unet")
    )
    with pytest.raises(WeightsError, match=f"^{file.name} is one of 2 files, of which only 1 are here"):
        applied(tuned, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_blocks.3.resnets.0.conv1.weight": torch.zeros(4)}, "which is no parameter of this base: give"),
        ({"controlnet_cond_embedding.conv_in.weight": torch.zeros(4)}, r"\(the file looks like a ControlNet\): give"),
        ({f"{LAYER}.base_layer.weight": torch.zeros(4)}, r"\(the file looks like a UNet saved together with its LoRA\)"),
        ({"conv_in.scale_weight": torch.zeros(1)}, r"\(the file looks like quantised weights\)"),
        ({"mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.zeros(64, 768)}, r"\(the file looks like SD 1.5\)"),
        ({"conv_in.weight": torch.zeros(32, 9, 3, 3)}, r"does not fit this base \(at unet.conv_in.weight\): use"),
        ({f"{LAYER}.weight": torch.zeros(64)}, r"does not fit this base \(at unet.mid_block"),
    ],
)  # fmt: skip
def test_other_unets_say_what_they_are(tuned, other: Tensors, tmp_path: Path, change: Tensors, message: str):
    with pytest.raises(WeightsError, match=message):
        applied(tuned, save(tmp_path, "x.safetensors", of_part(other, "unet") | change))


@pytest.mark.parametrize("shape", [(), (4,), (2, 2)])
def test_a_damaged_second_encoder_is_refused(tuned: TunedPipeline, tmp_path: Path, shape: tuple[int, ...]):
    fused = f"{CLIP_G}transformer.resblocks.0.attn.in_proj_weight"
    file = save(
        tmp_path,
        "x.safetensors",
        {f"{UNET}input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3), fused: torch.zeros(shape)},
    )
    with pytest.raises(WeightsError, match=r"^x.safetensors (has a damaged second|does not fit)"):
        applied(tuned, file)


def test_words_beside_another_text_encoder(tuned: TunedPipeline, other: Tensors, tmp_path: Path):
    """The table of embeddings of the fine-tune is used, then the base's again."""
    rows = [torch.full((2, width), 0.5) for width in WIDTHS]
    for name, tensors in (
        ("whole", {f"text_encoder.{n}": v for n, v in of_part(other, "text_encoder").items()}),
        ("words", {}),
    ):
        save(
            tmp_path / name,
            "unet.safetensors",
            {f"unet.{n}": v for n, v in of_part(other, "unet").items()} | tensors,
        )
        write_embeddings(tmp_path / name / "embeddings.pti", rows)
        (tmp_path / name / "special_params.json").write_text(json.dumps({"TOK": "<s0><s1>"}))
    base = tuned.pipeline.text_encoder.get_input_embeddings().weight.detach().clone()
    for name in ("words", "whole", "words"):
        tuned.activate(fine_tune_files.read(tmp_path / name, tmp_path))
        table = tuned.pipeline.text_encoder.get_input_embeddings().weight
        ids = tuned.pipeline.tokenizer.convert_tokens_to_ids(["<s0>", "<s1>"])
        assert torch.equal(table[ids], rows[0])
        wanted = other["text_encoder.embeddings.token_embedding.weight"].float() if name == "whole" else base
        assert torch.equal(table[: len(base)], wanted)
    tuned.activate(None)
    assert torch.equal(tuned.pipeline.text_encoder.get_input_embeddings().weight, base)


# Folders -------------------------------------------------------------------------------------------------------------


def lora(strength: float, *, of_web_uis: bool = False) -> Tensors:
    down, up = torch.ones(2, 64), torch.full((64, 2), strength)
    if of_web_uis:
        key = "lora_unet_" + LAYER.replace(".", "_")
        return {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_up.weight": up,
            f"{key}.alpha": torch.tensor(2.0),
        }
    return {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}


def strength_of(tuned: TunedPipeline, source: Path) -> float:
    found = applied(tuned, source)
    assert found.keys() == {f"unet.{LAYER}.weight"}
    return round(
        float((found[f"unet.{LAYER}.weight"] - tuned._parameters[f"unet.{LAYER}.weight"]).mean()) / 2, 3
    )


FOLDERS: dict[str, dict[str, Tensors]] = {
    "two forms": {"pytorch_lora_weights.safetensors": lora(1), "pytorch_lora_weights_kohya.safetensors": lora(9, of_web_uis=True)},
    "two forms, named as the run": {"my_run.safetensors": lora(9, of_web_uis=True), "pytorch_lora_weights.safetensors": lora(1)},
    "two folders deep": {"a/b/x.safetensors": lora(1)},
    "earlier steps": {"x.safetensors": lora(1), "checkpoint-500/x.safetensors": lora(9), "a/x.safetensors": lora(9)},
    "only steps": {"run/checkpoint-500/x.safetensors": lora(9), "run/checkpoint-1000/x.safetensors": lora(1)},
    "steps before a folder": {"checkpoint-1/x.safetensors": lora(9), "output/x.safetensors": lora(1)},
    "with a copy for web UIs": {"lora.safetensors": lora(1), "web_ui/lora.safetensors": lora(9, of_web_uis=True), "web_ui/TOK.safetensors": {"clip_l": torch.ones(1, 32), "clip_g": torch.ones(1, 48)}},
    "beside other models": {"vae/model.safetensors": {"decoder.conv_in.weight": torch.zeros(4, 4)}, "x/y/z.safetensors": lora(1)},
    "hidden files": {".cache/x.safetensors": lora(9), "__MACOSX/x.safetensors": lora(9), "x/y.safetensors": lora(1)},
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("name", FOLDERS)
def test_one_lora_is_found(tuned: TunedPipeline, tmp_path: Path, name: str, packed: bool):
    folder = tmp_path / "given"
    for path, tensors in FOLDERS[name].items():
        save((folder / path).parent, Path(path).name, tensors)
    if packed:
        with zipfile.ZipFile(tmp_path / "given.zip", "w") as archive:
            for path in FOLDERS[name]:
                archive.write(folder / path, path)
    assert strength_of(tuned, tmp_path / "given.zip" if packed else folder) == 1


def test_two_loras_stay_two(tuned: TunedPipeline, tmp_path: Path):
    """Two epochs in one form, or two forms of different size."""
    larger = {
        key: torch.cat([value, value]) if "down" in key else value
        for key, value in lora(1, of_web_uis=True).items()
    }
    for first, second in ((lora(1), lora(2)), (lora(1), larger), (lora(1, of_web_uis=True),) * 2):
        save(tmp_path, "a.safetensors", first)
        save(tmp_path, "b.safetensors", second)
        with pytest.raises(WeightsError, match=r"holds a.safetensors, b.safetensors: keep only the one"):
            applied(tuned, tmp_path)


def test_what_is_no_fine_tune_says_what_it_is(tmp_path: Path):
    file = save(tmp_path, "x.safetensors", {"decoder.conv_in.weight": torch.zeros(4, 4)})
    with pytest.raises(
        WeightsError, match=r"^x.safetensors holds no UNet, LoRA .* \(the file looks like an autoencoder"
    ):
        fine_tune_files.read(file, tmp_path)
    with pytest.raises(WeightsError, match=r"looks like SD 1\.5"):
        fine_tune_files.read(save(tmp_path, "y.safetensors", {"emb_params": torch.zeros(2, 768)}), tmp_path)


# Words ---------------------------------------------------------------------------------------------------------------


def rows(value: float, count: int = 2) -> dict[str, Tensor]:
    return {
        key: torch.full((count, width), value)
        for key, width in zip(("clip_l", "clip_g"), WIDTHS, strict=True)
    }


def words(tuned: TunedPipeline, source: Path) -> tuple[dict[str, str], tuple[Tensor, ...]]:
    loaded = tuned.load(fine_tune_files.read(source, source.parent / "unpacked"))
    return dict(loaded.token_map.placeholders), loaded.rows


def test_words_in_a_loras_file(tuned: TunedPipeline, tmp_path: Path, caplog):
    """Numbered after those of files beside it."""
    tensors = lora(1, of_web_uis=True)
    tensors |= {f"bundle_emb.my.tok.{key}": value for key, value in rows(2, 1).items()}
    tensors |= {f"bundle_emb.<cat>.{key}": value[0] for key, value in rows(3, 1).items()}
    tensors["bundle_emb.<cat>.clip_l_out"] = torch.zeros(1, 32)
    save(tmp_path, "style.safetensors", tensors)
    save(tmp_path, "<dog>.safetensors", rows(1))
    found, (first, second) = words(tuned, tmp_path)
    assert found.keys() == {"dog", "my.tok", "cat"} and found["dog"] == "<s0><s1>"
    assert {found["my.tok"], found["cat"]} == {"<s2>", "<s3>"}
    assert first.shape == (4, 32) and second.shape == (4, 48)
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist()) == [1, 1, 2, 3]
    assert "bundle_emb.<cat>.clip_l_out is not used" in caplog.text
    assert strength_of(tuned, tmp_path / "style.safetensors") == 1


def test_a_trainings_own_rows_come_first(tuned: TunedPipeline, tmp_path: Path):
    """The words of a LoRA for web UIs beside embeddings.pti are the same ones."""
    save(
        tmp_path,
        "style.safetensors",
        lora(1, of_web_uis=True) | {f"bundle_emb.TOK.{k}": v for k, v in rows(9).items()},
    )
    save(tmp_path, "TOK.safetensors", rows(9))
    write_embeddings(tmp_path / "embeddings.pti", list(rows(1).values()))
    (tmp_path / "special_params.json").write_text(json.dumps({"TOK": "<s0><s1>"}))
    found, (first, _) = words(tuned, tmp_path)
    assert found == {"TOK": "<s0><s1>"} and torch.equal(first, torch.ones(2, 32))


def test_textual_inversion_of_diffusers(tuned: TunedPipeline, tmp_path: Path, caplog):
    both = rows(1, 3)
    save(tmp_path / "two", "learned_embeds.safetensors", {"<cat-toy>": both["clip_l"]})
    save(tmp_path / "two", "learned_embeds_2.safetensors", {"<cat-toy>": both["clip_g"]})
    found, (first, second) = words(tuned, tmp_path / "two")
    assert (
        found == {"cat-toy": "<s0><s1><s2>"}
        and torch.equal(first, both["clip_l"])
        and torch.equal(second, both["clip_g"])
    )
    assert "one text encoder only" not in caplog.text

    for number, (key, table) in enumerate(zip(both, tuned._tables, strict=True)):
        other = tuned._tables[1 - number].weight
        file = save(tmp_path / "one", "learned_embeds.safetensors", {"<cat-toy>": both[key]})
        found, given = words(tuned, file)
        assert found == {"cat-toy": "<s0><s1><s2>"} and torch.equal(given[number], both[key])
        assert torch.allclose(given[1 - number], other.detach().mean(0).expand(3, -1))
        assert "cat-toy has rows for one text encoder only" in caplog.text
        assert table.weight.shape[1] != other.shape[1]


def test_words_are_written_with_or_without_brackets(tuned: TunedPipeline, tmp_path: Path):
    save(tmp_path, "<dog>.safetensors", rows(1))
    tuned.activate(fine_tune_files.read(tmp_path, tmp_path))
    for prompt in ("a dog", "a <dog>"):
        assert tuned.token_map.substitute(prompt) == "a <s0><s1>"
    tuned.activate(None)
    theirs = TokenMap({"<dog>": "<s0>"})
    assert theirs.substitute("a <dog>, a dog, a <<dog>>") == "a <s0>, a dog, a <s0>"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": {"clip_l": torch.ones(2, 32), "clip_g": torch.ones(3, 48)}}, "a must have equally many rows"),
        ({"a": {"clip_l": torch.ones(2, 0), "clip_g": torch.ones(2, 48)}}, "a.safetensors holds no rows"),
        ({"a": {"clip_l": torch.ones(2, 2, 32)}}, "a.safetensors holds no rows"),
        (
            {"a": {"clip_l": torch.ones(1001, 32), "clip_g": torch.ones(1001, 48)}},
            "makes more than 1000 token rows",
        ),
        ({"a": {"<x>": torch.ones(1, 40)}}, "a.safetensors was made for a text encoder of width 40"),
        (
            {"a": {"x": torch.ones(1, 32)}, "b": {"<x>": torch.ones(1, 32)}},
            "b.safetensors names x, as another file",
        ),
        ({"a": {"<>": torch.ones(1, 32)}}, "a.safetensors names a token '<>'"),
        ({"a": {"\n": torch.ones(1, 32)}}, "a.safetensors names a token"),
        ({"a": {"clip_l": torch.ones(2, 40), "clip_g": torch.ones(2, 48)}}, "text encoders of widths"),
    ],
)
def test_words_that_cannot_be_used_say_why(tuned, tmp_path: Path, files: dict[str, Tensors], message: str):
    for name, tensors in files.items():
        save(tmp_path, f"{name}.safetensors", tensors)
    with pytest.raises(WeightsError, match=message):
        words(tuned, tmp_path)


def test_without_a_base_both_encoders_need_rows(tmp_path: Path):
    save(tmp_path, "a.safetensors", {"clip_l": torch.ones(2, 32)})
    with pytest.raises(WeightsError, match="rows for one text encoder only"):
        read_rows(fine_tune_files.read(tmp_path, tmp_path))
