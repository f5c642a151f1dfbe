"""Step 3 of the page: draw with the fine-tune, next to the base and to other fine-tunes.

Knows components and events; does not know how a picture is drawn.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from sdxl import miniature
from sdxl.errors import UserInputError
from sdxl.studio import crops, starting_picture, views
from sdxl.studio.box import Box, painted
from sdxl.studio.projects import Project, read_json, write_json
from sdxl.studio.shared import PRIVATE, Studio, told

_SCENES = ("on a beach", "in the snow", "in a forest at sunset", "as a pencil drawing")
_BASE = ("the base, without your training", "")
"""What people see, and the path that stands for it."""
_DRAWING = {"num_inference_steps": 50, "guidance_scale": 7.5}
"""The defaults of `predict`."""
_SEEDS = 100_000
"""Random seeds are below: few digits are easy to write down."""
_LABELS = "labels.json"
"""The file of a request that says how each of its pictures was drawn."""
_MOST_BEFORE = 40
"""Pictures of earlier requests that are shown."""


class TryTab:
    """The components of the step, and what they do."""

    def __init__(self, studio: Studio, key: gr.Textbox) -> None:
        self._studio, self._key = studio, key
        gr.Markdown("## Draw with it")
        self._words()
        with gr.Row():
            self.tuned = gr.Dropdown(label="Draw with", choices=[], elem_id="tuned")
            self.beside = gr.Dropdown(
                label="Compare with", choices=[], multiselect=True, value=[], elem_id="beside"
            )
        with gr.Row():
            self.strength = gr.Slider(
                0, 1.5, value=1, step=0.05, label="Strength", info="1: as it was trained"
            )
            self.count = gr.Slider(1, 4, value=1, step=1, label="Pictures")
            self.seed = gr.Textbox(
                label="Seed", info="Empty: a new one each time", max_length=10, elem_id="seed"
            )
        self._picture()
        with gr.Accordion("More", open=False):
            self.negative = gr.Textbox(label="What to keep out of the picture")
            with gr.Row():
                self.steps = gr.Slider(1, 100, value=_DRAWING["num_inference_steps"], step=1, label="Steps")
                self.guidance = gr.Slider(
                    0,
                    20,
                    value=_DRAWING["guidance_scale"],
                    step=0.5,
                    label="How strictly it follows the words",
                )
        self.draw = gr.Button("Draw", variant="primary", size="lg", elem_id="draw")
        self.drawn, self.before = _gallery("New pictures", "drawn"), _gallery("Earlier pictures", "before")
        self.filled = gr.State("")
        """For what the fields were filled: they keep what was written as long as that is so."""
        self.inputs = [key, self.filled]
        self.outputs = [
            self.filled,
            self.word,
            self.tuned,
            self.beside,
            self.steps,
            self.guidance,
            self.prompt,
            self.before,
        ]
        self._connect()

    def _words(self) -> None:
        self.prompt = gr.Textbox(label="What shall it draw?", lines=2, elem_id="prompt", max_length=5000)
        with gr.Row():
            self.word = gr.Button("TOK", size="sm", min_width=80, elem_id="word")
            scenes = [gr.Button(scene, size="sm", min_width=100) for scene in _SCENES]
        for button in (self.word, *scenes):
            button.click(
                _with_word, [self.prompt, button], self.prompt, api_visibility=PRIVATE, show_progress="hidden"
            )

    def _picture(self) -> None:
        with gr.Accordion("Start from a picture", open=False, elem_id="start-from"):
            gr.Markdown("It changes the picture. Paint over a part, and only that part is drawn anew.")
            with gr.Row():
                choose = gr.UploadButton("Choose a picture", size="md", elem_id="start-picture")
                forget = gr.Button("No picture", size="md", elem_id="start-none")
            self.picture = painted("The picture to start from", 420)
            box = Box("Draw only this box anew", "start")
            self.change = gr.Slider(0.05, 1, value=0.8, step=0.05, label="How much to change")
        choose.upload(_opened, choose, self.picture, api_visibility=PRIVATE)
        box.use.click(_boxed, [self.picture, *box.edges], self.picture, api_visibility=PRIVATE)
        forget.click(lambda: None, None, self.picture, api_visibility=PRIVATE, show_progress="hidden")

    def _connect(self) -> None:
        asks = [self._key, self.prompt, self.tuned, self.beside, self.strength, self.count, self.seed]
        asks += [self.picture, self.change, self.negative, self.steps, self.guidance]
        for event in (self.draw.click, self.prompt.submit):
            event(
                self.let_draw,
                asks,
                [self.drawn, self.before],
                api_visibility=PRIVATE,
                concurrency_id="draw",
                concurrency_limit=1,
            )

    @told
    def shown(self, key: str, filled: str) -> list[Any]:
        """The fine-tunes and pictures of a project, for the components of `outputs`."""
        project = self._studio.project(key)
        own = self._studio.finished(project)
        others = self._studio.everything_else(project)
        if filled == (now := str((project.key, project.about, own, others))):
            return [gr.skip()] * len(self.outputs)
        drawing = miniature.DRAWING if self._studio.is_miniature(project) else _DRAWING
        return [
            now,
            gr.update(value=project.about.word),
            gr.update(choices=[*own, _BASE], value=own[0][1] if own else ""),
            gr.update(choices=[_BASE, *own, *others], value=[]),
            gr.update(value=drawing["num_inference_steps"]),
            gr.update(value=drawing["guidance_scale"]),
            project.about.plain_caption,
            _earlier(project),
        ]

    @told
    def let_draw(
        self,
        key: str,
        prompt: str,
        tuned: str | None,
        beside: list[str] | None,
        strength: float,
        count: float,
        seed: str | None,
        picture: dict[str, Any] | None,
        change: float,
        negative: str | None,
        steps: float,
        guidance: float,
    ) -> Iterator[list[Any]]:
        """Draw with each chosen fine-tune, from the same seeds; show each as it comes."""
        project = self._studio.project(key)
        if not prompt.strip():
            raise UserInputError("Write what to draw first.")
        first = _seed(seed)
        folder = project.new("drawn")
        inputs = {
            **{"prompt": prompt, "negative_prompt": negative or "", "seed": first, "num_outputs": int(count)},
            **{"num_inference_steps": int(steps), "guidance_scale": guidance},
            **starting_picture.inputs_for(picture, change, folder),
        }
        known = [_BASE, *self._studio.finished(project), *self._studio.everything_else(project)]
        names = {path: name for name, path in known}
        pictures: list[tuple[str, str]] = []
        for place, path in enumerate(dict.fromkeys([tuned or "", *(beside or [])])):
            if path not in names:
                raise UserInputError("This fine-tune is not there any more: choose another one.")
            weights = {"replicate_weights": path, "lora_scale": strength} if path else {}
            files = self._studio.drawer.draw(inputs | weights, folder / str(place))
            label = names[path] if path else "the base"
            pictures += [(str(file), f"{label}, seed {first + i}") for i, file in enumerate(files)]
            write_json(folder / _LABELS, {one: f"{label}: {prompt.strip()}" for one, label in pictures})
            yield [gr.update(value=pictures, visible=True), gr.skip()]
        yield [gr.skip(), _earlier(project)]


def _gallery(label: str, name: str) -> gr.Gallery:
    return gr.Gallery(
        label=label, elem_id=name, object_fit="contain", height="auto", visible=False, interactive=False
    )


@told
def _opened(file: str) -> Any:
    """The editor with the picture in a file, in its size."""
    return _in_editor(starting_picture.opened(Path(file)), [])


@told
def _boxed(value: dict[str, Any] | None, *edges: float) -> Any:
    """The editor with a box painted instead of what was."""
    background = starting_picture.in_editor(value)
    if background is None:
        raise UserInputError("Choose a picture first.")
    return _in_editor(background, [views.painted(crops.box(background.size, edges))])


def _in_editor(picture: Image.Image, layers: list[Image.Image]) -> Any:
    return gr.update(
        value={"background": picture, "layers": layers, "composite": None}, canvas_size=picture.size
    )


def _with_word(prompt: str, word: str) -> str:
    return f"{prompt.rstrip()} {word}".strip()


def _seed(text: str | None) -> int:
    """The seed that somebody wrote, or a random one."""
    if not text or not text.strip():
        return random.randrange(_SEEDS)
    if not text.strip().isdecimal():
        raise UserInputError("The seed is a number, such as 7, or empty.")
    return int(text)


def _earlier(project: Project) -> Any:
    """The gallery of the pictures of earlier requests, the newest first."""
    files = [path for path in project.drawn.glob("*/*/*") if path.suffix in (".png", ".webp", ".jpg")]
    newest = sorted(files, key=lambda path: (-int(path.parent.parent.name), path.parent.name, path.name))
    shown = newest[:_MOST_BEFORE]
    labels: dict[str, str] = {}
    for folder in {path.parent.parent for path in shown}:
        labels |= read_json(folder / _LABELS, {})
    return gr.update(value=[(str(path), labels.get(str(path))) for path in shown], visible=bool(newest))
