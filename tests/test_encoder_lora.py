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
from dataset_and_utils import ExampleDataset, TokenEmbeddingsHandler, TokenMap
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.errors import UserInputError
from sdxl.model import fine_tune_files
from sdxl.model.components import Components, load_components
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.model.prompt_chunks import token_ids
from sdxl.serving.tuned_pipeline import TunedPipeline
from sdxl.training.batches import Batches
from sdxl.training.caption_encoding import encode_captions
from sdxl.training.contradictions import refuse_contradictions
from sdxl.training.encoder_lora import with_encoder_lora
from sdxl.training.examples import cache_examples
from sdxl.training.loss import DenoisingLoss
from sdxl.training.recipe import fine_tune
from sdxl.training.text_conditioning import read_captions
from sdxl.training.trainable import as_base, lora
from tests.conftest import QUICK, TINY_BASE, call, quiet_pipeline, write_captioned_zip
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
def prepared(dataset_folder: Path) -> tuple[Components, ExampleDataset]:
    components = load_components(TINY_BASE, is_lora=True, device=CPU)
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
    config = dataclasses.replace(WITH_ENCODERS, optimizer=optimizer, lora_lr=1.0, checkpointing_steps=1)
    fine_tune(components, examples, config, on_checkpoint=lambda step, model: seen.append(model))

    for part in PARTS:
        ups = [name for name in seen[0].weights if name.startswith(part) and "lora_B" in name]
        assert ups and {name.split(".")[1] for name in ups} == {"text_model"}
        for name in ups:
            moved = [not torch.equal(a.weights[name], b.weights[name]) for a, b in itertools.pairwise(seen)]
            assert moved == [True] * (CONFIG.pivot_step - 1) + [False] * (6 - CONFIG.pivot_step), name
            assert seen[-1].weights[name].abs().max() > 0
    for encoder, weights in zip(components.text_encoders, before, strict=True):
        now = {name.replace(".base_layer", ""): value for name, value in encoder.state_dict().items()}
        assert all(torch.equal(now[name], value) for name, value in weights.items())
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
    with torch.no_grad():
        changed = read_captions(components.text_encoders, ids_of(PROMPT, components))
    assert not torch.allclose(changed.pooled, plain.pooled, atol=1e-4)
    width = components.text_encoders[0].config.hidden_size
    for one, other in zip(
        changed.hidden.split([width, plain.hidden.shape[2] - width], 2),
        plain.hidden.split([width, plain.hidden.shape[2] - width], 2),
        strict=True,
    ):
        assert not torch.allclose(one, other, atol=1e-4)


def test_without_it_a_lora_is_as_before(prepared):
    _, examples = prepared
    components = load_components(TINY_BASE, is_lora=True, device=CPU)
    components.tokenizers = prepared[0].tokenizers
    trained = fine_tune(components, examples, dataclasses.replace(CONFIG, is_lora=True))
    assert not any(name.startswith("text_encoder") for name in trained.weights)


@pytest.mark.parametrize("taught", [True, False])
def test_the_base_as_teacher_reads_captions_with_its_own_encoders(prepared, taught: bool):
    """With equal UNets, a difference to the teacher can come from the text only."""
    components, examples = prepared
    config = dataclasses.replace(WITH_ENCODERS, preservation=float(taught), mask_floor=1.0)
    base_unet = as_base(components.unet, config)
    trainable = with_encoder_lora(lora(components.unet, config), components, config)
    if not taught:  # everything is outside the mask, so that the base teaches everywhere
        examples = ExampleDataset(
            [dataclasses.replace(one, mask=torch.zeros_like(one.mask)) for one in examples.examples]
        )
    loss = DenoisingLoss(
        components=components,
        config=config,
        generator=torch.Generator().manual_seed(0),
        base_unet=base_unet,
        base_outside_masks=not taught,
    )
    batch = examples.collate([0, 1])
    for encoder in components.text_encoders:  # the new tokens have no row yet: any id serves
        encoder.resize_token_embeddings(len(components.tokenizers[0]), mean_resizing=False)
    assert loss(batch, None, taught).item() == 0  # the second matrices start at 0
    for weight in trainable.encoders.params:
        torch.nn.init.normal_(weight, std=0.1)
    lost = loss(batch, None, taught)
    assert lost.item() > 1e-4
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
    loss(batch, None, taught)
    loss.generator.manual_seed(0)
    fresh = loss(batch, None, taught).item()
    loss.generator.manual_seed(0)
    assert loss(again, text, taught).item() == pytest.approx(fresh, rel=1e-4)
    assert text is not None and text.of_base is not None
    plain = load_components(TINY_BASE, is_lora=True, device=CPU)
    for encoder, own in zip(plain.text_encoders, components.text_encoders, strict=True):
        encoder.set_input_embeddings(own.get_input_embeddings())
    with torch.no_grad():
        expected = read_captions(plain.text_encoders, batch.token_ids)
    assert torch.allclose(text.of_base.hidden, expected.hidden, atol=1e-5)
    assert torch.allclose(text.of_base.pooled, expected.pooled, atol=1e-5)
    assert not torch.allclose(text.hidden, expected.hidden, atol=1e-2)
