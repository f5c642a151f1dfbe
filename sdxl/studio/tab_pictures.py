"""Step 1 of the page: pictures and captions.

Knows components and events; does not know how a picture is prepared.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from sdxl.data.caption_text import tokens_in
from sdxl.errors import UserInputError
from sdxl.report.markup import printable
from sdxl.report.overview import counted
from sdxl.studio import drops, helpers, views
from sdxl.studio.editor import Editor
from sdxl.studio.picture_set import PictureSet
from sdxl.studio.projects import KINDS, About
from sdxl.studio.shared import PRIVATE, Studio, told


class PicturesTab:
    """The components of the step, and what they do."""

    def __init__(self, studio: Studio, key: gr.Textbox) -> None:
        self._studio, self._key = studio, key
        self.version = gr.State(0)
        """Its change draws the cards anew."""
        gr.Markdown("## Show it what to learn\n5 to 20 sharp pictures, in different places, poses and light.")
        with gr.Row():
            self.name = gr.Textbox(label="What is it called?", placeholder="Rex", max_length=60)
            self.kind = gr.Dropdown(
                label="What is it?",
                info="One common word. It helps the training.",
                choices=list(KINDS),
                allow_custom_value=True,
                value=None,
            )
        self.word = gr.HTML()
        self.drop = gr.File(
            label="Drop pictures here, or a zip or tar of pictures",
            file_count="multiple",
            height=150,
            elem_id="drop",
        )
        with gr.Row():
            self.folder = gr.UploadButton("Add a whole folder", file_count="directory", size="md")
            self.paths = gr.Textbox(visible="hidden", label="Paths in the folder")
            self.put_word = gr.Button("Put the word into every caption", size="md", elem_id="put-word")
            self.save = gr.DownloadButton("Save this set", size="md", elem_id="save")
        self._helpers()
        self.notes = gr.HTML(elem_id="notes", html_template="<div role='status'>${value}</div>")
        self.outputs = [self.word, self.notes, self.version]
        self.editor = Editor(studio, key, self.version)
        gr.render(inputs=[key, self.version], triggers=[self.version.change], show_progress="hidden")(
            self.cards
        )
        self._connect()

    def _helpers(self) -> None:
        with gr.Accordion("Let a model help", open=False):
            gr.Markdown("The first time, the model is downloaded from the Hugging Face hub (up to 2 GB).")
            with gr.Row():
                self.describe = gr.Button("Describe all pictures")
                self.faces = gr.Button("Mask everything but faces")
            with gr.Row():
                self.target = gr.Textbox(label="What matters in the pictures", placeholder="a dog", scale=3)
                self.mask = gr.Button("Find it and mask the rest", scale=1)

    def _connect(self) -> None:
        asks, key, version = [self._key, self.version], self._key, self.version
        for event in (self.name.blur, self.name.submit, self.kind.change):
            told_inputs = [key, self.name, self.kind, version]
            event(
                self.tell,
                told_inputs,
                self.outputs,
                api_visibility=PRIVATE,
                show_progress="hidden",
                trigger_mode="always_last",
                concurrency_id="tell",
                concurrency_limit=1,
            )
        for source, names in ((self.drop, "'[]'"), (self.folder, "studio.pathsInFolder()")):
            added = source.upload(
                self.add,
                [key, source, self.paths, version],
                [source, self.name, *self.outputs],
                js=f"(key, files, _, version) => [key, files, {names}, version]",
                api_visibility=PRIVATE,
            )
            # Otherwise wrong files would come again with the next ones.
            added.failure(lambda: None, None, source, api_visibility=PRIVATE, show_progress="hidden")
        self.put_word.click(self.insert, asks, self.outputs, api_visibility=PRIVATE)
        self.save.click(self.pack, key, self.save, api_visibility=PRIVATE)
        for button, ask, inputs in (
            (self.describe, self.let_describe, asks),
            (self.mask, self.let_mask, [*asks, self.target]),
            (self.faces, self.mask_faces, asks),
        ):
            button.click(ask, inputs, self.outputs, api_visibility=PRIVATE, concurrency_id="models")

    def shown(self, key: str, number: int, done: str = "") -> list[Any]:
        """The project's word, what is to be said about its pictures, and the next version."""
        project = self._studio.project(key)
        called = f"In captions and prompts it is called {project.about.word}."
        said = views.sentences([done] if done else [], class_="soft")
        said += views.sentences(PictureSet(project).problems())
        return [views.sentences([called], class_="soft"), said, number + 1]

    def cards(self, key: str, _: int) -> None:
        """A card for each picture."""
        pictures = PictureSet(self._studio.project(key)) if key else None
        if pictures is None or not pictures.pictures:
            gr.HTML(views.sentences(["No pictures yet."], class_="soft"))
            return
        with gr.Row(elem_classes="cards"):
            for picture in pictures.pictures:
                self._card(pictures, picture.key)

    def _card(self, pictures: PictureSet, picture_key: str) -> None:
        """One picture with its caption."""
        picture = pictures.find(picture_key)
        quiet: dict[str, Any] = {
            "api_visibility": PRIVATE,
            "show_progress": "hidden",
            "trigger_mode": "always_last",
        }
        with gr.Column(elem_classes="card", min_width=220):
            shown = gr.HTML(views.card(pictures, picture))
            # `interactive` is named, because Gradio otherwise exchanges a field with a value at the first key.
            caption = gr.Textbox(
                picture.caption,
                label=printable(f"Caption of {picture.name}"),
                lines=2,
                max_length=2000,
                interactive=True,
            )
            under = gr.HTML(views.under_card(picture, pictures.project.about.word))
            with gr.Row():
                used = gr.Checkbox(picture.used, label="Learn it", min_width=90, interactive=True)
                edit = gr.Button(
                    "Crop and mask",
                    size="sm",
                    min_width=110,
                    elem_id=f"edit-{picture_key}",
                    elem_classes="edit",
                )

        @told
        def write(key: str, text: str) -> list[Any]:
            found = PictureSet(self._studio.project(key))
            changed = found.change(picture_key, caption=text)
            return [views.under_card(changed, found.project.about.word), views.sentences(found.problems())]

        @told
        def use(key: str, wanted: bool) -> list[Any]:
            found = PictureSet(self._studio.project(key))
            return [
                views.card(found, found.change(picture_key, used=wanted)),
                views.sentences(found.problems()),
            ]

        # Not `input` or `blur`: with them Gradio sends what was there before the last key.
        caption.change(write, [self._key, caption], [under, self.notes], **quiet)
        used.change(use, [self._key, used], [shown, self.notes], **quiet)
        self.editor.opens_with(edit, picture_key)

    @told
    def tell(self, key: str, name: str | None, kind: str | None, number: int) -> list[Any]:
        """Keep the name and the kind; a new name's word replaces the old one in the captions."""
        project = self._studio.project(key)
        before = project.about.word
        project.tell(About(name=name or "", kind=kind or ""))
        if project.about.word == before:
            return [gr.skip()] * len(
                self.outputs
            )  # the cards stay, and with them the place where somebody writes
        if PictureSet(project).pictures:
            PictureSet(project).insert_word(instead_of=before)
        return self.shown(key, number)

    @told
    def add(self, key: str, files: list[str] | None, paths: str, number: int) -> list[Any]:
        """Add what was dropped. A set that names its subject names a new project too.

        paths: those of the files in their folder, as JSON.
        """
        project = self._studio.project(key)
        pictures = PictureSet(project)
        is_new = not pictures.pictures
        count = drops.add(pictures, [Path(file) for file in files or []], names=_texts(paths))
        tokens = tokens_in(" ".join(one.caption for one in pictures.pictures))
        if is_new and not project.about.name and tokens and tokens[0] != project.about.word:
            project.tell(replace(project.about, name=tokens[0]))
        return [None, project.about.name, *self.shown(key, number, f"{counted(count, 'picture')} added.")]

    @told
    def insert(self, key: str, number: int) -> list[Any]:
        """Put the word into every caption."""
        count = PictureSet(self._studio.project(key)).insert_word()
        return self.shown(key, number, f"{counted(count, 'caption')} changed.")

    @told
    def let_describe(self, key: str, number: int) -> list[Any]:
        """Let a model write the captions."""
        count = helpers.describe(PictureSet(self._studio.project(key)))
        return self.shown(key, number, f"{counted(count, 'picture')} described.")

    @told
    def let_mask(self, key: str, number: int, words: str) -> list[Any]:
        """Let a model mask all but what the words name."""
        if not words.strip():
            raise UserInputError("Write what matters in the pictures, such as “a dog”.")
        count = helpers.find_masks(PictureSet(self._studio.project(key)), words)
        return self.shown(key, number, f"{counted(count, 'picture')} masked.")

    @told
    def mask_faces(self, key: str, number: int) -> list[Any]:
        """Mask all but faces."""
        count = helpers.find_masks(PictureSet(self._studio.project(key)), "", faces=True)
        return self.shown(key, number, f"{counted(count, 'picture')} masked.")

    @told
    def pack(self, key: str) -> str:
        """The archive that `train` takes, to keep."""
        project = self._studio.project(key)
        return str(PictureSet(project).pack(project.folder / f"{project.about.word}-pictures.tar"))


def _texts(listed: str) -> list[str]:
    """The texts in a JSON list; none if it is anything else, since anyone may write into the page."""
    try:
        found = json.loads(listed)
    except ValueError:
        return []
    return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else []
