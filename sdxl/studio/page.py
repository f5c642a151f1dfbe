"""The page: its four steps, and what happens when it is opened.

Knows the order of the steps; does not know what is in them.
"""

from pathlib import Path
from typing import Any

import gradio as gr

from sdxl.report.markup import tag
from sdxl.studio import views
from sdxl.studio.shared import PRIVATE, Studio, told
from sdxl.studio.tab_pictures import pictures_tab
from sdxl.studio.tab_take import take_tab
from sdxl.studio.tab_train import train_tab
from sdxl.studio.tab_try import try_tab

CSS = Path(__file__).with_name("page.css")
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
HEAD = '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">'
_ADDRESS = "() => new URLSearchParams(location.search).get('project') || ''"
_REMEMBER = "(key) => { history.replaceState(null, '', '?project=' + key); return [] }"


def build(studio: Studio) -> gr.Blocks:
    """The page of `studio`."""
    with gr.Blocks(title="Studio", analytics_enabled=False, fill_width=True) as page:
        key = gr.Textbox(visible="hidden", label="Project", elem_id="project")
        version = gr.State(0)
        gr.HTML(
            tag("h1", "Studio")
            + tag("p", "Teach a picture model your dog, your face or your toy. Everything stays on this computer.", class_="soft")
        )
        with gr.Accordion("Your projects", open=False):
            projects = gr.HTML()
        with gr.Tabs():
            with gr.Tab("1 Pictures"):
                pictures = pictures_tab(studio, key, version)
            with gr.Tab("2 Train") as train_step:
                train = train_tab(studio, key)
            with gr.Tab("3 Try") as try_step:
                tries = try_tab(studio, key)
            with gr.Tab("4 Take away") as take_step:
                take = take_tab(studio, key)
        gr.HTML(tag("p", f"The base is {studio.base}.", class_="soft"))

        @told
        def open_project(address: str, number: int) -> list[Any]:
            project = studio.projects.open(address)
            named = {text: f"/?project={known}" for text, known in studio.projects.all()}
            about = project.about
            return [
                project.key,
                views.links({"New project": "/", **named}),
                about.name,
                about.kind or None,
                *pictures["shown"](project.key, number),
            ]

        fills = [key, projects, pictures["name"], pictures["kind"], *pictures["outputs"]]
        opened = page.load(open_project, [key, version], fills, js=f"() => [({_ADDRESS})(), 0]", api_visibility=PRIVATE)
        opened = opened.then(None, key, None, js=_REMEMBER)
        for step, part in ((train_step, train), (try_step, tries), (take_step, take)):
            inputs = [key, *part.get("inputs", [])]
            step.select(told(part["shown"]), inputs, part["outputs"], api_visibility=PRIVATE, show_progress="hidden")
    return page
