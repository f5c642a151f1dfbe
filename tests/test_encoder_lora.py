"""A LoRA on the text encoders: what it changes, when it stops, what the base as teacher reads, and who reads its files."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import train
from dataset_and_utils import Example, ExampleDataset, TokenEmbeddingsHandler, TokenMap
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.errors import UserInputError
from sdxl.files.archives import unpack
from sdxl.model import fine_tune_files
from sdxl.model.components import Components, load_components, weights_variant_of
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.model.prompt_chunks import token_ids
from sdxl.training.batches import Batches
from sdxl.training.caption_encoding import encode_captions
from sdxl.training.contradictions import refuse_contradictions
from sdxl.training.encoder_lora import with_encoder_lora
from sdxl.training.examples import cache_examples
from sdxl.training.loss import DenoisingLoss, Part
from sdxl.training.recipe import fine_tune
from sdxl.training.taught import TaughtExample
from sdxl.training.teaching import taught_examples
from sdxl.training.text_conditioning import TextConditioning, read_captions
from sdxl.training.trainable import as_base, lora
from tests.conftest import QUICK, call, quiet_pipeline, write_captioned_zip
from tests.test_training import CONFIG

CPU = torch.device("cpu")
TOK = TokenMap.parse("TOK:2")
WITH_ENCODERS = dataclasses.replace(
    CONFIG, is_lora=True, lora_targets="transformer", text_encoder_lora=True, text_encoder_lr=1e-3
)
PARTS = ("text_encoder.", "text_encoder_2.")
PROMPT = "a red house on a green hill"


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    archive = write_captioned_zip(folder / "captioned.zip")
    return prepare_dataset(archive, folder / "dataset", config=PreprocessConfig(target_size=64))


@pytest.fixture
def prepared(dataset_folder: Path, narrow_base: Path) -> tuple[Components, ExampleDataset]:
    components = load_components(narrow_base, is_lora=True, device=CPU)
    return components, cache_examples(dataset_folder, components, TOK, seed=0)


def ids_of(prompt: str, components: Components) -> tuple[Tensor, Tensor]:
    first, second = token_ids([prompt], components.tokenizers, TOK)[0]
    return first[None], second[None]


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_both_encoders_change_up_to_the_pivot(prepared, optimizer: str):
    components, examples = prepared
    before = [dict(encoder.state_dict()) for encoder in components.text_encoders]
    before = [{name: value.clone() for name, value in weights.items()} for weights in before]
    with torch.no_grad():
        plain = read_captions(components.text_encoders, ids_of(PROMPT, components))
    seen: list[TrainedFineTune] = []
    config = dataclasses.replace(
        WITH_ENCODERS, optimizer=optimizer, lora_lr=1.0, checkpointing_steps=1, preservation=0.5
    )
    fine_tune(components, examples, config, on_checkpoint=lambda step, model: seen.append(model))

    for part in PARTS:
        ups = [name for name in seen[0].weights if name.startswith(part) and "lora_B" in name]
        assert ups and {name.split(".")[1] for name in ups} == {"text_model"}
        for name in ups:
            moved = [not torch.equal(a.weights[name], b.weights[name]) for a, b in itertools.pairwise(seen)]
            assert moved == [True] * (CONFIG.pivot_step - 1) + [False] * (6 - CONFIG.pivot_step), name
            assert seen[-1].weights[name].abs().max() > 0
    for which in (0, 1):  # the token rows train beside them
        moved = [
            not torch.equal(a.token_rows[which], b.token_rows[which]) for a, b in itertools.pairwise(seen)
        ]
        assert moved == [True] * (CONFIG.pivot_step - 1) + [False] * (6 - CONFIG.pivot_step)
    for encoder, weights in zip(components.text_encoders, before, strict=True):
        now = {name.replace(".base_layer", ""): value for name, value in encoder.state_dict().items()}
        assert all(torch.equal(now[name], value) for name, value in weights.items())
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
    with torch.no_grad():
        changed = read_captions(components.text_encoders, ids_of(PROMPT, components))
    assert not torch.allclose(changed.pooled, plain.pooled, atol=1e-4)
    width = components.text_encoders[0].config.hidden_size
    for part in (slice(width), slice(width, None)):  # the first encoder's states, then the second's
        assert not torch.allclose(changed.hidden[..., part], plain.hidden[..., part], atol=1e-4)


@pytest.mark.parametrize("taught", [True, False])
def test_the_base_as_teacher_reads_captions_with_its_own_encoders(prepared, taught: bool, narrow_base: Path):
    """With equal UNets, a difference to the teacher can come from the text only."""
    components, examples = prepared
    config = dataclasses.replace(
        WITH_ENCODERS, preservation=float(taught), mask_floor=1.0, train_batch_size=4, max_train_steps=8
    )
    base_unet = as_base(components.unet, config)
    trainable = with_encoder_lora(lora(components.unet, config), components, config)
    for encoder in components.text_encoders:  # the new tokens have no row yet: any id serves
        encoder.resize_token_embeddings(len(components.tokenizers[0]), mean_resizing=False)
    pictures = examples
    if taught:
        examples = taught_examples(pictures, components, base_unet, config, mixed_precision=False)
    else:  # everything is outside the mask, so that the base teaches everywhere
        examples = ExampleDataset(
            [dataclasses.replace(one, mask=torch.zeros_like(one.mask)) for one in examples.examples]
        )
    loss = DenoisingLoss(
        components=components,
        config=config,
        generator=torch.Generator().manual_seed(0),
        base_outside_masks=None if taught else base_unet,
    )
    batch = examples.collate([0, 1])

    def lost_on(batch: Example, captions: TextConditioning | None = None) -> Tensor:
        return loss(Part(batch=batch, captions=captions))[0]

    assert lost_on(batch).item() == 0  # the second matrices start at 0
    for weight in trainable.encoders.params:
        torch.nn.init.normal_(weight, std=0.1)
    lost = lost_on(batch)
    assert lost.item() > 1e-5
    lost.backward()
    assert all(
        weight.grad is not None and weight.grad.abs().max() > 0 for weight in trainable.encoders.params
    )

    # Encoded once, the captions are the same, and so is what the base reads.
    batches = Batches(examples, 2, seed=0)
    encode_captions(components, [batches], also_as_base=loss.base_reads_apart)
    bucket = batches.buckets[0]
    bucket.chosen.copy_(torch.tensor([[0, 1]]))
    ((again, text),) = bucket.micro_batches()
    loss.generator.manual_seed(0)
    lost_on(batch)
    loss.generator.manual_seed(0)
    fresh = lost_on(batch).item()
    loss.generator.manual_seed(0)
    assert lost_on(again, text).item() == pytest.approx(fresh, rel=1e-4)
    if taught:  # whatever the encoders have learned by now
        later = taught_examples(pictures, components, base_unet, config, mixed_precision=False)
        assert isinstance(batch, TaughtExample)
        assert torch.allclose(later.collate([0, 1]).targets, batch.targets, atol=1e-5)
        return
    assert text is not None and text.of_base is not None
    plain = load_components(narrow_base, is_lora=True, device=CPU)
    for encoder, own in zip(plain.text_encoders, components.text_encoders, strict=True):
        encoder.set_input_embeddings(own.get_input_embeddings())
    with torch.no_grad():
        expected = read_captions(plain.text_encoders, batch.token_ids)
    assert torch.allclose(text.of_base.hidden, expected.hidden, atol=1e-5)
    assert torch.allclose(text.of_base.pooled, expected.pooled, atol=1e-5)
    assert not torch.allclose(text.hidden, expected.hidden, atol=1e-2)


@pytest.fixture(scope="module")
def trained(make_once: Callable[..., Path], named_base: Path, narrow_base: Path) -> Path:
    """Unpacked results: "lora", of the base with the real one's names, and "dora", of a narrow one."""

    def make(folder: Path) -> None:
        archive = write_captioned_zip(folder / "captioned.zip")
        quick = QUICK | {"max_train_steps": 2, "train_batch_size": 1, "is_lora": True, "lora_lr": 3e-2}
        # An alpha that is not the rank shows whether every reader scales alike.
        quick |= {"text_encoder_lora": True, "text_encoder_lr": 3e-2, "lora_rank": 4, "lora_alpha": 8}
        for name, base, targets in (("lora", named_base, "attention"), ("dora", narrow_base, "transformer")):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SDXL_BASE", str(base))
                patch.setenv("SDXL_WORKSPACE", str(folder / "workspace"))
                tar = call(
                    train.train, input_images=archive, use_dora=name == "dora", lora_targets=targets, **quick
                )
                unpack(Path(tar), folder / name, limits=fine_tune_files.LIMITS)

    return make_once("encoder_loras", make)


def load_diffusers(folder: Path) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(
        folder, variant=weights_variant_of(folder / "unet"), dtype=torch.float32
    )


@torch.no_grad()
def drawn_from(pipeline: Any, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, pooled prompt, and the UNet's prediction for them."""
    hidden, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    unet = pipeline.unet
    return hidden, pooled, unet(noise, 500, encoder_hidden_states=hidden, added_cond_kwargs=added).sample


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...], tolerance: float = 1e-4) -> bool:
    return all(
        torch.allclose(a, b, rtol=0, atol=tolerance * float(b.abs().max()))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_diffusers_and_our_serving_read_it_alike(
    trained: Path, named_base: Path, narrow_base: Path, kind: str
):
    """With prompts that name the new token or do not. The text encoders' part is a part of what changes."""
    base_folder = named_base if kind == "lora" else narrow_base
    theirs = load_diffusers(base_folder)
    handler = TokenEmbeddingsHandler(
        [theirs.text_encoder, theirs.text_encoder_2], [theirs.tokenizer, theirs.tokenizer_2]
    )
    handler.load_embeddings(trained / kind / "embeddings.pti")
    base = drawn_from(theirs, PROMPT)
    theirs.load_lora_weights(trained / kind, weight_name="lora.safetensors")
    ours = quiet_pipeline(base_folder)
    ours.activate(fine_tune_files.read(trained / kind, trained / kind))
    for prompt in (PROMPT, "a <s0><s1> on a table"):
        assert same(drawn_from(ours.pipeline, prompt), drawn_from(theirs, prompt))
    assert not same(drawn_from(theirs, PROMPT)[:1], base[:1], 1e-2)
    assert not same(drawn_from(theirs, PROMPT)[1:2], base[1:2], 1e-2)


def test_the_file_for_web_uis_has_it_under_kohyas_names(trained: Path, named_base: Path):
    path = trained / "lora" / "web_ui" / "TOK_lora.safetensors"
    tensors = load_file(path)
    for layer in (
        "lora_te1_text_model_encoder_layers_10_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_31_self_attn_k_proj",
        "lora_te2_text_model_encoder_layers_5_self_attn_out_proj",
    ):
        assert tensors[f"{layer}.lora_down.weight"].shape[0] == 4 and tensors[f"{layer}.alpha"] == 8
    # SDXL does not read the first encoder's last layer.
    assert "lora_te1_text_model_encoder_layers_11_self_attn_q_proj.alpha" not in tensors
    assert not any("mlp" in name for name in tensors)
    of_dora = load_file(trained / "dora" / "web_ui" / "TOK_lora.safetensors")
    for role in ("lora_up.weight", "dora_scale"):
        assert f"lora_te2_text_model_encoder_layers_3_mlp_fc2.{role}" in of_dora
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["ss_text_encoder_lr"] == "0.03"
    of_web_uis, ours = quiet_pipeline(named_base), quiet_pipeline(named_base)
    of_web_uis.activate(fine_tune_files.read(path, path.parent))
    ours.activate(fine_tune_files.read(trained / "lora", trained / "lora"))
    assert same(
        drawn_from(of_web_uis.pipeline, PROMPT), drawn_from(ours.pipeline, PROMPT), 1e-2
    )  # it is fp16


def test_settings_that_contradict_each_other():
    def refuse(**changes) -> None:
        options = dataclasses.replace(CONFIG, **changes)
        refuse_contradictions(options, max_train_steps=6, num_train_epochs=None)

    refuse(is_lora=True, text_encoder_lora=True, text_encoder_lr=1e-4)
    with pytest.raises(
        UserInputError, match="text_encoder_lora is True, but with is_lora=false the whole UNet"
    ):
        refuse(text_encoder_lora=True, lora_rank=None, lora_lr=None, lora_targets=None)
    with pytest.raises(UserInputError, match=r"text_encoder_lr is 0\.0001, but without text_encoder_lora"):
        refuse(is_lora=True, text_encoder_lr=1e-4)
    with pytest.raises(UserInputError, match="text_encoder_lora is true, but pivot_fraction is 0"):
        refuse(is_lora=True, text_encoder_lora=True, pivot_fraction=0.0)
