"""The page: its four steps, and what happens when it is opened.

Knows the order of the steps; does not know what is in them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from sdxl.report.markup import tag
from sdxl.studio import views
from sdxl.studio.shared import PRIVATE, Studio, told
from sdxl.studio.tab_pictures import PicturesTab
from sdxl.studio.tab_take import TakeTab
from sdxl.studio.tab_train import TrainTab
from sdxl.studio.tab_try import TryTab

_STYLE, _SCRIPT = (Path(__file__).with_name(name) for name in ("page.css", "page.js"))
_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif")
_MONO = ("ui-monospace", "Liberation Mono", "monospace")
_STRONG, _STRONGER = "#a8430a", "#8a3506"
THEME = gr.themes.Default(
    primary_hue="orange", neutral_hue="stone", radius_size="lg", font=_FONT, font_mono=_MONO
).set(
    button_primary_background_fill=_STRONG,
    button_primary_background_fill_hover=_STRONGER,
    button_primary_background_fill_dark=_STRONG,
    button_primary_background_fill_hover_dark=_STRONGER,
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    input_placeholder_color="*neutral_500",
    checkbox_background_color_selected=_STRONG,
    checkbox_background_color_selected_dark=_STRONG,
    checkbox_border_color="*neutral_500",
    slider_color=_STRONG,
    slider_color_dark=_STRONG,
    link_text_color=_STRONG,
    link_text_color_dark="#ffb787",
)
"""Fonts of the system only, so that nothing is fetched; and colours that are easy to read."""
HEAD = (
    '<meta name="referrer" content="no-referrer">'
    f"<style>{_STYLE.read_text(encoding='utf-8')}</style><script>{_SCRIPT.read_text(encoding='utf-8')}</script>"
)
"""The style is in the head, because Gradio changes the selectors of those that it is given."""


def build(studio: Studio) -> gr.Blocks:
    """The page of `studio`."""
    with gr.Blocks(title="Studio", analytics_enabled=False, fill_width=True) as page:
        key = gr.Textbox(visible="hidden", label="Project", elem_id="project")
        gr.HTML(
            tag("h1", "Studio")
            + tag(
                "p",
                "Teach a picture model your dog, your face or your toy. Everything stays on this computer.",
                class_="soft",
            )
        )
        with gr.Accordion("Your projects", open=False):
            projects = gr.HTML()
        with gr.Tabs():
            with gr.Tab("1 Pictures"):
                pictures = PicturesTab(studio, key)
            with gr.Tab("2 Train") as train_step:
                train = TrainTab(studio, key)
            with gr.Tab("3 Try") as try_step:
                tries = TryTab(studio, key)
            with gr.Tab("4 Take away") as take_step:
                take = TakeTab(studio, key)
        gr.HTML(tag("p", f"The base is {studio.base}.", class_="soft"))

        @told
        def open_project(address: str, number: int) -> list[Any]:
            project = studio.projects.open(address)
            named = {text: f"/?project={known}" for text, known in studio.projects.all()}
            return [
                project.key,
                views.links({"New project": "/", **named}),
                project.about.name,
                project.about.kind or None,
                *pictures.shown(project.key, number),
            ]

        fills = [key, projects, pictures.name, pictures.kind, *pictures.outputs]
        page.load(
            open_project,
            [key, pictures.version],
            fills,
            js="() => [studio.project(), 0]",
            api_visibility=PRIVATE,
        ).then(None, key, None, js="(key) => studio.remember(key)")
        for step, inputs, tab in (
            (train_step, train.inputs, train),
            (try_step, tries.inputs, tries),
            (take_step, key, take),
        ):
            step.select(_once_open(tab), inputs, tab.outputs, api_visibility=PRIVATE, show_progress="hidden")
    return page


def _once_open(tab: TrainTab | TryTab | TakeTab) -> Callable[..., list[Any]]:
    """What fills a tab; nothing as long as the page is still being opened."""
    return lambda key, *values: tab.shown(key, *values) if key else [gr.skip()] * len(tab.outputs)
