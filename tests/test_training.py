"""The recipe on the miniature: what changes, when, and what never does."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dataset_and_utils import ExampleDataset, TokenMap
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.errors import TrainingDivergedError, UserInputError
from sdxl.model.components import Components, add_placeholder_tokens, load_components
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.model.prompt_chunks import encode
from sdxl.training import token_rows
from sdxl.training.config import TrainingConfig
from sdxl.training.examples import cache_examples
from sdxl.training.loss import masked_mse, min_snr_weights
from sdxl.training.recipe import StepReport, fine_tune
from sdxl.training.token_rows import TokenRows
from tests.conftest import TINY_BASE

CONFIG = TrainingConfig(
    base=str(TINY_BASE),
    token_map="TOK:2",
    resolution=64,
    max_train_steps=6,
    train_batch_size=2,
    unet_learning_rate=1e-3,
    ti_lr=1e-2,
    is_lora=False,
    lora_rank=4,
    lora_targets="transformer",
    lora_lr=1e-3,
    lr_scheduler="constant",
    lr_warmup_steps=0,
    seed=0,
    checkpointing_steps=0,
    preservation=0.0,
)


@pytest.fixture
def run(captioned_zip: Path, tmp_path: Path, narrow_base: Path):
    """Train with the config's changes; returns the components, the data set and the trained model."""
    folders: Iterator[Path] = (tmp_path / f"dataset-{index}" for index in range(100))

    def train(**changes) -> tuple[Components, ExampleDataset, TrainedFineTune]:
        callbacks = {name: changes.pop(name) for name in ("on_step", "on_checkpoint") if name in changes}
        config = dataclasses.replace(CONFIG, **changes)
        folder = prepare_dataset(
            captioned_zip, next(folders), config=PreprocessConfig(target_size=config.resolution)
        )
        components = load_components(narrow_base, is_lora=config.is_lora, device=torch.device("cpu"))
        dataset = cache_examples(folder, components, TokenMap.parse(config.token_map), seed=config.seed)
        return components, dataset, fine_tune(components, dataset, config, **callbacks)

    return train


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def base(narrow_base: Path) -> Components:
    return load_components(narrow_base, is_lora=False, device=torch.device("cpu"))


def test_full_mode_changes_every_unet_weight_and_nothing_else(run, base: Components):
    components, _, trained = run()
    before = state(base.unet)
    assert trained.weights.keys() == before.keys()
    unchanged = [
        name for name, value in components.unet.state_dict().items() if torch.equal(value, before[name])
    ]
    assert unchanged == []
    for part in ("vae", "text_encoders"):
        old, new = getattr(base, part), getattr(components, part)
        for one, other in zip(old, new, strict=True) if isinstance(old, tuple) else [(old, new)]:
            assert same(state(one), state(other)), part


def test_lora_mode_leaves_the_unet_itself_alone(run, base: Components):
    components, _, trained = run(is_lora=True)
    wrapped = {name.replace(".base_layer", ""): value for name, value in state(components.unet).items()}
    assert same({name: value for name, value in wrapped.items() if "lora_" not in name}, state(base.unet))
    up = [value for name, value in trained.weights.items() if "lora_B" in name]
    assert up
    assert all(value.abs().max() > 0 for value in up), (
        "LoRA's second matrices start at zero and must have moved"
    )


@pytest.mark.parametrize(
    ("targets", "layer"),
    [
        ("attention", "attn1.to_q"),
        ("transformer", "ff.net.2"),
        ("transformer", "attentions.0.proj_in"),
        ("all", "resnets.0.conv1"),
        ("all", "downsamplers.0.conv"),
    ],
)
def test_lora_targets_name_the_layers_that_learn(
    run, tmp_path: Path, targets: str, layer: str, narrow_base: Path
):
    _, _, trained = run(is_lora=True, lora_targets=targets, max_train_steps=2)
    mine = [name for name in trained.weights if layer in name]
    assert mine and all(trained.weights[name].abs().max() > 0 for name in mine)
    if targets != "attention":
        less = {"all": "transformer", "transformer": "attention"}[targets]
        _, _, trained_less = run(is_lora=True, lora_targets=less, max_train_steps=1)
        assert not any(layer in name for name in trained_less.weights)
    save_file(trained.weights, tmp_path / "lora.safetensors")
    unet = load_components(narrow_base, is_lora=False, device=torch.device("cpu")).unet
    unet.load_lora_adapter(load_file(tmp_path / "lora.safetensors"), prefix="unet")
    loaded = {name for name, _ in unet.named_parameters() if "lora_" in name}
    assert len(loaded) == len(trained.weights)


@pytest.mark.parametrize("is_lora", [False, True])
def test_rows_change_up_to_the_pivot_and_not_after(run, is_lora: bool):
    seen: list[TrainedFineTune] = []
    reports: list[StepReport] = []
    run(
        is_lora=is_lora,
        checkpointing_steps=1,
        on_checkpoint=lambda step, model: seen.append(model),
        on_step=reports.append,
    )
    pivot = CONFIG.pivot_step
    assert pivot == 3
    for encoder in (0, 1):
        rows = [model.token_rows[encoder] for model in seen]
        moved = [not torch.equal(a, b) for a, b in itertools.pairwise(rows)]
        assert moved == [True] * (pivot - 1) + [False] * (CONFIG.max_train_steps - pivot)
    assert [report.ti_learning_rate > 0 for report in reports] == [True] * pivot + [False] * 3
    weights = [next(value for name, value in model.weights.items() if "to_q" in name) for model in seen]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(weights))


def test_after_the_pivot_prompts_are_those_of_the_frozen_rows(run):
    """Encoding every caption once must give what encoding it in each step gave."""
    kept = {}

    def keep(step: int, model: TrainedFineTune) -> None:
        kept[step] = model.weights["conv_in.weight"]

    run(pivot_fraction=1.0, ti_lr=1e-12, checkpointing_steps=6, on_checkpoint=keep)
    never_cached = kept[6]
    run(pivot_fraction=0.5, ti_lr=1e-12, checkpointing_steps=6, on_checkpoint=keep)
    assert torch.allclose(never_cached.float(), kept[6].float(), atol=2e-3)


def test_a_seed_repeats_the_run_and_zero_is_a_seed(run):
    first, again, other = (run(seed=seed)[2] for seed in (0, 0, 1))
    assert same(first.weights, again.weights)
    assert not same(first.weights, other.weights)


def test_rows_are_pulled_to_the_scale_of_the_table(run):
    table = torch.nn.Embedding(100, 16)
    rows = TokenRows(table, 100, 3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows.rows.mul_(50)
    far = rows.rows.std().item() / rows.table_std
    rows.pull_to_scale()
    assert rows.rows.std().item() / rows.table_std == pytest.approx(far**0.9, rel=1e-3)
    for _ in range(100):
        rows.pull_to_scale()
    assert rows.rows.std().item() == pytest.approx(rows.table_std, rel=1e-3)


def test_new_rows_start_at_the_scale_of_the_table_and_reach_only_their_ids():
    table = torch.nn.Embedding(1000, 32)
    rows = TokenRows(table, 1000, 2, torch.Generator().manual_seed(0))
    assert rows.rows.std().item() == pytest.approx(rows.table_std, rel=0.3)
    ids = torch.tensor([[3, 1000, 1001, 999]])
    out = rows(ids)
    assert torch.equal(out[0, [0, 3]], table(ids[0, [0, 3]]))
    assert torch.equal(out[0, [1, 2]], rows.rows)
    out.sum().backward()
    assert rows.rows.grad is not None
    assert rows.rows.grad.shape == (2, 32)


def test_rows_start_from_a_known_word(run, narrow_base: Path):
    # At a rate of next to nothing the rows stay where they start.
    _, _, trained = run(token_map="TOK:2,OTHER:1", token_init="TOK:toy", ti_lr=1e-30, pivot_fraction=0.0)
    fresh = load_components(narrow_base, is_lora=False, device=torch.device("cpu"))
    for encoder, tokenizer, rows in zip(
        fresh.text_encoders, fresh.tokenizers, trained.token_rows, strict=True
    ):
        toy = encoder.get_input_embeddings().state_dict()["weight"][
            tokenizer.convert_tokens_to_ids("toy</w>")
        ]
        assert torch.equal(rows[0], toy) and torch.equal(rows[1], toy)
        assert not torch.equal(rows[2], toy)


def test_warm_up_and_schedule_reach_both_groups(run):
    reports: list[StepReport] = []
    run(lr_scheduler="linear", lr_warmup_steps=2, pivot_fraction=1.0, on_step=reports.append)
    shares = [report.learning_rate / CONFIG.unet_learning_rate for report in reports]
    assert shares == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])
    assert [report.ti_learning_rate / CONFIG.ti_lr for report in reports] == pytest.approx(shares)


def test_a_loss_that_is_not_a_number_stops_the_run(run):
    with pytest.raises(TrainingDivergedError, match="learning rates"):
        run(unet_learning_rate=1e30)


def test_training_lowers_the_loss(run):
    reports: list[StepReport] = []
    run(max_train_steps=24, on_step=reports.append)
    losses = [report.loss for report in reports]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


def test_two_tokens_get_their_own_rows(run):
    with pytest.raises(UserInputError):
        dataclasses.replace(CONFIG, token_map="TOK")
    _, _, trained = run(token_map="TOK:2,OTHER:3")
    assert [rows.shape[0] for rows in trained.token_rows] == [5, 5]


def test_pooled_prompts_see_what_follows_the_token(run):
    """In training too the pooled output is taken at the end of the text, not at the new token."""
    components, dataset, _ = run()
    new_ids = add_placeholder_tokens(components, TokenMap.parse("TOK:2"))
    ids = []
    for tokenizer, encoder, added in zip(
        components.tokenizers, components.text_encoders, new_ids, strict=True
    ):
        token_rows.install(encoder, added, torch.Generator().manual_seed(0))
        texts = ["<s0> on red", "<s0> on blue"]
        ids.append(tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids)
    with torch.no_grad():
        _, pooled = encode(components.text_encoders, (ids[0], ids[1]))
    assert not torch.allclose(pooled[0], pooled[1])
    assert dataset[0].time_ids.tolist() == [
        80,
        96,
        0,
        6,
        64,
        64,
    ]  # original, crop in the resized picture, target


def test_masked_loss_counts_only_the_mask():
    prediction, target = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    target[..., 1] = 100
    mask = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    once = torch.ones(1)
    assert masked_mse(prediction, target, mask, once).item() == 1.0
    assert masked_mse(prediction, target, mask * 0.5, once).item() == pytest.approx(1.0)
    assert masked_mse(prediction, target, mask, once * 3).item() == pytest.approx(3.0)


def test_min_snr_weights_follow_the_paper(base: Components):
    scheduler = base.noise_scheduler
    times = torch.tensor([0, 300, 999])
    snr = scheduler.alphas_cumprod[times] / (1 - scheduler.alphas_cumprod[times])
    assert min_snr_weights(scheduler, times, 5.0).tolist() == pytest.approx((snr.clamp(max=5) / snr).tolist())
    assert min_snr_weights(scheduler, times, 1e6).tolist() == pytest.approx([1, 1, 1])
