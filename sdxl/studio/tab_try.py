"""Step 3 of the page: draw with the fine-tune, next to the base and to other fine-tunes.

Knows components and events; does not know how a picture is drawn.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from sdxl.errors import UserInputError
from sdxl.studio import crops
from sdxl.studio.projects import Project
from sdxl.studio.shared import PRIVATE, Studio, told

_SCENES = ("on a beach", "in the snow", "in a forest at sunset", "as a pencil drawing")
_BASE = "the base, without your training"
_MOST_BEFORE = 40
"""Pictures of earlier requests that are shown."""


def try_tab(studio: Studio, key: gr.Textbox) -> dict[str, Any]:
    """Build the tab; return `outputs` and `shown`, which fill it for a project."""
    gr.Markdown("## Draw with it")
    prompt = gr.Textbox(label="What shall it draw?", lines=2, elem_id="prompt", max_length=5000)
    with gr.Row(elem_id="words"):
        word = gr.Button("TOK", size="sm", min_width=80, elem_id="word")
        scenes = [gr.Button(scene, size="sm", min_width=100) for scene in _SCENES]
    with gr.Row():
        tuned = gr.Dropdown(label="Draw with", choices=[], elem_id="tuned")
        beside = gr.Dropdown(label="Beside it", choices=[], multiselect=True, value=[])
    with gr.Row():
        strength = gr.Slider(0, 1.5, value=1, step=0.05, label="Strength", info="1: as it was trained")
        count = gr.Slider(1, 4, value=1, step=1, label="Pictures")
        seed = gr.Textbox(label="Seed", info="Empty: a new one each time", max_length=10)
    with gr.Accordion("Start from a picture", open=False):
        gr.Markdown("It changes the picture. Paint over a part, and only that part is drawn anew.")
        start = gr.ImageEditor(
            label="The picture to start from",
            type="pil",
            sources=("upload", "clipboard"),
            transforms=(),
            layers=False,
            brush=gr.Brush(colors=["#ff7828"], color_mode="fixed", default_size=24),
            height=420,
        )
        change = gr.Slider(0.05, 1, value=0.8, step=0.05, label="How much to change")
    with gr.Accordion("More", open=False):
        negative = gr.Textbox(label="What to keep out of the picture")
        with gr.Row():
            steps = gr.Slider(1, 100, value=50, step=1, label="Steps")
            guidance = gr.Slider(0, 20, value=7.5, step=0.5, label="How strictly it follows the words")
    draw = gr.Button("Draw", variant="primary", size="lg", elem_id="draw")
    how = {"object_fit": "contain", "height": "auto", "visible": False, "interactive": False}
    gallery = gr.Gallery(label="New pictures", columns=2, elem_id="drawn", **how)
    before = gr.Gallery(label="Earlier pictures", columns=4, elem_id="before", **how)

    def shown(project: str) -> list[Any]:
        found = studio.project(project)
        own = studio.finished(found)
        others = [(_BASE, ""), *own, *studio.everything_else(found)]
        small = studio.is_miniature(found)
        return [
            gr.update(value=found.about.word),
            gr.update(choices=[*own, (_BASE, "")], value=own[0][1] if own else ""),
            gr.update(choices=others, value=[]),
            gr.update(value=20 if small else 50),
            gr.update(value=3 if small else 7.5),
            found.about.plain_caption,
            _drawn(found),
        ]

    @told
    def let_draw(project: str, *values: Any) -> Iterator[list[Any]]:
        found = studio.project(project)
        text, with_one, also, scale, number, wanted_seed, picture, strength, avoid, count_of_steps, follows = values
        if not text.strip():
            raise UserInputError("Write what to draw first.")
        if wanted_seed and not wanted_seed.strip().isdecimal():
            raise UserInputError("The seed is a number, such as 7, or empty.")
        first = int(wanted_seed) if wanted_seed and wanted_seed.strip() else random.randrange(2**31)
        target = found.new("drawn")
        inputs = {"prompt": text, "negative_prompt": avoid or "", "seed": first, "num_outputs": int(number)}
        inputs |= {"num_inference_steps": int(count_of_steps), "guidance_scale": follows}
        inputs |= _from_picture(picture, strength, target)
        names = {path: name for name, path in [*studio.finished(found), *studio.everything_else(found), (_BASE, "")]}
        pictures: list[tuple[str, str]] = []
        for place, path in enumerate(dict.fromkeys([with_one or "", *(also or [])])):
            if path not in names:
                raise UserInputError("This fine-tune is not there any more: choose another one.")
            weights = {"replicate_weights": path, "lora_scale": scale} if path else {}
            files = studio.drawer.draw(inputs | weights, target / str(place))
            label = names[path] if path else "the base"
            pictures += [(str(file), f"{label}, seed {first + i}") for i, file in enumerate(files)]
            yield [gr.update(value=pictures, visible=True), gr.skip()]
        yield [gr.skip(), _drawn(found)]

    asks = [key, prompt, tuned, beside, strength, count, seed, start, change, negative, steps, guidance]
    word.click(_with_word, [prompt, word], prompt, api_visibility=PRIVATE, show_progress="hidden")
    for scene in scenes:
        scene.click(_with_word, [prompt, scene], prompt, api_visibility=PRIVATE, show_progress="hidden")
    for event in (draw.click, prompt.submit):
        event(let_draw, asks, [gallery, before], api_visibility=PRIVATE, concurrency_id="draw", concurrency_limit=1)
    return {"outputs": [word, tuned, beside, steps, guidance, prompt, before], "shown": shown}


def _with_word(prompt: str, word: str) -> str:
    return f"{prompt.rstrip()} {word}".strip()


def _from_picture(value: dict[str, Any] | None, change: float, folder: Path) -> dict[str, Any]:
    """The inputs for a picture to start from, and for what was painted over it; none if there is no picture."""
    background: Image.Image | None = (value or {}).get("background")
    if background is None or background.getbbox() is None:
        return {}
    picture = folder / "start.png"
    background.convert("RGB").save(picture)
    given: dict[str, Any] = {"image": str(picture), "prompt_strength": change}
    painted = crops.painted_in(value["layers"]) if value and value.get("layers") else None
    if painted is not None and painted.getbbox() is not None:
        painted.save(folder / "mask.png")
        given |= {"mask": str(folder / "mask.png"), "mask_blur": 4}
    return given


def _drawn(project: Project) -> Any:
    """The gallery of the pictures of earlier requests, the newest first."""
    files = [path for path in project.drawn.glob("*/*/*") if path.suffix in (".png", ".webp", ".jpg")]
    newest = sorted(files, key=lambda path: (-int(path.parent.parent.name), path.parent.name, path.name))
    return gr.update(value=[str(path) for path in newest[:_MOST_BEFORE]], visible=bool(newest))
