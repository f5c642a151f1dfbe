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
THEME = gr.themes.Soft(
    primary_hue="orange", neutral_hue="stone", font=_FONT, font_mono=("ui-monospace", "Liberation Mono", "monospace")
)
"""Fonts of the system only: nothing is fetched."""
HEAD = '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">'
_ADDRESS = "() => new URLSearchParams(location.search).get('project') || ''"
_REMEMBER = "(key) => { history.replaceState(null, '', '?project=' + key); return [] }"


def build(studio: Studio) -> gr.Blocks:
    """The page of `studio`."""
    with gr.Blocks(title="Studio", analytics_enabled=False, fill_width=False) as page:
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
