"""Step 2 of the page: choose how long, start, watch, stop.

Knows components and events; does not know how a training works. A training goes on without the page: what is shown is read
from its files.
"""

from typing import Any

import gradio as gr

from sdxl.errors import UserInputError
from sdxl.studio import trainings, views
from sdxl.studio.choices import Choice, as_texts, forecast, gpu_is_here, token_map
from sdxl.studio.picture_set import PictureSet
from sdxl.studio.projects import Project
from sdxl.studio.shared import PRIVATE, Studio, told
from sdxl.studio.trainings import Training

_EVERY_SECONDS = 2.0
_CURVES_AGAIN = 20
"""Curves are drawn at most so many times in a run, and at each check."""
_PRESETS = [
    ("Quick: a first look", "quick"),
    ("Good: right for most", "good"),
    ("Patient: finer, takes longer", "patient"),
]
_SHOWN = [
    "max_train_steps",
    "train_batch_size",
    "resolution",
    "is_lora",
    "lora_rank",
    "lora_targets",
    "lora_lr",
    "unet_learning_rate",
    "ti_lr",
    "lr_scheduler",
    "lr_warmup_steps",
    "random_views",
    "preservation",
    "checks",
]
"""Settings that the page shows, by the names of the inputs."""


class TrainTab:
    """The components of the step, and what they do."""

    def __init__(self, studio: Studio, key: gr.Textbox) -> None:
        self._studio, self._key = studio, key
        gr.Markdown("## Let it learn")
        self._choices()
        with gr.Row():
            self.start = gr.Button("Start training", variant="primary", size="lg", elem_id="start")
            stop = "Stop, and keep the best so far"
            self.stop = gr.Button(stop, variant="stop", size="lg", visible=False, elem_id="stop")
            self.go_on = gr.Button("Go on where it stopped", size="lg", visible=False, elem_id="go-on")
        self.ended = gr.HTML()
        self.status = gr.HTML(elem_id="status")
        self.previews = gr.HTML(elem_id="previews")
        with gr.Accordion("Curves", open=False, elem_id="curves") as curves:
            self.curves = gr.HTML()
        self.with_curves = gr.State(False)
        """Whether somebody looks at the curves: to draw them takes half a second."""
        curves.expand(lambda: True, None, self.with_curves, api_visibility=PRIVATE)
        curves.collapse(lambda: False, None, self.with_curves, api_visibility=PRIVATE)
        with gr.Accordion("Log", open=False):
            self.log = gr.Textbox(label="The last lines of the log", lines=8, max_lines=8, interactive=False)
        self.seen = gr.State("")
        """What the page shows now: without a change nothing is sent."""
        self.watched = [self.status, self.previews, self.curves, self.log]
        self.watched += [self.start, self.stop, self.go_on, self.seen]
        self._connect()

    def _choices(self) -> None:
        self.preset = gr.Radio(_PRESETS, value="good", label="How much time may it take?", elem_id="preset")
        self.takes = gr.HTML(elem_id="takes")
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            with gr.Row():
                as_chosen: dict[str, Any] = {
                    "precision": 0,
                    "minimum": 0,
                    "value": 0,
                    "info": "0: as chosen above",
                }
                self.steps = gr.Number(label="Steps", **as_chosen)
                self.rank = gr.Number(label="Rank of the LoRA", **as_chosen)
            self.small = gr.Checkbox(label="My GPU is small (12 to 24 GB): learn one picture at a time")
            self.whole = gr.Checkbox(
                label="Train the whole model instead of a LoRA: 5 GB instead of megabytes"
            )
            self.prompts = gr.Textbox(
                label="What the previews show",
                info="One prompt a line. Empty: made from your captions",
                lines=2,
                elem_id="previews-of",
            )
            self.more = gr.Textbox(
                label="Other settings",
                info="One name=value a line, as in the table of inputs in docs/inputs.md",
                lines=2,
                elem_id="more",
            )
            self.table = gr.HTML()
        self.chosen = [self.preset, self.whole, self.small, self.steps, self.rank, self.prompts, self.more]
        self.inputs, self.outputs = self.key_and(*self.chosen), [self.takes, self.table]

    def key_and(self, *components: Any) -> list[Any]:
        """Inputs of an event: the project's key comes first."""
        return [self._key, *components]

    def _connect(self) -> None:
        # One event for all of them: while it runs, the last change waits, so the last answer is the right one.
        gr.on(
            [one.change for one in self.chosen],
            self.shown,
            self.inputs,
            self.outputs,
            api_visibility=PRIVATE,
            show_progress="hidden",
            trigger_mode="always_last",
        )
        self.start.click(self.begin, self.inputs, self.watched, api_visibility=PRIVATE)
        self.stop.click(self.end, self._key, self.ended, api_visibility=PRIVATE)
        self.go_on.click(self.resume, self._key, self.watched, api_visibility=PRIVATE)
        gr.Timer(_EVERY_SECONDS).tick(
            self.watch,
            self.key_and(self.seen, self.with_curves),
            self.watched,
            api_visibility=PRIVATE,
            show_progress="hidden",
        )

    def _asked(self, project: Project, *values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The inputs that were chosen, and the settings that they become."""
        fields = ("preset", "whole_unet", "save_memory", "steps", "rank", "previews", "more")
        choice = Choice(
            **{name: value for name, value in zip(fields, values, strict=True) if value is not None}
        )
        side, pictures = self._studio.side(project), PictureSet(project).used
        inputs = choice.inputs(project.about, side)
        return inputs, self._studio.resolve(as_texts(inputs), max(1, len(pictures)), side)

    @told
    def shown(self, key: str, *values: Any) -> list[Any]:
        """What the choice will take, and the settings that it becomes; or what is wrong with it."""
        project = self._studio.project(key)
        try:
            _, resolved = self._asked(project, *values)
        except UserInputError as error:
            return [views.sentences([str(error)]), ""]
        if not PictureSet(project).pictures:  # they tell the size of the base
            return [views.sentences(["First add pictures in step 1."], class_="soft"), ""]
        known = trainings.seconds_of_a_step(trainings.all_of(project), resolved)
        text = forecast(resolved, known, has_gpu=gpu_is_here())
        return [views.sentences([text], class_="soft"), views.settings_table(resolved, names=_SHOWN)]

    @told
    def begin(self, key: str, *values: Any) -> list[Any]:
        """Start a training, and show it."""
        project = self._studio.project(key)
        inputs, resolved = self._asked(project, *values)
        if inputs["token_map"] == token_map(project.about):  # other words are not the studio's
            PictureSet(project).require_word()
        self._studio.drawer.free()
        return self._seen(trainings.begin(project, inputs, resolved), "")

    @told
    def end(self, key: str) -> str:
        """Stop the training."""
        training = trainings.latest(self._studio.project(key))
        return views.sentences([training.stop()], class_="soft") if training else ""

    @told
    def resume(self, key: str) -> list[Any]:
        """Go on with a training that did not finish."""
        training = trainings.latest(self._studio.project(key))
        if training is None:
            raise UserInputError("There is no training to go on with.")
        training.go()
        return self._seen(training, "")

    def watch(self, key: str, before: str, with_curves: bool) -> list[Any]:
        """What has changed since `before`."""
        training = trainings.latest(self._studio.project(key)) if key else None
        if training is not None:
            return self._seen(training, before, with_curves)
        hidden = gr.update(visible=False)
        return ["", "", "", "", gr.update(visible=True), hidden, hidden, ""] if before else self._as_it_is

    @property
    def _as_it_is(self) -> list[Any]:
        return [gr.skip()] * len(self.watched)

    def _seen(self, training: Training, before: str, with_curves: bool = False) -> list[Any]:
        """The training as it is now, for the components of `watched`. before: what they show."""
        now = training.progress
        part = now.step * _CURVES_AGAIN // max(1, now.steps)
        pictures = f"{training.number} {len(now.history.previews)} {now.folder.name}"
        drawn = f"{training.number} {len(now.history.checks)} {part} {now.state}" if with_curves else ""
        seen = f"{pictures}|{drawn}|{now.step} {now.state} {now.message}"
        if seen == before:
            return self._as_it_is
        same_pictures = before.startswith(f"{pictures}|")
        same_curves = not with_curves or f"|{drawn}|" in before
        running = training.is_running
        return [
            views.progress(now),
            gr.skip() if same_pictures else views.previews(now),
            gr.skip() if same_curves else views.charts(now, training),
            training.log_end,
            gr.update(visible=not running),
            gr.update(visible=running),
            gr.update(visible=training.can_go_on),
            seen,
        ]
