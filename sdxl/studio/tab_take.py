"""Step 4 of the page: take the fine-tune away.

Knows components and events; does not know forms of files.
"""

from pathlib import Path
from typing import Any

import gradio as gr

from sdxl.errors import UserInputError
from sdxl.studio import taking, views
from sdxl.studio.files import address_of
from sdxl.studio.shared import PRIVATE, Studio, told
from sdxl.studio.trainings import Training


def take_tab(studio: Studio, key: gr.Textbox) -> dict[str, Any]:
    """Build the tab; return `outputs` and `shown`, which fill it for a project."""
    gr.Markdown("## Take it away")
    training = gr.Dropdown(label="Which training?", choices=[])
    links = gr.HTML(elem_id="links")
    gr.Markdown("### For another program")
    form = gr.Radio(list(taking.FORMS), value=next(iter(taking.FORMS)), label="Which program?")
    make = gr.Button("Make the file", size="lg", elem_id="make")
    made = gr.HTML(elem_id="made")
    with gr.Accordion("Put it on the Hugging Face hub", open=False):
        repository = gr.Textbox(label="Where", placeholder="your-name/my-dog")
        token = gr.Textbox(
            label="Your access token with the right to write",
            info="It is kept nowhere. Empty: the one that this computer is signed in with.",
            type="password",
        )
        public = gr.Checkbox(label="Everybody may see it")
        push = gr.Button("Put it there")
        pushed = gr.HTML()

    def shown(project: str) -> list[Any]:
        found = studio.project(project)
        choices = [(name, Path(path).parent.name) for name, path in studio.finished(found)]
        newest = choices[0][1] if choices else None
        return [gr.update(choices=choices, value=newest), show_links(project, newest), ""]

    def show_links(project: str, number: str | None) -> str:
        found = studio.project(project)
        for one in studio.results(found):
            if str(one.number) == number:
                size = one.result.stat().st_size / 1e6
                fine_tune = f"The fine-tune: {one.result.name} ({size:.0f} MB)"
                files = {fine_tune: one.result, "The report: how it went": one.report}
                there = {text: address_of(found, path) for text, path in files.items() if path.is_file()}
                return views.links(there, class_="links big")
        return views.sentences(["Nothing is trained yet. When it is, it can be taken away here."], class_="soft")

    def wanted(project: str, number: str | None) -> Training:
        for one in studio.results(studio.project(project)):
            if str(one.number) == number:
                return one
        raise UserInputError("Nothing is trained yet: train first.")

    @told
    def export(project: str, number: str | None, program: str) -> str:
        file = taking.file_for(wanted(project, number), taking.FORMS[program])
        return views.links({f"Download {file.name}": address_of(studio.project(project), file)}, class_="links big")

    @told
    def upload(project: str, number: str | None, where: str, secret: str, everybody: bool) -> list[str]:
        said = taking.push(wanted(project, number), where, secret, public=everybody)
        return [views.sentences([said], class_="soft"), ""]

    training.input(show_links, [key, training], links, api_visibility=PRIVATE)
    make.click(export, [key, training, form], made, api_visibility=PRIVATE, concurrency_id="export")
    push.click(upload, [key, training, repository, token, public], [pushed, token], api_visibility=PRIVATE)
    return {"outputs": [training, links, made], "shown": shown}
