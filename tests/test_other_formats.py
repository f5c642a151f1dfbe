"""LoRAs and their relatives of all tools change the weights as their own formulas say, at SDXL's names.

The formulas are written here once more, as plainly as the papers do.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from sdxl.errors import WeightsError
from sdxl.model import fine_tune_files
from sdxl.model.ldm_names import unet_names
from sdxl.model.lora_formats import read_lora
from sdxl.serving.tuned_pipeline import TunedPipeline
from tests.conftest import quiet_pipeline
from tests.named_base import base_of, changed

RANK, ALPHA = 4, 2.0
LINEAR = "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k"
OUT = "unet.up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_out.0"
FEED_FORWARD = "unet.mid_block.attentions.0.transformer_blocks.3.ff.net.0.proj"
CONV, POINT = "unet.up_blocks.2.resnets.1.conv1", "unet.up_blocks.1.resnets.0.conv_shortcut"
DOWN, TIME = "unet.down_blocks.0.downsamplers.0.conv", "unet.time_embedding.linear_1"
NORM = "unet.up_blocks.1.resnets.2.norm2"
FIRST, SECOND = (
    "text_encoder.encoder.layers.11.mlp.fc1",
    "text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj",
)
PROJECTION = "text_encoder_2.text_projection"
OF_UNET = [LINEAR, OUT, FEED_FORWARD, CONV, POINT, DOWN, TIME]
OF_TEXT = [FIRST, SECOND, PROJECTION]

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tuned(named_base: Path) -> TunedPipeline:
    made = quiet_pipeline(named_base)
    base_of(made)
    return made


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.3


def weight(tuned: TunedPipeline, layer: str) -> Tensor:
    return base_of(tuned)[f"{layer}.weight"]


def write(folder: Path, name: str, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, metadata)
    return folder / name


def changes(tuned: TunedPipeline, source: Path, scale: float = 1.0) -> Tensors:
    """What a fine-tune adds to each parameter that it changes. Afterwards the base is as it was."""
    tuned.activate(fine_tune_files.read(source, source.parent / "unpacked"), lora_scale=scale)
    found = changed(tuned)
    tuned.activate(None)
    assert not changed(tuned)
    return {name: value - base_of(tuned)[name] for name, value in found.items()}


def same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=2e-4), name


# Names ---------------------------------------------------------------------------------------------------------------


def kohya(layer: str, tuned: TunedPipeline) -> str:
    part, _, name = layer.partition(".")
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part]
    if part != "unet" and not name.startswith(("text_model", "text_projection")):
        name = f"text_model.{name}"  # as all tools call it, whatever transformers does
    return prefix + name.replace(".", "_")


def ldm(layer: str, tuned: TunedPipeline) -> str:
    name = layer.removeprefix("unet.")
    return unet_names([name], tuned.pipeline.unet.config)[name] if name != layer else layer


def kohya_ldm(layer: str, tuned: TunedPipeline) -> str:
    return (
        f"lora_unet_{ldm(layer, tuned)}".replace(".", "_")
        if layer.startswith("unet.")
        else kohya(layer, tuned)
    )


def comfy(layer: str, tuned: TunedPipeline) -> str:
    """As its node for saving LoRAs names them."""
    if layer.startswith("unet."):
        return f"diffusion_model.{ldm(layer, tuned)}"
    part, _, name = layer.partition(".")
    inner = name if name.startswith("text_") else f"text_model.{name}"
    return f"text_encoders.clip_{'l' if part == 'text_encoder' else 'g'}.transformer.{inner}"


NAMINGS: dict[str, tuple[Callable[[str, TunedPipeline], str], list[str]]] = {
    "kohya": (kohya, OF_UNET + OF_TEXT),
    "kohya_ldm": (kohya_ldm, OF_UNET + OF_TEXT),
    "diffusers": (lambda layer, _: layer, OF_UNET + OF_TEXT),
    "without a part": (lambda layer, _: layer.removeprefix("unet."), OF_UNET),
    "compiled": (lambda layer, _: layer.replace("unet.", "unet._orig_mod."), OF_UNET),
    "lycoris": (lambda layer, _: layer.replace("unet.", "lycoris_").replace(".", "_"), OF_UNET),
    "comfy": (comfy, OF_UNET + OF_TEXT),
    "diffusers after comfy's prefix": (lambda layer, _: layer.replace("unet.", "diffusion_model."), OF_UNET),
    "checkpoint": (lambda layer, tuned: f"model.diffusion_model.{ldm(layer, tuned)}", OF_UNET),
    "peft": (lambda layer, _: layer.replace("unet.", "base_model.model."), OF_UNET),
}
ENDINGS = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "default": (".lora_A.default_0.weight", ".lora_B.default_0.weight"),
    "adapter": (".lora_A.my_name.weight", ".lora_B.my_name.weight"),
    "old": (".lora.down.weight", ".lora.up.weight"),
    "linear_layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}


@pytest.mark.parametrize(
    ("naming", "ending"),
    [
        *((naming, "kohya") for naming in NAMINGS),
        *(("diffusers", ending) for ending in ENDINGS),
        ("peft", "peft"),
    ],
)
def test_names(tuned: TunedPipeline, tmp_path: Path, naming: str, ending: str):
    torch.manual_seed(0)
    key, layers = NAMINGS[naming]
    down, up = ENDINGS[ending]
    tensors, expected = {"scaled_fp8": torch.zeros(0)}, {}
    for layer in layers:
        shape = weight(tuned, layer).shape
        a, b = noise(RANK, *shape[1:]), noise(shape[0], RANK, *(1 for _ in shape[2:]))
        tensors |= {key(layer, tuned) + down: a, key(layer, tuned) + up: b}
        tensors[key(layer, tuned) + ".alpha"] = torch.tensor(ALPHA)
        expected[f"{layer}.weight"] = ALPHA / RANK * (b.flatten(1) @ a.flatten(1)).reshape(shape)
    same(changes(tuned, write(tmp_path, "style.safetensors", tensors)), expected)


def test_every_layer_of_sdxl_has_its_names(tuned: TunedPipeline):
    """Also biases and norms: no parameter is unknown under any naming, and none is taken for another."""
    layers = {name.rpartition(".")[0] for name in tuned._parameters}
    assert len(layers) > 1000
    for key, known in NAMINGS.values():
        for layer in layers:
            if layer.startswith("unet.") or known != OF_UNET:
                assert tuned._names.find(key(layer, tuned)) == layer


# Formulas ------------------------------------------------------------------------------------------------------------


def tucker(core: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """[out, in, k, k] from core [r, s, k, k], outer [r, out] and inner [s, in]: Tucker's decomposition."""
    return torch.einsum("rskl,ro,si->oikl", core, outer, inner)


def kronecker(left: Tensor, right: Tensor) -> Tensor:
    """[a c, b d, k, k] of [a, b] and [c, d, k, k]: block by block."""
    (a, b), (c, d) = left.shape, right.shape[:2]
    found = torch.zeros(a * c, b * d, *right.shape[2:])
    for row in range(a):
        for column in range(b):
            found[row * c : (row + 1) * c, column * d : (column + 1) * d] = left[row, column] * right
    return found


def locon_cp(shape: torch.Size) -> tuple[Tensors, Tensor]:
    up, mid, down = noise(shape[0], RANK, 1, 1), noise(RANK, RANK, *shape[2:]), noise(RANK, shape[1], 1, 1)
    found = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}
    return found, tucker(mid, up.flatten(1).T, down.flatten(1)) * ALPHA / RANK


def loha(shape: torch.Size) -> tuple[Tensors, Tensor]:
    columns = shape[1:].numel()
    parts = {f"hada_w{i}_a": noise(shape[0], RANK) for i in (1, 2)}
    parts |= {f"hada_w{i}_b": noise(RANK, columns) for i in (1, 2)}
    first, second = (parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"] for i in (1, 2))
    return parts, (first * second).reshape(shape) * ALPHA / RANK


def loha_tucker(shape: torch.Size) -> tuple[Tensors, Tensor]:
    parts = {f"hada_t{i}": noise(RANK, RANK, *shape[2:]) for i in (1, 2)}
    parts |= {f"hada_w{i}_a": noise(RANK, shape[0]) for i in (1, 2)}
    parts |= {f"hada_w{i}_b": noise(RANK, shape[1]) for i in (1, 2)}
    first, second = (
        tucker(parts[f"hada_t{i}"], parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]) for i in (1, 2)
    )
    return parts, first * second * ALPHA / RANK


def lokr(left: str, right: str) -> Callable[[torch.Size], tuple[Tensors, Tensor]]:
    def make(shape: torch.Size) -> tuple[Tensors, Tensor]:
        (a, b), (c, d), kernel = (2, 4), (shape[0] // 2, shape[1] // 4), shape[2:]
        parts: Tensors = {}
        if left == "low":
            parts |= {"lokr_w1_a": noise(a, RANK), "lokr_w1_b": noise(RANK, b)}
        else:
            parts["lokr_w1"] = noise(a, b)
        one = parts["lokr_w1"] if left == "whole" else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        if right == "whole":
            other = parts["lokr_w2"] = noise(c, d, *kernel)
        elif right == "low":
            parts |= {"lokr_w2_a": noise(c, RANK), "lokr_w2_b": noise(RANK, d * kernel.numel())}
            other = (parts["lokr_w2_a"] @ parts["lokr_w2_b"]).reshape(c, d, *kernel)
        else:
            parts |= {
                "lokr_t2": noise(RANK, RANK, *kernel),
                "lokr_w2_a": noise(RANK, c),
                "lokr_w2_b": noise(RANK, d),
            }
            other = tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
        return parts, kronecker(one, other) * (1 if left == right == "whole" else ALPHA / RANK)

    return make


def whole(shape: torch.Size) -> tuple[Tensors, Tensor]:
    value = noise(*shape)
    return {"diff": value}, value


FORMULAS: dict[str, tuple[Callable[[torch.Size], tuple[Tensors, Tensor]], list[str]]] = {
    "LoCon with a middle": (locon_cp, [CONV, DOWN]),
    "LoHa": (loha, [LINEAR, CONV, POINT, FIRST]),
    "LoHa by Tucker": (loha_tucker, [CONV, DOWN]),
    "LoKr": (lokr("whole", "whole"), [LINEAR, CONV, SECOND]),
    "LoKr low": (lokr("low", "low"), [LINEAR, CONV]),
    "LoKr right low": (lokr("whole", "low"), [LINEAR, CONV]),
    "LoKr by Tucker": (lokr("whole", "Tucker"), [CONV]),
    "difference": (whole, [LINEAR, CONV, TIME, PROJECTION]),
}


@pytest.mark.parametrize("rescaled", ["", "output", "input"])
@pytest.mark.parametrize("formula", FORMULAS)
def test_formulas(tuned: TunedPipeline, tmp_path: Path, formula: str, rescaled: str):
    """Each alone, and as a DoRA whose lengths are of the outputs or of the inputs; at two strengths."""
    torch.manual_seed(0)
    make, layers = FORMULAS[formula]
    tensors, expected = {}, {}
    for layer in layers:
        base = weight(tuned, layer)
        parts, change = make(base.shape)
        if rescaled:
            axis = 0 if rescaled == "output" else 1
            shape = [1] * base.ndim
            shape[axis] = base.shape[axis]
            parts["dora_scale"] = torch.rand(shape)
            for row in range(base.shape[axis]):
                summed = (base + change).select(axis, row)
                change.select(axis, row).copy_(
                    parts["dora_scale"].flatten()[row] * summed / summed.norm() - base.select(axis, row)
                )
        key = kohya_ldm(layer, tuned)
        tensors |= {f"{key}.{role}": value for role, value in parts.items()}
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
        expected[f"{layer}.weight"] = change
    file = write(tmp_path, "style.safetensors", tensors)
    same(changes(tuned, file), expected)
    if rescaled != "input":
        same(changes(tuned, file, scale=-1.5), {name: -1.5 * value for name, value in expected.items()})


def test_biases_norms_and_new_values(tuned: TunedPipeline, tmp_path: Path):
    torch.manual_seed(0)
    size, conv, norm = (weight(tuned, layer).shape for layer in (OUT, CONV, NORM))
    key, at, beside = (kohya(layer, tuned) for layer in (OUT, CONV, NORM))
    tensors = {
        f"{key}.lora_down.weight": noise(RANK, size[1]),
        f"{key}.lora_up.weight": noise(size[0], RANK),
        f"{key}.diff_b": noise(size[0]),
        f"{at}.set_weight": noise(*conv),
        f"{beside}.w_norm": noise(*norm),
        f"{beside}.b_norm": noise(*norm),
        "diffusion_model.out.0.diff": noise(*weight(tuned, "unet.conv_norm_out").shape),
    }
    expected = {
        f"{OUT}.weight": tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"],
        f"{OUT}.bias": tensors[f"{key}.diff_b"],
        f"{CONV}.weight": tensors[f"{at}.set_weight"] - weight(tuned, CONV),
        f"{NORM}.weight": tensors[f"{beside}.w_norm"],
        f"{NORM}.bias": tensors[f"{beside}.b_norm"],
        "unet.conv_norm_out.weight": tensors["diffusion_model.out.0.diff"],
    }
    same(changes(tuned, write(tmp_path, "style.safetensors", tensors)), expected)


TARGETS = r".*(up_blocks\.0.*attn2\.to_(q|out\.0)|up_blocks\.2\.resnets\.0\.(conv1|conv_shortcut))"
LORA = {"r": RANK, "lora_alpha": 6, "init_lora_weights": False, "target_modules": TARGETS}
RANDOM = {"r": RANK, "alpha": 6, "init_weights": False, "target_modules": TARGETS}
CONFIGS = {
    "lora": LoraConfig(**LORA, rank_pattern={"conv1": 2}, alpha_pattern={r"attn2\.to_q": 1}),
    "rslora": LoraConfig(**LORA, use_rslora=True),
    "dora": LoraConfig(**LORA, use_dora=True),
    "lora with biases": LoraConfig(
        **{**LORA, "target_modules": ["to_out.0", "conv_shortcut"]}, lora_bias=True
    ),
    "loha": LoHaConfig(**RANDOM, use_effective_conv2d=True),
    "lokr": LoKrConfig(**RANDOM, use_effective_conv2d=True, decompose_both=True, alpha_pattern={"to_q": 2}),
    "whole lokr": LoKrConfig(**{**RANDOM, "r": 64}),
}


@pytest.mark.filterwarnings("ignore:Adapter")  # peft takes biases for broken matrices
@pytest.mark.parametrize("method", CONFIGS)
def test_folders_of_peft(tuned: TunedPipeline, named_base: Path, tmp_path: Path, method: str):
    """Saved and merged by peft itself."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(named_base, subfolder="unet", dtype=torch.float32)
    base = {name: value.clone() for name, value in unet.state_dict().items()}
    model: Any = get_peft_model(unet, CONFIGS[method])  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    expected = {
        f"unet.{name}": value - base[name]
        for name, value in merged.items()
        if not torch.equal(value, base[name])
    }
    assert len(expected) > 4
    same(changes(tuned, tmp_path / "adapter"), expected)
    if method == "lora":
        same(changes(tuned, tmp_path / "adapter" / "adapter_model.safetensors"), expected)


def test_a_peft_file_without_its_configuration_is_told(tuned: TunedPipeline, tmp_path: Path, caplog):
    tensors = {
        f"base_model.model.{LINEAR.removeprefix('unet.')}.lora_{half}.weight": value
        for half, value in (
            ("A", noise(RANK, weight(tuned, LINEAR).shape[1])),
            ("B", noise(weight(tuned, LINEAR).shape[0], RANK)),
        )
    }
    changes(tuned, write(tmp_path, "style.safetensors", tensors))
    assert "has no adapter_config.json beside it" in caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "adapter_config.json cannot be read"),
        ("{", "adapter_config.json cannot be read"),
        ('{"peft_type": "OFT"}', "is of the method 'OFT', but only LORA, LOHA, LOKR are read"),
        ('{"r": 9}', "the rank 9 in its metadata, but its matrices have rank 4"),
        ('{"r": 4, "lora_alpha": "x"}', "the alpha 'x', which is no number"),
    ],
)
def test_configurations_of_peft_that_cannot_be_read(
    tuned: TunedPipeline, tmp_path: Path, config: str, message: str
):
    key = "base_model.model." + LINEAR.removeprefix("unet.")
    rows, columns = weight(tuned, LINEAR).shape
    write(
        tmp_path / "a",
        "adapter_model.safetensors",
        {f"{key}.lora_A.weight": noise(RANK, columns), f"{key}.lora_B.weight": noise(rows, RANK)},
    )
    (tmp_path / "a" / "adapter_config.json").write_text(config)
    with pytest.raises(WeightsError, match=message):
        changes(tuned, tmp_path / "a")


# What is refused -----------------------------------------------------------------------------------------------------

K, Q = kohya(LINEAR, None), kohya(CONV, None)  # type: ignore[arg-type]
REFUSED: dict[str, tuple[Tensors, str]] = {
    "SD 1.5": ({"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": noise(4, 768)}, "for no layer of this base (the file looks like SD 1.5)"),
    "SD 1.5's encoder": ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": noise(4, 768)}, "for no layer of this base (the file looks like SD 1.5 or SD 2)"),
    "SD 2": ({f"{K}.lora_down.weight": noise(4, 1024), f"{K}.lora_up.weight": noise(320, 4)}, "does not fit this base (at unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight) (the file looks like SD 2)"),
    "Flux": ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": noise(4, 9)}, "(the file looks like Flux)"),
    "Cascade": ({"lora_prior_unet_down_blocks_0.lora_down.weight": noise(4, 9)}, "(the file looks like Stable Cascade)"),
    "OFT": ({f"{K}.oft_blocks": noise(4, 9, 9)}, "no part of a LoRA that is read here (the file looks like OFT"),
    "two adapters": ({f"{LINEAR}.lora_A.default_0.weight": noise(4, 9), f"{LINEAR}.lora_A.default_1.weight": noise(4, 9)}, "holds two LoRAs for"),
    "two forms": ({f"{LINEAR}.lora_A.weight": noise(4, 9), f"{K}.lora_down.weight": noise(4, 9)}, "holds two LoRAs for"),
    "no bias": ({f"{K}.diff_b": noise(64)}, "does not fit this base (at unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.bias)"),
    "half of LoHa": ({f"{K}.hada_w1_a": noise(4, 4), f"{K}.hada_w1_b": noise(4, 4)}, "holds only half of the LoRA of"),
    "half of LoKr": ({f"{K}.lokr_w1": noise(4, 4)}, "holds only half of the LoRA of"),
    "alpha alone": ({f"{K}.alpha": noise(1), f"{Q}.diff_b": noise(32)}, "holds only half of the LoRA of"),
    "LoHa of two sizes": ({f"{K}.hada_w1_a": noise(4, 4), f"{K}.hada_w1_b": noise(4, 4), f"{K}.hada_w2_a": noise(5, 4), f"{K}.hada_w2_b": noise(4, 4)}, "no valid LoRA matrices"),
    "LoKr of another size": ({f"{K}.lokr_w1": noise(4, 4), f"{K}.lokr_w2": noise(4, 4)}, "does not fit this base"),
    "DoRA of another size": ({f"{K}.diff": noise(64, 80), f"{K}.dora_scale": noise(63, 1)}, "does not fit this base"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_says_why(tuned: TunedPipeline, tmp_path: Path, name: str):
    tensors, message = REFUSED[name]
    with pytest.raises(WeightsError) as caught:
        changes(tuned, write(tmp_path, "style.safetensors", tensors))
    said = str(caught.value)
    assert message in said and said.startswith("style.safetensors ") and len(said) <= 300


RIGHT: list[dict[str, list[int]]] = [
    {"lora_down.weight": [2, 2, 3, 3], "lora_up.weight": [4, 2, 1, 1], "dora_scale": [1, 2, 1, 1], "diff_b": [4]},
    {"lora_down.weight": [2, 2], "lora_up.weight": [4, 2], "lora_mid.weight": [2, 2, 3, 3], "dora_scale": [4, 1]},
    {"lora_down.weight": [1, 2], "lora_up.weight": [4, 9], "lora_mid.weight": [9, 1, 3, 3], "alpha": []},
    {"hada_w1_a": [4, 2], "hada_w1_b": [2, 18], "hada_w2_a": [4, 1], "hada_w2_b": [1, 18], "alpha": []},
    {f"hada_{role}": shape for i in "12" for role, shape in ((f"w{i}_a", [2, 4]), (f"w{i}_b", [2, 2]), (f"t{i}", [2, 2, 3, 3]))},
    {"lokr_w1": [2, 1], "lokr_w2_a": [2, 2], "lokr_w2_b": [2, 18], "dora_scale": [4]},
    {"lokr_w1_a": [2, 2], "lokr_w1_b": [2, 2], "lokr_t2": [2, 2, 3, 3], "lokr_w2_a": [2, 2], "lokr_w2_b": [2, 1]},
    {"lokr_w1": [4, 1], "lokr_w2": [1, 2, 3, 3]},
    {"diff": [4, 2, 3, 3]},
    {"set_weight": [4, 2, 3, 3]},
]  # fmt: skip
"""Role → shape, of changes of a convolution [4, 2, 3, 3]."""


def test_any_shapes_are_used_or_refused():
    """Right ones with one dimension, or one role, changed: never another error, never another shape."""

    class Layer:
        find = staticmethod(lambda key: "layer")

    base = torch.zeros(4, 2, 3, 3)
    outcomes = {"used": 0, "refused": 0, "misfit": 0}
    chance = random.Random(0)
    for _ in range(3000):
        shapes = {role: list(shape) for role, shape in chance.choice(RIGHT).items()}
        role = chance.choice(list(shapes))
        spoil = chance.choice(("nothing", "size", "fewer", "more", "missing", "borrowed"))
        if spoil == "size" and shapes[role]:
            shapes[role][chance.randrange(len(shapes[role]))] = chance.choice((0, 1, 2, 3, 4, 9))
        elif spoil == "fewer" and shapes[role]:
            shapes[role].pop()
        elif spoil == "more":
            shapes[role].append(chance.choice((1, 2)))
        elif spoil == "missing":
            del shapes[role]
        elif spoil == "borrowed":
            shapes |= dict([chance.choice(list(chance.choice(RIGHT).items()))])
        try:
            found = read_lora(
                {f"lora_x.{role}": torch.ones(shape) for role, shape in shapes.items()}, {}, Layer(), "x"
            )  # type: ignore[arg-type]
        except WeightsError:
            outcomes["refused"] += 1
            continue
        change = found.get("layer.weight")
        if change is None or not change.fits(tuple(base.shape)):
            outcomes["misfit"] += 1
            continue
        outcomes["used"] += 1
        assert change.added(base, base, 0.5).shape == base.shape
        assert change.nbytes > 0
    assert min(outcomes.values()) > 200
