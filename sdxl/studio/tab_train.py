"""Step 2 of the page: choose how long, start, watch, stop.

Knows components and events; does not know how a training works. A training goes on without the page: what is shown is read
from its files.
"""

from typing import Any

import gradio as gr

from sdxl.errors import UserInputError
from sdxl.studio import trainings, views
from sdxl.studio.choices import Choice, as_texts, forecast, gpu_is_here
from sdxl.studio.picture_set import PictureSet
from sdxl.studio.projects import Project
from sdxl.studio.shared import PRIVATE, Studio, told

_EVERY_SECONDS = 2.0
_CURVES_AGAIN = 20
"""Curves are drawn at most so many times in a run, and at each check: a drawing takes a second."""
_PRESETS = [
    ("Quick: a first look", "quick"),
    ("Good: right for most", "good"),
    ("Patient: finer, takes longer", "patient"),
]
_SHOWN = (
    *("max_train_steps", "train_batch_size", "resolution", "is_lora", "lora_rank", "lora_targets", "lora_lr"),
    *("unet_learning_rate", "ti_lr", "lr_scheduler", "lr_warmup_steps", "random_views", "preservation", "checks"),
)
"""Settings that the page shows, by the names of the inputs."""


def train_tab(studio: Studio, key: gr.Textbox) -> dict[str, Any]:
    """Build the tab; return `outputs` and `shown`, which fill it for a project."""
    gr.Markdown("## Let it learn")
    preset = gr.Radio(_PRESETS, value="good", label="How much time may it take?", elem_id="preset")
    takes = gr.HTML(elem_id="takes")
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        with gr.Row():
            steps = gr.Number(label="Steps", precision=0, minimum=0, value=0, info="0: as chosen above")
            rank = gr.Number(label="Rank of the LoRA", precision=0, minimum=0, value=0, info="0: as chosen above")
        small = gr.Checkbox(label="My GPU is small (12 to 24 GB): learn one picture at a time")
        whole = gr.Checkbox(label="Train the whole model instead of a LoRA: 5 GB instead of megabytes, more memory")
        prompts = gr.Textbox(label="What the previews show", info="One prompt a line. Empty: made from your captions", lines=2, elem_id="previews-of")
        more = gr.Textbox(
            label="Other settings",
            info="One name=value a line, as in the table of inputs in docs/inputs.md",
            lines=2,
            elem_id="more",
        )
        table = gr.HTML()
    with gr.Row():
        start = gr.Button("Start training", variant="primary", size="lg", elem_id="start")
        stop = gr.Button("Stop, and keep the best so far", variant="stop", size="lg", visible=False, elem_id="stop")
        go_on = gr.Button("Go on where it stopped", size="lg", visible=False, elem_id="go-on")
    ended = gr.HTML()
    status = gr.HTML(elem_id="status")
    previews = gr.HTML(elem_id="previews")
    with gr.Accordion("Curves", open=False):
        curves = gr.HTML()
    with gr.Accordion("Log", open=False):
        log = gr.Textbox(label="The last lines of the log", lines=8, max_lines=8, interactive=False)
    seen = gr.State("")
    """What the page shows now: without a change nothing is sent."""
    timer = gr.Timer(_EVERY_SECONDS)

    chosen = [preset, whole, small, steps, rank, prompts, more]
    watched = [status, previews, curves, log, start, stop, go_on, seen]

    def choice(*values: Any) -> Choice:
        fields = ("preset", "whole_unet", "save_memory", "steps", "rank", "previews", "more")
        return Choice(**{name: value for name, value in zip(fields, values, strict=True) if value is not None})

    def asked(project: Project, *values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The inputs that were chosen, and the settings that they become."""
        side, pictures = studio.side(project), PictureSet(project).used
        inputs = choice(*values).inputs(project.about, side)
        return inputs, studio.resolve(as_texts(inputs), max(1, len(pictures)), side)

    def foresee(project: str, *values: Any) -> list[Any]:
        try:
            found = studio.project(project)
            _, resolved = asked(found, *values)
        except UserInputError as error:
            return [views.sentences([str(error)]), ""]
        known = trainings.seconds_of_a_step(trainings.all_of(found), resolved)
        text = forecast(resolved, known, has_gpu=gpu_is_here())
        return [views.sentences([text], class_="soft"), views.settings_table(resolved, names=_SHOWN)]

    @told
    def begin(project: str, *values: Any) -> list[Any]:
        found = studio.project(project)
        inputs, resolved = asked(found, *values)
        studio.drawer.free()
        trainings.begin(found, inputs, resolved)
        return watch(project, "")

    @told
    def end(project: str) -> str:
        training = trainings.latest(studio.project(project))
        return views.sentences([training.stop()], class_="soft") if training else ""

    @told
    def resume(project: str) -> list[Any]:
        training = trainings.latest(studio.project(project))
        if training is None:
            raise UserInputError("There is no training to go on with.")
        training.go()
        return watch(project, "")

    def watch(project: str, before: str) -> list[Any]:
        training = trainings.latest(studio.project(project)) if project else None
        if training is None:
            return [gr.skip()] * len(watched) if before == "none" else _nothing(len(watched))
        now = training.progress
        history = now.history
        part = now.step * _CURVES_AGAIN // max(1, now.steps)
        pictures = f"{training.number} {len(history.previews)} {now.folder.name}"
        drawn = f"{training.number} {len(history.checks)} {part} {now.state}"
        shown = f"{pictures}|{drawn}|{now.step} {now.state} {now.message}"
        if shown == before:
            return [gr.skip()] * len(watched)
        parts_before = before.split("|") if before.count("|") == 2 else ["", "", ""]
        running = training.is_running
        return [
            views.progress(now),
            gr.skip() if pictures == parts_before[0] else views.previews(now),
            gr.skip() if drawn == parts_before[1] else views.charts(now, training),
            training.log_end,
            gr.update(visible=not running),
            gr.update(visible=running),
            gr.update(visible=now.state == "failed"),
            shown,
        ]

    for component in chosen:
        event = component.blur if isinstance(component, gr.Textbox | gr.Number) else component.change
        event(foresee, [key, *chosen], [takes, table], api_visibility=PRIVATE, show_progress="hidden")
    start.click(begin, [key, *chosen], watched, api_visibility=PRIVATE)
    stop.click(end, key, ended, api_visibility=PRIVATE)
    go_on.click(resume, key, watched, api_visibility=PRIVATE)
    timer.tick(watch, [key, seen], watched, api_visibility=PRIVATE, show_progress="hidden")
    return {"outputs": [takes, table], "inputs": chosen, "shown": foresee, "watched": watched, "watch": watch}


def _nothing(count: int) -> list[Any]:
    """The tab of a project without a training."""
    hidden = gr.update(visible=False)
    return ["", "", "", "", gr.update(visible=True), hidden, hidden, "none"][:count]
