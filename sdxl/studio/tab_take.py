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


class TakeTab:
    """The components of the step, and what they do."""

    def __init__(self, studio: Studio, key: gr.Textbox) -> None:
        self._studio = studio
        gr.Markdown("## Take it away")
        self.training = gr.Dropdown(label="Which training?", choices=[])
        self.links = gr.HTML(elem_id="links")
        gr.Markdown("### For another program")
        form = gr.Radio(list(taking.FORMS), value=next(iter(taking.FORMS)), label="Which program?")
        make = gr.Button("Make the file", size="lg", elem_id="make")
        self.made = gr.HTML(elem_id="made")
        with gr.Accordion("Put it on the Hugging Face hub", open=False):
            where = gr.Textbox(label="Where", placeholder="your-name/my-dog")
            token = gr.Textbox(
                label="Your access token with the right to write",
                info="It is kept nowhere. Empty: the one that this computer is signed in with.",
                type="password",
            )
            public = gr.Checkbox(label="Everybody may see it")
            push = gr.Button("Put it there")
            pushed = gr.HTML()
        self.outputs = [self.training, self.links, self.made]
        self.training.change(
            self.files, [key, self.training], self.links, api_visibility=PRIVATE, show_progress="hidden"
        )
        make.click(
            self.export,
            [key, self.training, form],
            self.made,
            api_visibility=PRIVATE,
            concurrency_id="export",
        )
        push.click(
            self.upload, [key, self.training, where, token, public], [pushed, token], api_visibility=PRIVATE
        )

    @told
    def shown(self, key: str) -> list[Any]:
        """The trainings of a project, for the components of `outputs`."""
        finished = self._studio.finished(self._studio.project(key))
        choices = [(name, Path(path).parent.name) for name, path in finished]
        newest = choices[0][1] if choices else None
        return [gr.update(choices=choices, value=newest), self._links(key, newest), ""]

    @told
    def files(self, key: str, number: str | None) -> str:
        """Links to the files of a training."""
        return self._links(key, number)

    def _links(self, key: str, number: str | None) -> str:
        if number is None:
            said = "Nothing is trained yet. When it is, it can be taken away here."
            return views.sentences([said], class_="soft")
        training = self._wanted(key, number)
        size = training.result.stat().st_size / 1e6
        fine_tune = f"The fine-tune: {training.result.name} ({size:.0f} MB)"
        files = {fine_tune: training.result, "The report: how it went": training.report}
        project = self._studio.project(key)
        there = {text: address_of(project, path) for text, path in files.items() if path.is_file()}
        return views.links(there, class_="links big")

    def _wanted(self, key: str, number: str | None) -> Training:
        for one in self._studio.results(self._studio.project(key)):
            if str(one.number) == number:
                return one
        raise UserInputError("Nothing is trained yet: train first.")

    @told
    def export(self, key: str, number: str | None, program: str) -> str:
        """Make the file for another program, and link it."""
        file = taking.file_for(self._wanted(key, number), taking.FORMS[program])
        address = address_of(self._studio.project(key), file)
        return views.links({f"Download {file.name}": address}, class_="links big")

    @told
    def upload(self, key: str, number: str | None, where: str, token: str, public: bool) -> list[str]:
        """Put it on the hub; forget the token."""
        said = taking.push(self._wanted(key, number), where, token, public=public)
        return [views.sentences([said], class_="soft"), ""]
