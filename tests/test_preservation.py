"""The base teaches captions without the new tokens: which captions, and that they stay as they were."""

import dataclasses
from pathlib import Path

import pytest
import torch

from dataset_and_utils import ExampleDataset, TokenMap
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.errors import UserInputError
from sdxl.model.components import Components, load_components
from sdxl.model.prompt_chunks import encode
from sdxl.training.contradictions import refuse_contradictions
from sdxl.training.examples import cache_examples
from sdxl.training.preservation import kept_examples
from sdxl.training.recipe import fine_tune
from sdxl.training.teaching import MOST, USES, _with_noise, count_of, taught_examples
from sdxl.training.trainable import as_base, lora
from tests.conftest import png, write_zip
from tests.test_training import CONFIG

CAPTIONS = ("a photo of TOK on the left", "a small TOK and a house")


def ids_of(text: str, components: Components) -> list[list[int]]:
    return [
        tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids
        for tokenizer in components.tokenizers
    ]


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    files: dict[str, bytes | str] = {f"{i}.png": png(i) for i in range(2)}
    archive = write_zip(folder / "set.zip", files | {f"{i}.txt": text for i, text in enumerate(CAPTIONS)})
    return prepare_dataset(archive, folder / "dataset", config=PreprocessConfig(target_size=64))


def encoded(
    folder: Path, base: Path, *, is_lora: bool, token_map: str = "TOK:2"
) -> tuple[Components, ExampleDataset]:
    components = load_components(base, is_lora=is_lora, device=torch.device("cpu"))
    return components, cache_examples(folder, components, TokenMap.parse(token_map), seed=0)


@pytest.mark.parametrize(("init", "word"), [("TOK:fish", "fish"), ("", "")])
def test_captions_without_the_new_tokens(dataset_folder: Path, narrow_base: Path, init: str, word: str):
    components, examples = encoded(dataset_folder, narrow_base, is_lora=True)
    prompts = ("a red house", "a green cup")
    kept = kept_examples(examples, components, TokenMap.parse("TOK:2"), token_init=init, prompts=prompts)
    texts = [*prompts, prompts[0], CAPTIONS[0].replace("TOK", word)]
    texts += [prompts[1], *prompts, CAPTIONS[1].replace("TOK", word)]
    for example, text in zip(kept.examples, texts, strict=True):
        assert [ids.tolist() for ids in example.token_ids] == ids_of(text, components), text
    assert all(torch.equal(kept[4 * i].latents, examples[i].latents) for i in range(2))


@pytest.mark.parametrize("is_lora", [True, False])
def test_other_captions_keep_what_they_mean(dataset_folder: Path, narrow_base: Path, is_lora: bool):
    """The change of the prediction for a caption without the token, with and without preservation."""
    changes = []
    for preservation in (0.0, 1.0):
        components, examples = encoded(dataset_folder, narrow_base, is_lora=is_lora)
        config = dataclasses.replace(
            CONFIG,
            is_lora=is_lora,
            max_train_steps=8,
            train_batch_size=4,
            lora_lr=3e-3,
            unet_learning_rate=3e-4,
            pivot_fraction=0.5,
            token_init="TOK:fish",
            preservation=preservation,
            preservation_prompts="a red house|a green cup",
        )
        before = predicted(components)
        fine_tune(components, examples, config)
        changes.append(float((predicted(components) - before).square().mean()))
    assert changes[1] < 0.8 * changes[0], changes


@pytest.mark.parametrize("is_lora", [True, False])
def test_what_the_base_teaches_is_what_it_predicts(dataset_folder: Path, narrow_base: Path, is_lora: bool):
    """Also for a LoRA that has trained already: the base has none."""
    components, examples = encoded(dataset_folder, narrow_base, is_lora=is_lora)
    config = dataclasses.replace(
        CONFIG, is_lora=is_lora, max_train_steps=24, preservation=1.0, train_batch_size=1
    )
    kept = kept_examples(examples, components, TokenMap.parse("TOK:2"), token_init="")
    untrained, _ = encoded(dataset_folder, narrow_base, is_lora=is_lora)
    unet = components.unet
    if is_lora:
        trainable = lora(unet, config)
        for weight in trainable.weights.params:
            torch.nn.init.normal_(weight, std=0.1)
        unet = as_base(unet, config)
    taught = taught_examples(kept, components, unet, config, mixed_precision=False)
    assert len(taught) == 24 // USES
    examples = [taught.collate([row]).take(torch.tensor(0)) for row in range(len(taught))]
    times = [int(one.timesteps) for one in examples]
    assert [time * len(times) // 1000 for time in times] == list(range(len(times)))
    for one in examples:
        assert not any(torch.equal(one.latents, other.latents) for other in kept.examples)
        hidden, pooled = encode(untrained.text_encoders, (one.token_ids[0][None], one.token_ids[1][None]))
        told = {"text_embeds": pooled, "time_ids": one.time_ids[None]}
        time = one.timesteps[None]
        with torch.no_grad():
            expected = untrained.unet(
                one.latents[None], time, encoder_hidden_states=hidden, added_cond_kwargs=told
            ).sample[0]
        assert torch.allclose(one.targets, expected, atol=1e-4)


def test_no_time_is_beyond_the_last(dataset_folder: Path, narrow_base: Path):
    """With this seed the last share of the timesteps is nearer to 1 than fp32 can tell."""
    components, examples = encoded(dataset_folder, narrow_base, is_lora=True)
    kept = ExampleDataset([examples[0]] * 24)
    config = dataclasses.replace(
        CONFIG, seed=132324, max_train_steps=1024, preservation=1.0, train_batch_size=4
    )
    _, times = _with_noise(kept, components, config)
    assert len(times) == MOST and int(times.max()) == 999


def test_a_run_computes_as_many_predictions_as_it_needs():
    def count(**changes) -> int:
        return count_of(dataclasses.replace(CONFIG, preservation=1.0, **changes))

    assert count(max_train_steps=1, train_batch_size=4) == 1
    assert count(max_train_steps=400, train_batch_size=4) == 100
    assert count(max_train_steps=40, train_batch_size=32) == 80
    assert count(max_train_steps=4000, train_batch_size=4) == MOST


@torch.no_grad()
def predicted(components: Components) -> torch.Tensor:
    """The UNet's predictions for prompts that no training saw."""
    texts = ("a photo of a yellow star on a blue background", "a fish")
    first, second = (
        torch.tensor(rows) for rows in zip(*(ids_of(text, components) for text in texts), strict=True)
    )
    hidden, pooled = encode(components.text_encoders, (first, second))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    told = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    return torch.cat(
        [
            components.unet(noise, time, encoder_hidden_states=hidden, added_cond_kwargs=told).sample
            for time in (250, 600, 950)
        ]
    )


def test_settings_that_contradict_each_other():
    def refuse(**changes) -> None:
        options = dataclasses.replace(CONFIG, is_lora=True, **changes)
        refuse_contradictions(options, max_train_steps=6, num_train_epochs=None)

    with pytest.raises(UserInputError, match="preservation_prompts is given, but preservation is 0"):
        refuse(preservation=0.0, preservation_prompts="a dog")
    with pytest.raises(UserInputError, match='preservation_prompts contains "a TOK"'):
        refuse(preservation=1.0, preservation_prompts="a dog|a TOK")
    with pytest.raises(UserInputError, match="preservation_prompts contains no prompt"):
        refuse(preservation=1.0, preservation_prompts=" | ")
