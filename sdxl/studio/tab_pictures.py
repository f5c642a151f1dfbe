"""Step 1 of the page: pictures, captions, crops and masks.

Knows components and events; does not know how a picture is prepared.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from sdxl.data.caption_text import tokens_in
from sdxl.errors import UserInputError
from sdxl.report.overview import counted
from sdxl.studio import crops, helpers, views
from sdxl.studio.picture_set import PictureSet
from sdxl.studio.projects import KINDS, About
from sdxl.studio.shared import PRIVATE, Studio, told


def pictures_tab(studio: Studio, key: gr.Textbox, version: gr.State) -> dict[str, Any]:
    """Build the tab; return the components that show the project's name and kind.

    key: holds the key of the page's project. version: its change draws the cards anew.
    """
    gr.Markdown("## Show it what to learn\n5 to 20 sharp pictures, in different places, poses and light.")
    with gr.Row():
        name = gr.Textbox(label="What is it called?", placeholder="Rex", max_length=60)
        kind = gr.Dropdown(
            label="What is it?",
            info="One common word. It helps the training.",
            choices=list(KINDS),
            allow_custom_value=True,
            value=None,
        )
    word = gr.HTML()
    drop = gr.File(
        label="Drop pictures here, or a zip or tar of pictures", file_count="multiple", height=150, elem_id="drop"
    )
    with gr.Row():
        folder = gr.UploadButton("Add a whole folder", file_count="directory", size="md")
        put_word = gr.Button("Put the word into every caption", size="md", elem_id="put-word")
        save = gr.DownloadButton("Save this set", size="md")
    with gr.Accordion("Let a model help", open=False):
        gr.Markdown("The first time, the model is downloaded from the Hugging Face hub (up to 2 GB).")
        with gr.Row():
            describe = gr.Button("Describe all pictures")
            faces = gr.Button("Mask everything but faces")
        with gr.Row():
            target = gr.Textbox(label="What matters in the pictures", placeholder="a dog", scale=3)
            mask = gr.Button("Find it and mask the rest", scale=1)
    notes = gr.HTML(elem_id="notes", html_template="<div role='status'>${value}</div>")
    chosen = gr.State("")
    editor = _editor(studio, key, version, chosen)

    @gr.render(inputs=[key, version], triggers=[version.change], show_progress="hidden")
    def cards(project: str, _: int) -> None:
        pictures = PictureSet(studio.project(project)) if project else None
        shown = pictures.pictures if pictures else []
        if pictures is None or not shown:
            gr.HTML(views.sentences(["No pictures yet."], class_="soft"))
            return
        with gr.Row(elem_classes="cards"):
            for picture in shown:
                _card(studio, pictures, picture.key, key, notes, [chosen, *editor])

    outputs = [word, notes, version]

    def shown(project: str, number: int, done: str = "") -> list[Any]:
        about = studio.project(project).about
        problems = PictureSet(studio.project(project)).problems()
        called = f"In captions and prompts it is called {about.word}."
        said = views.sentences([done] if done else [], class_="soft") + views.sentences(problems)
        return [views.sentences([called], class_="soft"), said, number + 1]

    @told
    def tell(project: str, named: str, is_a: str, number: int) -> list[Any]:
        found = studio.project(project)
        before = found.about
        found.tell(About(name=named or "", kind=is_a or ""))
        if found.about.word == before.word:
            return [gr.skip()] * len(outputs)  # the cards stay, and with them the place where somebody writes
        if PictureSet(found).pictures:
            PictureSet(found).insert_word(instead_of=before.word)
        return shown(project, number)

    @told
    def add(project: str, files: list[str] | None, number: int) -> list[Any]:
        found = studio.project(project)
        pictures = PictureSet(found)
        is_new = not pictures.pictures
        count = pictures.add([Path(file) for file in files or []])
        tokens = tokens_in(" ".join(one.caption for one in pictures.pictures))
        if is_new and not found.about.name and tokens and tokens[0] != found.about.word:
            found.tell(replace(found.about, name=tokens[0]))  # a set that names its subject already
        done = f"{counted(count, 'picture')} added."
        return [None, found.about.name, *shown(project, number, done)]

    @told
    def insert(project: str, number: int) -> list[Any]:
        count = PictureSet(studio.project(project)).insert_word()
        return shown(project, number, f"{counted(count, 'caption')} changed.")

    @told
    def let_describe(project: str, number: int) -> list[Any]:
        count = helpers.describe(PictureSet(studio.project(project)))
        return shown(project, number, f"{counted(count, 'picture')} described.")

    @told
    def let_mask(project: str, number: int, words: str) -> list[Any]:
        if not words.strip():
            raise UserInputError("Write what matters in the pictures, such as “a dog”.")
        count = helpers.find_masks(PictureSet(studio.project(project)), words)
        return shown(project, number, f"{counted(count, 'picture')} masked.")

    @told
    def mask_faces(project: str, number: int) -> list[Any]:
        count = helpers.find_masks(PictureSet(studio.project(project)), "", faces=True)
        return shown(project, number, f"{counted(count, 'picture')} masked.")

    @told
    def pack(project: str) -> str:
        found = studio.project(project)
        return str(PictureSet(found).pack(found.folder / f"{found.about.word}-pictures.tar"))

    asks = [key, version]
    for event in (name.blur, name.submit, kind.change):
        event(tell, [key, name, kind, version], outputs, api_visibility=PRIVATE, show_progress="hidden")
    drop.upload(add, [key, drop, version], [drop, name, *outputs], api_visibility=PRIVATE)
    folder.upload(add, [key, folder, version], [folder, name, *outputs], api_visibility=PRIVATE)
    put_word.click(insert, asks, outputs, api_visibility=PRIVATE)
    describe.click(let_describe, asks, outputs, api_visibility=PRIVATE, concurrency_id="models")
    mask.click(let_mask, [*asks, target], outputs, api_visibility=PRIVATE, concurrency_id="models")
    faces.click(mask_faces, asks, outputs, api_visibility=PRIVATE, concurrency_id="models")
    save.click(pack, key, save, api_visibility=PRIVATE)
    return {"name": name, "kind": kind, "outputs": outputs, "shown": shown}


def _card(
    studio: Studio, pictures: PictureSet, picture_key: str, key: gr.Textbox, notes: gr.HTML, opened: list[Any]
) -> None:
    """One picture with its caption. opened: the components of the editor."""
    picture = pictures.find(picture_key)
    word = pictures.project.about.word
    with gr.Column(elem_classes="card", min_width=220):
        shown = gr.HTML(views.card(pictures, picture))
        # `interactive` is named, because Gradio otherwise exchanges a field with a value at the first key.
        caption = gr.Textbox(
            picture.caption, label=f"Caption of {picture.name}", lines=2, max_length=2000, interactive=True
        )
        under = gr.HTML(views.under_card(picture, word))
        with gr.Row():
            used = gr.Checkbox(picture.used, label="Learn it", min_width=90, interactive=True)
            edit = gr.Button("Crop and mask", size="sm", min_width=110)

    @told
    def write(project: str, text: str) -> list[Any]:
        found = PictureSet(studio.project(project))
        changed = found.change(picture_key, caption=text)
        return [views.under_card(changed, found.project.about.word), views.sentences(found.problems())]

    @told
    def use(project: str, wanted: bool) -> list[Any]:
        found = PictureSet(studio.project(project))
        changed = found.change(picture_key, used=wanted)
        return [views.card(found, changed), views.sentences(found.problems())]

    @told
    def open_editor(project: str) -> list[Any]:
        return [picture_key, *_opened(PictureSet(studio.project(project)), picture_key)]

    for event in (caption.blur, caption.submit):
        event(write, [key, caption], [under, notes], api_visibility=PRIVATE, show_progress="hidden")
    used.input(use, [key, used], [shown, notes], api_visibility=PRIVATE, show_progress="hidden")
    edit.click(open_editor, key, opened, api_visibility=PRIVATE).then(
        None, js="() => document.getElementById('editor').scrollIntoView({block: 'start'})"
    )


def _editor(studio: Studio, key: gr.Textbox, version: gr.State, chosen: gr.State) -> list[Any]:
    """The place where one picture's crop is moved and its mask painted; returns what `_opened` fills."""
    with gr.Group(visible=False, elem_id="editor") as group:
        title = gr.HTML()
        across = gr.Slider(0, 100, label="Move the crop from left to right", step=1)
        down = gr.Slider(0, 100, label="Move the crop from top to bottom", step=1)
        paint = gr.ImageEditor(
            label="Mask",
            type="pil",
            sources=(),
            transforms=(),
            layers=False,
            brush=gr.Brush(colors=["#ff7828"], color_mode="fixed", default_size=24),
            height=460,
        )
        with gr.Row():
            keep = gr.Button("Keep this mask", variant="primary")
            clear = gr.Button("No mask")
            close = gr.Button("Close")

    fills = [group, title, across, down, paint]

    @told
    def move(project: str, picture: str, right: float, below: float, number: int) -> list[Any]:
        found = PictureSet(studio.project(project))
        crops.move_crop(found, picture, down=below / 100, across=right / 100)
        return [*_opened(found, picture), number + 1]

    @told
    def keep_mask(project: str, picture: str, painted: dict[str, Any] | None, number: int) -> int:
        layers: list[Image.Image] = (painted or {}).get("layers") or []
        if not layers:
            raise UserInputError("Nothing is painted yet: paint over what matters first.")
        crops.paint_mask(PictureSet(studio.project(project)), picture, crops.painted_in(layers))
        return number + 1

    @told
    def no_mask(project: str, picture: str, number: int) -> list[Any]:
        found = PictureSet(studio.project(project))
        crops.forget_mask(found, found.find(picture))
        return [*_opened(found, picture), number + 1]

    for slider in (across, down):
        slider.release(move, [key, chosen, across, down, version], [*fills, version], api_visibility=PRIVATE)
    keep.click(keep_mask, [key, chosen, paint, version], version, api_visibility=PRIVATE)
    clear.click(no_mask, [key, chosen, version], [*fills, version], api_visibility=PRIVATE)
    close.click(lambda: gr.update(visible=False), None, group, api_visibility=PRIVATE)
    return fills


def _opened(pictures: PictureSet, key: str) -> list[Any]:
    """The editor with the picture `key` in it."""
    picture = pictures.find(key)
    height, width = crops.room(picture)
    top, left = picture.crop_top_left
    mask = pictures.mask(picture)
    file = str(pictures.prepared(picture))
    said = ["Paint over what matters. If nothing is painted, all of it matters."]
    if not (height or width):
        said.append("There is nothing to move: the crop shows the whole picture.")
    return [
        gr.update(visible=True),
        views.sentences([f"Crop and mask of {picture.name}"], class_="title") + views.sentences(said, class_="soft"),
        gr.update(value=round(100 * left / width) if width else 0, visible=bool(width)),
        gr.update(value=round(100 * top / height) if height else 0, visible=bool(height)),
        gr.update(
            value={"background": file, "layers": [views.painted(mask)] if mask else [], "composite": None},
            canvas_size=picture.target_size[::-1],
        ),
    ]
