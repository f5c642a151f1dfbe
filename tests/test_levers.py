"""The levers of the recipe: each does what its name says, on the miniature."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.optimization import get_scheduler
from PIL import Image
from safetensors.torch import load_file

from dataset_and_utils import Example, ExampleDataset, TokenMap
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.errors import TrainingDivergedError, UserInputError
from sdxl.model import fine_tune_files
from sdxl.model.components import load_components
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.serving.pipeline import load_pipeline
from sdxl.serving.previews import drawer
from sdxl.serving.tuned_pipeline import TunedPipeline
from sdxl.settings import cache_folder
from sdxl.speed import lean_lora
from sdxl.training.batches import Batches
from sdxl.training.diffusion import sample_noise
from sdxl.training.examples import cache_examples
from sdxl.training.loss import masked_mse
from sdxl.training.prior import PriorConfig, prior_dataset
from sdxl.training.random_views import LARGEST_ZOOM
from sdxl.training.recipe import StepReport, fine_tune, learning_rate_share
from sdxl.training.text_conditioning import TextConditioning
from tests.test_training import CONFIG, run  # noqa: F401 - a fixture

CPU = torch.device("cpu")


def example(height: int, width: int, value: float = 0.0) -> Example:
    return Example(
        latents=torch.full((4, height, width), value),
        mask=torch.ones(1, height, width),
        token_ids=(torch.zeros(77, dtype=torch.long), torch.zeros(77, dtype=torch.long)),
        time_ids=torch.zeros(6),
    )


def test_batches_hold_one_shape_and_show_every_picture_equally_often():
    data = ExampleDataset([*(example(8, 8, i) for i in range(6)), *(example(4, 16, 6 + i) for i in range(2))])
    batches = Batches(data, 2, micro_batches=2, seed=0)
    seen: Counter[int] = Counter()
    for _ in range(800):
        bucket = batches.buckets[batches.draw()]
        for batch, prompts in bucket.micro_batches():
            assert batch.latents.shape[0] == 2 and prompts is None
            seen.update(int(value) for value in batch.latents[:, 0, 0, 0])
    assert sum(seen.values()) == 3200
    assert all(seen[i] == pytest.approx(400, rel=0.12) for i in range(8))


def test_batches_show_examples_as_often_as_their_shares_say():
    shares = [0.25, *[0.75 / 5] * 5, 1.0]
    data = ExampleDataset([dataclasses.replace(example(8, 8, i), share=s) for i, s in enumerate(shares)])
    batches = Batches(data, 4, seed=0)
    seen: Counter[int] = Counter()
    for _ in range(2000):
        batches.draw()
        seen.update(batches.buckets[0].chosen.flatten().tolist())
    assert [seen[i] / 4000 for i in range(7)] == pytest.approx(shares, rel=0.05)


def test_a_run_over_two_shapes_learns_from_both(run, narrow_base: Path):  # noqa: F811
    _, dataset, _ = run()
    wide = [
        dataclasses.replace(e, latents=e.latents[:, :4], mask=e.mask[:, :4]) for e in dataset.examples[:2]
    ]
    mixed = ExampleDataset([*dataset.examples[:2], *wide])
    fresh = load_components(narrow_base, is_lora=False, device=CPU)
    cache_examples_tokens(fresh)
    losses: list[float] = []
    fine_tune(
        fresh,
        mixed,
        dataclasses.replace(CONFIG, max_train_steps=8),
        on_step=lambda report: losses.append(report.loss),
    )
    assert len(losses) == 8 and all(np.isfinite(losses))


def cache_examples_tokens(components) -> None:
    for tokenizer in components.tokenizers:
        tokenizer.add_tokens(["<s0>", "<s1>"], special_tokens=True)


@pytest.fixture
def striped(tmp_path: Path) -> Path:
    """One picture of 96 columns, each brighter than the last, with a mask of its left half, prepared at 64."""
    raw = tmp_path / "raw"
    raw.mkdir()
    ramp = np.tile(np.arange(96, dtype=np.uint8) * 2, (96, 1))
    Image.fromarray(np.stack([ramp] * 3, 2)).save(raw / "0.src.png")
    mask = np.zeros((96, 96), np.uint8)
    mask[:, :48] = 255
    Image.fromarray(mask).save(raw / "0.mask.png")
    return prepare_dataset(
        raw, tmp_path / "dataset", config=PreprocessConfig(target_size=64, global_caption="TOK")
    )


def test_views_tell_where_they_were_cut(striped: Path, narrow_base: Path):
    components = load_components(narrow_base, is_lora=False, device=CPU)
    data = cache_examples(striped, components, TokenMap.parse("TOK:2"), seed=0, views=20)
    assert len(data) == 21
    whole, *views = (e.time_ids.tolist() for e in data.examples)
    assert whole == [96, 96, 0, 0, 64, 64]
    for height, width, top, left, *target in views:
        assert (height, width, target) == (96, 96, [64, 64])
        assert 0 <= top <= (LARGEST_ZOOM - 1) * 64 and 0 <= left <= (LARGEST_ZOOM - 1) * 64
    # The further right a view was cut, the brighter the ramp at its left edge and the narrower its mask.
    by_left = sorted(
        zip((v[3] for v in views), (e.mask.mean().item() for e in data.examples[1:]), strict=True)
    )
    widths = [width for _, width in by_left]
    assert np.corrcoef([left for left, _ in by_left], widths)[0, 1] < -0.5


def test_flipped_pictures_are_learned_too(striped: Path, narrow_base: Path):
    components = load_components(narrow_base, is_lora=False, device=CPU)
    data = cache_examples(striped, components, TokenMap.parse("TOK:2"), seed=0, flip=True)
    plain, mirrored = data.examples
    assert torch.equal(plain.mask.flip(-1), mirrored.mask)
    assert not torch.allclose(plain.latents, mirrored.latents, atol=0.1)


def test_a_mirrored_cut_is_told_from_the_other_side(striped: Path, narrow_base: Path):
    components = load_components(narrow_base, is_lora=False, device=CPU)
    data = cache_examples(striped, components, TokenMap.parse("TOK:2"), seed=0, views=6, flip=True)
    ids = [example.time_ids.tolist() for example in data.examples]
    for (_, _, top, left, *_), (_, _, mirrored_top, from_right, *_) in zip(ids[:7], ids[7:], strict=True):
        room = left + from_right  # that the enlarging gave, across as down
        assert mirrored_top == top and top - 1e-3 <= room <= (LARGEST_ZOOM - 1) * 64 + 1e-3
    assert len({round(i[3], 3) for i in ids[7:]}) == 7


def test_offset_noise_shifts_whole_channels():
    shape = torch.Size((64, 4, 16, 16))
    plain = sample_noise(shape, 0.0, torch.Generator().manual_seed(0))
    offset = sample_noise(shape, 0.5, torch.Generator().manual_seed(0))
    assert plain.mean((2, 3)).std().item() == pytest.approx(1 / 16, rel=0.2)
    assert offset.mean((2, 3)).std().item() == pytest.approx(0.5, rel=0.2)


def test_dropped_prompts_are_the_unconditional_branch():
    """What the base reads is dropped together with what the fine-tune reads."""
    ones = {"hidden": torch.ones(1000, 3, 2), "pooled": torch.ones(1000, 2)}
    text = TextConditioning(**ones, of_base=TextConditioning(**ones))
    kept = text.dropped(0.3, torch.Generator().manual_seed(0))
    assert kept.pooled.mean().item() == pytest.approx(0.7, abs=0.05)
    assert torch.equal(kept.hidden[:, 0, 0], kept.pooled[:, 0])
    assert kept.of_base is not None
    assert torch.equal(kept.of_base.hidden, kept.hidden) and torch.equal(kept.of_base.pooled, kept.pooled)


def test_mask_floor_lets_the_background_count_a_little():
    target = torch.tensor([[[[1.0, 3.0]]]])
    mask = torch.tensor([[[[1.0, 0.0]]]])
    error = masked_mse(torch.zeros_like(target), target, mask, torch.ones(1), floor=0.25)
    assert error.item() == pytest.approx((1 + 0.25 * 9) / 1.25)


@pytest.mark.parametrize("is_lora", [True, False])
def test_outside_masks_the_base_is_the_teacher(run, is_lora: bool, narrow_base: Path):  # noqa: F811
    """Pictures that are masked out altogether teach nothing: the base already draws them as the base does."""
    _, dataset, _ = run(is_lora=is_lora, max_train_steps=1)
    hidden = ExampleDataset([dataclasses.replace(e, mask=torch.zeros_like(e.mask)) for e in dataset.examples])
    fresh = load_components(narrow_base, is_lora=is_lora, device=CPU)
    cache_examples_tokens(fresh)
    before = fresh.unet.conv_in.weight.detach().clone()
    losses: list[float] = []
    config = dataclasses.replace(CONFIG, is_lora=is_lora, mask_floor=1.0, mask_base_target=True)
    fine_tune(fresh, hidden, config, on_step=lambda report: losses.append(report.loss))
    assert max(losses) < 1e-10 and torch.equal(before, fresh.unet.conv_in.weight)
    shown = dataclasses.replace(config, mask_base_target=False)
    fresh = load_components(narrow_base, is_lora=is_lora, device=CPU)
    cache_examples_tokens(fresh)
    fine_tune(fresh, hidden, shown, on_step=lambda report: losses.append(report.loss))
    assert losses[-1] > 1e-3


def test_accumulated_batches_count_as_one(run):  # noqa: F811
    """At a rate of next to nothing, the loss of one step is the mean over the batches that single steps would see."""
    whole: list[StepReport] = []
    single: list[StepReport] = []
    still = {"unet_learning_rate": 1e-12, "ti_lr": 1e-12, "pivot_fraction": 1.0}
    run(gradient_accumulation_steps=3, max_train_steps=2, on_step=whole.append, **still)
    run(max_train_steps=6, on_step=single.append, **still)
    losses = [report.loss for report in single]
    assert [r.loss for r in whole] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-3)


def test_alpha_is_in_the_stored_matrices(run):  # noqa: F811
    """alpha / rank scales what the matrices do; readers that know no alpha must get the same pictures."""
    components, _, trained = run(is_lora=True, lora_rank=4, lora_alpha=8)
    layer = components.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    product = trained.weights[f"{name}.lora_B.weight"] @ trained.weights[f"{name}.lora_A.weight"]
    assert torch.allclose(layer.get_delta_weight("default"), product, atol=1e-7)
    assert layer.scaling["default"] == 2.0


@pytest.mark.parametrize("reader", ["diffusers", "ours"])
def test_dora_draws_as_it_trained(run, tmp_path: Path, reader: str, narrow_base: Path):  # noqa: F811
    components, dataset, trained = run(is_lora=True, use_dora=True, lora_targets="all", lora_alpha=8)
    assert any("lora_magnitude_vector" in name for name in trained.weights)
    fine_tune_files.write(trained, tmp_path / "tuned", {})
    if reader == "ours":
        tuned = TunedPipeline(load_pipeline(narrow_base, CPU))
        tuned.activate(fine_tune_files.read(tmp_path / "tuned", tmp_path / "unpacked"))
        unet = tuned.pipeline.unet
    else:
        unet = load_components(narrow_base, is_lora=False, device=CPU).unet
        unet.load_lora_adapter(load_file(tmp_path / "tuned" / "lora.safetensors"), prefix="unet")
    batch = dataset.collate([0])
    inputs = {
        "encoder_hidden_states": torch.randn(1, 77, unet.config["cross_attention_dim"]),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 128), "time_ids": batch.time_ids},
    }
    with torch.no_grad():
        one, other = (u(batch.latents, 500, **inputs).sample for u in (components.unet, unet))
    assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy"])
def test_every_optimizer_trains_in_the_recipe(run, name: str):  # noqa: F811
    rates = {"unet_learning_rate": 1.0} if name == "prodigy" else {}
    seen: list[TrainedFineTune] = []
    run(
        optimizer=name,
        checkpointing_steps=1,
        max_train_steps=4,
        on_checkpoint=lambda _, model: seen.append(model),
        **rates,
    )
    first, *_, last = (model.weights["conv_in.weight"] for model in seen)
    assert torch.isfinite(last).all() and not torch.equal(first, last)
    assert torch.equal(seen[-1].token_rows[0], seen[-2].token_rows[0])  # frozen after the pivot
    assert not torch.equal(seen[0].token_rows[0], seen[1].token_rows[0])


def test_a_run_that_diverges_hands_on_the_weights_before(run):  # noqa: F811
    kept: list[tuple[int, TrainedFineTune]] = []
    with pytest.raises(TrainingDivergedError, match="are kept"):
        run(unet_learning_rate=1e30, on_checkpoint=lambda step, model: kept.append((step, model)))
    (step, model) = kept[-1]
    assert step >= 1
    assert all(torch.isfinite(rows).all() for rows in model.token_rows)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_diffusers(name):
    parameter = torch.nn.Parameter(torch.zeros(1))
    reference = get_scheduler(
        {"constant": "constant_with_warmup"}.get(name, name),
        torch.optim.SGD([parameter], lr=1.0),
        num_warmup_steps=5,
        num_training_steps=30,
    )
    for step in range(30):
        share = learning_rate_share(name, step, warmup=5, total=30)
        assert share == pytest.approx(reference.lr_lambdas[0](step))


def test_the_prior_is_drawn_once_and_learned(
    run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    narrow_base: Path,
):
    monkeypatch.setenv("SDXL_CACHE", str(tmp_path / "cache"))
    config = PriorConfig.parse(
        "a red house | a blue car", base=str(narrow_base), images=3, resolution=64, steps=2
    )
    components = load_components(narrow_base, is_lora=False, device=CPU)
    draw = drawer(components)
    folder = prior_dataset(config, draw)
    kept = cache_folder() / "prior"
    assert folder.parent == kept
    assert sorted(path.name for path in folder.glob("*.png")) == ["0.src.png", "1.src.png", "2.src.png"]
    stamp = folder.stat().st_mtime_ns
    assert prior_dataset(config, draw) == folder and folder.stat().st_mtime_ns == stamp
    assert [path.name for path in kept.iterdir()] == [folder.name]
    prior = cache_examples(folder, components, TokenMap({}), seed=0)
    data = run()[1]
    cache_examples_tokens(components)
    alone, beside = [], []
    for kept, losses in ((None, alone), (prior, beside)):
        fresh = load_components(narrow_base, is_lora=False, device=CPU)
        cache_examples_tokens(fresh)
        fine_tune(
            fresh, data, CONFIG, prior=kept, on_step=lambda report, losses=losses: losses.append(report.loss)
        )
    assert sum(beside) > sum(alone)  # the prior's loss comes on top


def test_a_prior_without_prompts_is_refused():
    with pytest.raises(UserInputError, match="prior_prompts"):
        PriorConfig.parse(" | ", base="b", images=1, resolution=64)
    with pytest.raises(UserInputError, match="prior_images"):
        PriorConfig.parse("a", base="b", images=0, resolution=64)


@pytest.mark.parametrize("thin_costs", [0, lean_lora._THIN_COSTS, 1e6])
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_lean_layers_compute_what_pefts_do(run, targets: str, thin_costs: float, monkeypatch):  # noqa: F811
    """Whether no layer adds its matrices to its weight, some do, or all."""
    monkeypatch.setattr(lean_lora, "_THIN_COSTS", thin_costs)
    components, dataset, _ = run(is_lora=True, lora_targets=targets, lora_rank=4, lora_alpha=8, lora_lr=1e-2)
    example, unet = dataset.collate([0, 1]), components.unet
    hidden = torch.randn(
        2, 77, unet.config["cross_attention_dim"], generator=torch.Generator().manual_seed(0)
    )
    width = unet.config["projection_class_embeddings_input_dim"] - 6 * unet.config["addition_time_embed_dim"]
    added = {"text_embeds": torch.zeros(2, width), "time_ids": example.time_ids}

    def answer() -> torch.Tensor:
        return unet(example.latents, torch.tensor(300), hidden, added_cond_kwargs=added).sample

    def gradients() -> list[torch.Tensor]:
        unet.zero_grad()
        answer().square().mean().backward()
        return [p.grad.clone() for p in unet.parameters() if p.grad is not None]

    lean, lean_gradients = answer(), gradients()
    unet.disable_adapters()
    base = answer()
    unet.enable_adapters()
    patched = [module for module in unet.modules() if "forward" in vars(module)]
    assert patched
    for module in patched:
        del module.forward
    assert torch.allclose(lean, answer(), atol=1e-5) and not torch.allclose(lean, base, atol=1e-3)
    for ours, theirs in zip(lean_gradients, gradients(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)
