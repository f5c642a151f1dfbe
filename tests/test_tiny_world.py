"""The procedural world: seeds, masks, colours, captions, the held-out split, tokens, and a small pretraining
end to end."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_world import make_examples, pretrain
from tiny_world import parts as P
from tiny_world.bank import Order, make, orders
from tiny_world.captions import caption, held_out_prompts
from tiny_world.figures import figure_parts
from tiny_world.parts import Frame, pad
from tiny_world.raster import mask_box, render
from tiny_world.scenes import Scene, is_held_out, random_scene, scene_parts
from tiny_world.subjects import random_shot, shot_parts, subject
from tiny_world.tokens import build_tokenizers, encode_words, vocabulary
from tiny_world.words import COLOURS, KINDS, POSITIONS, RELATIONS, TEXTURES, caption_words, places

ROOT = Path(__file__).parents[1]


def scene(**changes) -> Scene:
    values = dict(
        kind="star", colour="red", size="large", position="middle", background="blue", texture="plain"
    )
    return Scene(**{**values, **changes})


def test_the_same_seed_draws_the_same_pixels_and_another_seed_others():
    def picture(seed: int) -> torch.Tensor:
        tables = [
            scene_parts(scene(texture="dotted"), np.random.default_rng(seed)),
            shot_parts(random_shot("TOK", np.random.default_rng(seed)), {"TOK": subject(seed)}, seed),
            figure_parts(np.random.default_rng(seed)),
        ]
        return render(pad(tables), size=64).images

    assert torch.equal(picture(4), picture(4))
    difference = (picture(4) - picture(6)).abs().mean((1, 2, 3))
    assert (difference > 0.02).all()


def test_a_picture_does_not_depend_on_its_batch():
    rng = np.random.default_rng(0)
    pictures = [scene_parts(random_scene(rng), rng) for _ in range(6)]
    together = render(pad(pictures), size=128).images
    alone = torch.cat([render(pad([rows]), size=128).images for rows in pictures])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_circle_covers_the_area_of_a_circle_and_fades_at_its_edge():
    rows: list[list[float]] = []
    Frame(rows=rows, layer=1).ellipse(0.5, 0.5, 0.3, 0.3, (1.0, 0.0, 0.0))
    drawn = render(pad([rows]))
    mask = drawn.masks[0, 0]
    assert float(mask.mean()) == pytest.approx(np.pi * 0.3**2, rel=0.01)
    assert torch.allclose(drawn.images[0, 0], mask) and float(drawn.images[0, 1:].max()) == 0
    assert ((mask > 0.05) & (mask < 0.95)).sum() > 300


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_is_where_the_object_changed_the_picture(kind):
    drawn = render(pad([scene_parts(scene(kind=kind), np.random.default_rng(2))]))
    background = drawn.images[0, :, 0, 0].view(3, 1, 1)
    changed = (drawn.images[0] - background).abs().amax(0) > 0.08
    mask = drawn.masks[0, 0]
    assert not (changed & (mask < 0.02)).any()
    assert mask_box(mask) is not None
    agreement = (changed & (mask > 0.5)).sum() / (mask > 0.5).sum()
    assert agreement > 0.97


def test_boxes_lie_where_positions_say():
    for position, (column, row) in POSITIONS.items():
        drawn = render(
            pad([scene_parts(scene(position=position, size="small"), np.random.default_rng(1))]), size=128
        )
        box = mask_box(drawn.masks[0, 0])
        assert box is not None
        left, top, right, bottom = box
        assert min(left, top) > 0 and max(right, bottom) < 128
        x, y = (left + right) / 256 - 0.5, (top + bottom) / 256 - 0.5
        assert (round(x / 0.35), round(y / 0.35)) == (column, row)


def test_an_empty_mask_has_no_box():
    assert mask_box(torch.zeros(8, 8)) is None


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_are_drawn_as_named(relation):
    pair = scene(size="medium", second_kind="circle", second_colour="green", relation=relation)
    drawn = render(pad([scene_parts(pair, np.random.default_rng(3))]))
    boxes = [mask_box(drawn.masks[0, layer]) for layer in (0, 1)]
    assert boxes[0] and boxes[1]
    (ax, ay), (bx, by) = (((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in boxes if b)
    expected = {
        "left of": ax < bx - 40,
        "right of": ax > bx + 40,
        "above": ay < by - 40,
        "on top of": ay < by - 40,
        "below": ay > by + 40,
        "next to": abs(ax - bx) > 40 and abs(ay - by) < 10,
        "in front of": abs(ax - bx) < 40,
    }
    assert expected[relation]


def test_colours_are_far_apart_and_the_object_shows_its_own():
    for a, b in itertools.combinations(COLOURS.values(), 2):
        assert np.linalg.norm(np.subtract(a, b)) > 0.25
    for colour, rgb in COLOURS.items():
        background = "white" if colour != "white" else "black"
        drawn = render(
            pad([scene_parts(scene(colour=colour, background=background), np.random.default_rng(0))]), size=64
        )
        inside = drawn.images[0][:, drawn.masks[0, 0] > 0.99].mean(1).numpy()
        assert (
            min(COLOURS, key=lambda name: float(np.linalg.norm(np.subtract(COLOURS[name], inside)))) == colour
        )
        assert np.abs(inside - rgb).max() < 0.05


@pytest.mark.parametrize("texture", TEXTURES)
def test_the_main_colour_of_a_background_stays_its_name(texture):
    # Shades are neighbours of other names (light blue, dark orange): the named colour must still lead.
    for name in ("red", "green", "blue", "purple"):
        empty = scene(kind=None, colour=None, background=name, texture=texture)
        pixels = render(pad([scene_parts(empty, np.random.default_rng(1))]), size=64).images[0].flatten(1).T
        nearest = torch.cdist(pixels, torch.tensor(list(COLOURS.values()))).argmin(1)
        counts = nearest.bincount(minlength=len(COLOURS))
        assert counts[list(COLOURS).index(name)] >= 0.35 * len(pixels)


def test_captions_tell_no_lie():
    rng = np.random.default_rng(0)
    all_places = {phrase: name for name in POSITIONS for phrase in places(name)}
    for _ in range(800):
        drawn = random_scene(rng)
        text = caption(drawn, rng)
        words = set(text.replace(",", " ").split())
        assert words <= set(caption_words())
        assert words & set(COLOURS) <= {drawn.colour, drawn.second_colour, drawn.background}
        assert words & set(KINDS) <= {drawn.kind, drawn.second_kind}
        assert words & {"small", "medium", "large"} <= {drawn.size}
        if drawn.relation is None:
            found = [
                all_places[p] for p in sorted(all_places, key=len) if f" {p} " in f" {text} ".replace(",", "")
            ]
            assert not found or found[-1] == drawn.position
        for texture in set(TEXTURES) - {drawn.texture}:
            assert texture not in words
        if drawn.texture != "plain" and drawn.kind is not None:
            assert "plain" not in words


def test_full_captions_name_everything_but_size():
    for prompt, drawn in held_out_prompts(100, seed=3):
        assert {drawn.kind, drawn.colour, drawn.background} <= set(prompt.replace(",", "").split())
        if drawn.relation is None:
            assert any(place in prompt for place in places(drawn.position))


def test_held_out_combinations_are_never_trained_on():
    rng = np.random.default_rng(1)
    assert not any(is_held_out(random_scene(rng)) for _ in range(2000))
    prompts = held_out_prompts(200, seed=0)
    assert all(is_held_out(drawn) for _, drawn in prompts)
    assert prompts == held_out_prompts(200, seed=0) != held_out_prompts(200, seed=1)
    plain = [is_held_out(scene(kind=k, colour=c)) for k in KINDS for c in COLOURS]
    assert 0.04 < np.mean(plain) < 0.18


def test_subjects_differ_and_keep_their_identity():
    people = [subject(seed) for seed in range(0, 400, 2)]
    assert len(set(people)) == len(people)
    assert subject(8) == subject(8)
    shot = scene(kind="TOK", colour=None)
    poses = render(pad([shot_parts(shot, {"TOK": subject(8)}, seed) for seed in (1, 2)]), size=128)
    assert (poses.images[0] - poses.images[1]).abs().mean() > 0.01
    for mask in poses.masks[:, 0]:
        box = mask_box(mask)
        assert box is not None and box[3] - box[1] > 60


def test_tokenizers_hold_every_word_and_split_unknown_ones():
    first, second = build_tokenizers()
    ids = vocabulary()
    for word in (*caption_words(), "creature", "toy", "monster"):
        assert first(word).input_ids[1:-1] == [ids[word + "</w>"]]
    assert second.pad_token_id == 0 and first.pad_token_id == first.eos_token_id == len(ids) - 1 == max(
        ids.values()
    )
    assert first.bos_token_id == len(ids) - 2
    for text in ("a zebra wearing sunglasses", "naïve 猫 tok42!"):
        encoded = first(text).input_ids
        assert first.unk_token_id not in encoded[1:-1]
        assert first.decode(encoded, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_encode_words_is_the_tokenizer():
    rng = np.random.default_rng(5)
    for tokenizer in build_tokenizers():
        texts = [caption(random_scene(rng), rng) for _ in range(50)]
        expected = tokenizer(texts, padding="max_length", max_length=77).input_ids
        assert [encode_words(text, tokenizer.pad_token_id).tolist() for text in texts] == expected


def test_chunks_are_reproducible_and_cropped_ones_say_so():
    kinds = {order.how for order in orders("scenes", 10_000, seed=0)}
    assert kinds == {"whole", "crop", "coarse"}
    chunk = make(Order("scenes", 1, 4, "crop"))
    assert np.array_equal(chunk.table, make(Order("scenes", 1, 4, "crop")).table)
    assert (chunk.time_ids[:, :2] == 320).all() and (chunk.time_ids[:, 4:] == 256).all()
    whole = make(Order("scenes", 1, 4))
    assert (whole.time_ids == (256, 256, 0, 0, 256, 256)).all()
    assert (whole.table[..., P.PRIMITIVE] >= 0).sum() > 4


def test_whitening_normalises_latents_and_changes_no_reconstruction():
    from tiny_world.autoencoder import SCALING_FACTOR, whiten
    from tiny_world.models import SMOKE, build_vae

    torch.manual_seed(0)
    vae = build_vae(SMOKE).eval()
    images = torch.rand(8, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        whiten(vae, images)
        latents = vae.encode(images).latent_dist.mean
        after = vae.decode(latents).sample
    assert torch.allclose(before, after, atol=1e-3)
    assert torch.allclose(latents.std((0, 2, 3)), torch.full((4,), 1 / SCALING_FACTOR), rtol=1e-3)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-2)


def test_example_archives_are_the_same_bytes_each_time(monkeypatch: pytest.MonkeyPatch):
    for name in ("_alone", "_varied"):  # fewer pictures
        scenes = getattr(make_examples, name)
        monkeypatch.setattr(make_examples, name, lambda called, scenes=scenes: scenes(called)[3:5])
    first = make_examples.archives()
    assert first == make_examples.archives()
    assert set(first) == {"crowny.zip", "doggo_robo.zip", "bunny.zip", "crowny_1024.zip"}


def test_a_small_pretraining_ends_in_folders_that_diffusers_samples_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pretrain, "SMOKE_MINUTES", 0.01)
    pretrain.main(
        ["--size", "smoke", "--workdir", str(tmp_path / "run"), "--output", str(tmp_path / "models")]
    )

    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    for name in ("log.jsonl", "loss.png", "base.png", "autoencoder.png", "unet.safetensors"):
        assert (tmp_path / "run" / "fetch" / name).stat().st_size > 0
    folder = tmp_path / "models" / "tiny-sdxl"
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, variant="fp16")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.text_encoder_2.config.eos_token_id == 2
    assert pipeline.vae.config.scaling_factor == 0.13025
    image = pipeline("a red fish", num_inference_steps=2, height=256, width=256).images[0]
    assert image.size == (256, 256)
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        folder.parent / "tiny-sdxl-refiner", variant="fp16"
    )
    refiner.set_progress_bar_config(disable=True)
    refined = refiner("a red fish", image=image, strength=0.5, num_inference_steps=2).images[0]
    assert refined.size == (256, 256) and refined != image


def test_a_held_out_prompt_names_every_attribute_that_it_is_judged_by():
    for prompt, asked in held_out_prompts(200, seed=3):
        assert asked.background in prompt
        if asked.texture == "plain":
            assert "plain" in prompt
