"""A training is watched: what the signals tell of a UNet, which moment is chosen, and when a run stops."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dataset_and_utils import TokenMap
from preprocess import PreprocessConfig, prepare_dataset
from sdxl.history import Check, History, Previews
from sdxl.model.components import Components, load_components
from sdxl.model.fine_tune_files import TrainedFineTune
from sdxl.training.best_moment import PATIENCE, with_scores
from sdxl.training.examples import cache_examples, held_out_examples, kept_out
from sdxl.training.signals import BANDS, Meter, Signals
from sdxl.training.token_rows import NewTokens
from sdxl.training.trainable import lora
from sdxl.training.watch import Watch, _due
from tests.conftest import TINY_BASE, png, write_zip
from tests.test_training import CONFIG
from tests.tiny_helpers import narrow_unet

TOK = TokenMap.parse("TOK:2")
TEXTS = ("a red house on a plain blue background", "a small green cup on the left", "a yellow star")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("watched")
    archive = write_zip(root / "x.zip", {"0.png": png(0, (128, 128)), "0.txt": "a photo of TOK"})
    return prepare_dataset(archive, root / "dataset", config=PreprocessConfig(target_size=64))


@pytest.fixture
def watched(folder: Path) -> tuple[Components, Meter]:
    components = load_components(TINY_BASE, is_lora=True, device=torch.device("cpu"))
    cache_examples(folder, components, TOK, seed=0)
    held_out = held_out_examples(folder, components, TOK, seed=0, pictures=())
    NewTokens(components, TOK, "TOK:fish", torch.Generator().manual_seed(0))
    meter = Meter(
        components, held_out, TOK, words="TOK:fish", texts=TEXTS, seed=0, mixed_precision=False, at_once=5
    )
    return components, meter


def test_the_base_has_learned_nothing_follows_and_has_not_moved(watched: tuple[Components, Meter]):
    signals = watched[1].read()
    assert signals.held_out == dict.fromkeys(BANDS, 1.0) and signals.drift == 0.0
    assert signals.followed > 0.5
    assert watched[1].read() == signals, "the noise is fixed"


def test_a_unet_that_no_longer_reads_its_text_does_not_follow(watched: tuple[Components, Meter]):
    components, meter = watched
    before = meter.read()
    with torch.no_grad():
        for name, weight in components.unet.named_parameters():
            if ".attn2.to_v." in name or name.startswith("add_embedding"):
                weight.zero_()
    after = meter.read()
    assert after.followed < 0.2 * before.followed and after.drift > 0.5


def test_a_unet_that_knows_a_picture_has_a_lower_loss_on_it(watched: tuple[Components, Meter]):
    components, meter = watched
    unet = components.unet.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    held = meter._held
    captions = meter._texts()[0]
    noise = meter._noise
    for share in (*BANDS.values(),) * 4:
        times = meter._times([share], len(held.latents))
        noisy = components.noise_scheduler.add_noise(held.latents, noise, times)  # type: ignore[arg-type]
        told = {"text_embeds": captions.pooled, "time_ids": held.time_ids}
        out = unet(noisy, times, encoder_hidden_states=captions.hidden, added_cond_kwargs=told).sample
        (out - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = meter.read()
    assert all(after.held_out[band] < 0.9 for band in BANDS) and after.drift > 0.0


def test_texts_that_no_longer_change_need_no_text_encoders(watched: tuple[Components, Meter]):
    components, meter = watched
    before = meter.read()
    meter.freeze_text()
    for encoder in components.text_encoders:
        encoder.to("meta")  # type: ignore[arg-type]
    assert meter.read() == before


def test_what_is_kept_out_is_not_learned(tmp_path: Path):
    assert [len(kept_out(count)) for count in (1, 19, 20, 39, 40, 1000)] == [0, 0, 1, 1, 2, 2]
    files: dict[str, bytes | str] = {f"{i}.png": png(i) for i in range(3)}
    archive = write_zip(tmp_path / "x.zip", files | {f"{i}.txt": "a TOK" for i in range(3)})
    prepared = prepare_dataset(archive, tmp_path / "dataset", config=PreprocessConfig(target_size=64))
    components = load_components(TINY_BASE, is_lora=True, device=torch.device("cpu"))
    learned = cache_examples(prepared, components, TOK, seed=0, leave_out={1})
    held_out = held_out_examples(prepared, components, TOK, seed=0, pictures={1})
    assert len(learned) == 2 and len(held_out) == 1
    nearest = [(example.latents - held_out[0].latents).square().mean() for example in learned.examples]
    assert min(nearest) > 0.01


def check(step: int, *, loss: float, followed: float = 1.0, drift: float = 0.0) -> Check:
    return Check(
        step=step,
        strength=1.0,
        held_out=dict.fromkeys(BANDS, loss),
        followed=followed,
        drift=drift,
        score=0.0,
    )


def test_scores_weigh_what_was_learned_and_followed():
    scored = with_scores(
        [
            check(1, loss=0.8),
            check(2, loss=0.6),
            check(3, loss=0.6, followed=0.5),
            check(4, loss=0.6, drift=0.2),
            check(5, loss=1.2),
        ]
    )
    assert [round(one.score, 6) for one in scored] == [0.5, 1.0, 0.5, 1.0, 0.0]


class FakeMeter:
    """Signals that are given in advance."""

    def __init__(self, followed: list[float]) -> None:
        self._followed = iter(followed)

    def read(self) -> Signals:
        return Signals(held_out=dict.fromkeys(BANDS, 0.5), followed=next(self._followed), drift=0.0)


def moment(step: int) -> TrainedFineTune:
    return TrainedFineTune(
        kind="lora", weights={"step": torch.tensor(step)}, token_rows=[torch.zeros(2, 2)] * 2, token_map=TOK
    )


def watch_of(followed: list[float], **changes) -> Watch:
    """A watch that looks after every tenth step; the pivot is after the 20th."""
    watch = Watch(checks=len(followed), **changes)
    watch._meter = FakeMeter(followed)  # type: ignore[assignment]
    watch._total, watch._pivot = 10 * len(followed), 20
    return watch


def looks(watch: Watch) -> list[bool]:
    """Whether the watch would stop after each tenth step."""
    steps = range(1, watch._total + 1)
    stops = [watch.stops_after(step, lambda step=step: moment(step)) for step in steps]
    assert not any(stop for step, stop in zip(steps, stops, strict=True) if step % 10)
    return stops[9::10]


def test_the_best_moment_is_handed_over_with_its_reason():
    watch = watch_of([0.7, 0.9, 0.8, 0.6])
    assert looks(watch) == [False] * 4
    assert watch.chosen(moment(40)).weights["step"] == 20
    choice = watch.history.choice
    assert choice is not None and choice.step == 20
    assert choice.reason == "After step 20 prompts were followed better than at the end."


def test_the_last_moment_is_handed_over_if_none_was_clearly_better():
    watch = watch_of([0.7, 0.905, 0.9])
    looks(watch)
    assert watch.chosen(moment(30)).weights["step"] == 30
    assert watch.history.choice is not None and watch.history.choice.step == 30


def test_a_run_that_only_gets_worse_stops():
    falling = [0.9, 0.9, *[0.5] * (PATIENCE + 3)]
    assert looks(watch_of(falling)) == [False] * (2 + PATIENCE) + [True] * 3
    rising = [0.5, 0.5, *[0.9] * (PATIENCE + 3)]
    assert not any(looks(watch_of(rising)))


def test_a_training_ends_when_it_is_asked_to_with_the_best_moment_so_far():
    asked = [False]
    watch = watch_of([0.9, 0.5, 0.9], asked_to_finish=lambda: asked[0])
    assert not watch.stops_after(10, lambda: moment(10)) and not watch.stops_after(14, lambda: moment(14))
    asked[0] = True
    assert watch.stops_after(15, lambda: moment(15))
    assert [check.step for check in watch.history.checks] == [10, 15]
    assert watch.chosen(moment(15)).weights["step"] == 10
    assert Watch(asked_to_finish=lambda: True).stops_after(1, lambda: moment(1)), "also without checks"


def test_previews_that_fail_do_not_stop_a_training(caplog: pytest.LogCaptureFixture):
    def fail(step: int) -> Previews:
        raise OSError("the disk is full")

    watch = watch_of([0.5, 0.6], draw=fail)
    assert looks(watch) == [False, False]
    assert (
        "The previews after step 20 failed (the disk is full): training goes on without them." in caplog.text
    )
    assert watch.history.previews == []


def test_scores_that_fail_leave_the_previews(caplog: pytest.LogCaptureFixture):
    def fail(previews: Previews) -> Previews:
        raise RuntimeError("out of memory")

    watch = watch_of([0.5, 0.6, 0.7, 0.8], draw=lambda step: Previews(step=step, pictures=[]), score=fail)
    looks(watch)
    assert caplog.text.count("The scores of the previews after step 20 failed (out of memory)") == 1
    assert [one.step for one in watch.history.previews] == [20, 40]


@pytest.mark.parametrize("frozen", [True, False])
def test_previews_of_the_chosen_moment_are_drawn_at_the_end_if_they_are_missing(frozen: bool):
    has, drawn = [40], {}

    @contextmanager
    def lent(weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        has.append(int(weights["step"]))
        yield
        has.pop()

    def draw(step: int) -> Previews:
        drawn[step] = has[-1]
        return Previews(step=step, pictures=[])

    watch = watch_of([0.7, 0.7, 0.9, 0.6], draw=draw)
    looks(watch)
    watch._text_is_frozen = frozen
    assert watch.chosen(moment(40), lent).weights["step"] == 30
    assert drawn == {20: 40, 40: 40} | ({30: 30} if frozen else {})
    assert has == [40]


def test_a_training_that_is_asked_to_end_draws_its_last_moment_if_that_is_chosen():
    watch = watch_of(
        [0.5, 0.9], draw=lambda step: Previews(step=step, pictures=[]), asked_to_finish=lambda: True
    )
    watch.checks = 4
    watch.stops_after(5, lambda: moment(5))
    assert [one.step for one in watch.history.previews] == [5]


@pytest.mark.parametrize("changes", [{"lora_targets": "all"}, {"use_dora": True, "lora_alpha": 3.0}])
def test_a_lora_is_lent_other_weights_and_gets_its_own_back(changes: dict[str, Any]):
    made = lora(narrow_unet().requires_grad_(False), replace(CONFIG, is_lora=True, **changes))

    def at_random() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            for parameter in made.weights.params:
                parameter.normal_()
        return made.export()

    other, own = at_random(), at_random()
    before = [parameter.detach().clone() for parameter in made.weights.params]
    assert made.lent is not None
    with made.lent(other):
        assert all(torch.allclose(value, other[name]) for name, value in made.export().items())
    assert all(torch.equal(value, own[name]) for name, value in made.export().items())
    assert all(map(torch.equal, before, made.weights.params))


@pytest.mark.parametrize(
    ("total", "checks", "steps"), [(25, 2, [13, 25]), (4, 6, [1, 2, 3, 4]), (7, 0, []), (3, 1, [3])]
)
def test_a_run_is_looked_at_evenly_and_at_its_end(total: int, checks: int, steps: list[int]):
    assert [step for step in range(1, total + 1) if _due(step, total, checks)] == steps


def test_a_history_is_read_as_it_was_written(tmp_path: Path):
    watch = watch_of([0.7, 0.9])
    looks(watch)
    watch.chosen(moment(20))
    watch.history.write(tmp_path)
    assert History.read(tmp_path) == watch.history
