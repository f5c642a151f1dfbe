"""The place in step 1 where one picture's crop is moved and its mask painted.

Knows components and events; does not know pixels.
"""

from typing import Any

import gradio as gr
from PIL import Image

from sdxl.errors import UserInputError
from sdxl.studio import crops, views
from sdxl.studio.box import Box, painted
from sdxl.studio.picture_set import Picture, PictureSet
from sdxl.studio.shared import PRIVATE, Studio, told


class Editor:
    """The components, and what they do."""

    def __init__(self, studio: Studio, key: gr.Textbox, version: gr.State) -> None:
        """version: its change draws the cards anew."""
        self._studio, self._key, self._version = studio, key, version
        self.picture = gr.State("")
        with gr.Group(visible=False, elem_id="editor") as self.group:
            self.title = gr.HTML()
            self.across = gr.Slider(
                0, 100, label="Move the crop from left to right", step=1, elem_id="across"
            )
            self.down = gr.Slider(0, 100, label="Move the crop from top to bottom", step=1, elem_id="down")
            self.paint = painted("Mask", 460)
            self.box = Box("Let only this box matter", "mask")
            self.done = gr.HTML(elem_id="kept", html_template="<div role='status'>${value}</div>")
            with gr.Row():
                keep = gr.Button("Keep this mask", variant="primary", elem_id="keep-mask")
                clear = gr.Button("No mask")
                close = gr.Button("Close", elem_id="close-editor")
        self._fills = [self.group, self.title, self.across, self.down, self.paint, self.done]
        moves = [key, self.picture, self.across, self.down, version]
        for slider in (self.across, self.down):
            slider.release(
                self.move, moves, [self.paint, version], trigger_mode="always_last", api_visibility=PRIVATE
            )
        for button, change, of, changed in (
            (keep, self.keep, [self.paint], [self.done]),
            (clear, self.clear, [], self._fills),
            (self.box.use, self.keep_box, self.box.edges, self._fills),
        ):
            button.click(
                change, [key, version, self.picture, *of], [*changed, version], api_visibility=PRIVATE
            )
        # Hidden rather than removed: Gradio still asks a removed editor for what is painted.
        close.click(lambda: gr.update(visible="hidden"), None, self.group, api_visibility=PRIVATE).then(
            None, js="() => studio.leave()"
        )

    def opens_with(self, button: gr.Button, picture: str) -> None:
        """Let `button` open the editor with this picture."""

        @told
        def show(key: str) -> list[Any]:
            return [picture, *_filled(PictureSet(self._studio.project(key)), picture), ""]

        button.click(show, self._key, [self.picture, *self._fills], api_visibility=PRIVATE).then(
            None, js="() => studio.edit()"
        )

    @told
    def move(self, key: str, picture: str, across: float, down: float, number: int) -> list[Any]:
        """Move the crop. across, down: percent of the way."""
        pictures = PictureSet(self._studio.project(key))
        crops.move_crop(pictures, picture, down=down / 100, across=across / 100)
        return [_paint(pictures, pictures.find(picture)), number + 1]

    @told
    def keep(self, key: str, number: int, picture: str, painted: dict[str, Any] | None) -> list[Any]:
        """Keep what is painted as the mask."""
        layers: list[Image.Image] = (painted or {}).get("layers") or []
        if not layers:
            raise UserInputError("Nothing is painted yet: paint over what matters first.")
        pictures = PictureSet(self._studio.project(key))
        crops.paint_mask(pictures, picture, crops.painted_in(layers))
        return [_said(pictures, picture), number + 1]

    @told
    def keep_box(self, key: str, number: int, picture: str, *edges: float) -> list[Any]:
        """Let a box be the mask."""
        pictures = PictureSet(self._studio.project(key))
        height, width = pictures.find(picture).target_size
        crops.paint_mask(pictures, picture, crops.box((width, height), edges))
        return [*_filled(pictures, picture), _said(pictures, picture), number + 1]

    @told
    def clear(self, key: str, number: int, picture: str) -> list[Any]:
        """Forget the mask."""
        pictures = PictureSet(self._studio.project(key))
        crops.forget_mask(pictures, pictures.find(picture))
        return [*_filled(pictures, picture), _said(pictures, picture), number + 1]


def _filled(pictures: PictureSet, key: str) -> list[Any]:
    """The editor with the picture `key` in it."""
    picture = pictures.find(key)
    height, width = crops.room(picture)
    top, left = picture.crop_top_left
    said = ["Paint over what matters. If nothing is painted, all of it matters."]
    if not (height or width):
        said.append("There is nothing to move: the crop shows the whole picture.")
    title = views.sentences([f"Crop and mask of {picture.name}"], class_="title")
    return [
        gr.update(visible=True),
        title + views.sentences(said, class_="soft"),
        gr.update(value=round(100 * left / width) if width else 0, visible=bool(width)),
        gr.update(value=round(100 * top / height) if height else 0, visible=bool(height)),
        _paint(pictures, picture),
    ]


def _paint(pictures: PictureSet, picture: Picture) -> Any:
    """What is painted: the crop, and its mask."""
    layers: list[Image.Image] = []
    if mask := pictures.mask(picture):
        with Image.open(mask) as opened:
            layers.append(views.painted(opened))
    shown = {"background": str(pictures.prepared(picture)), "layers": layers, "composite": None}
    return gr.update(value=shown, canvas_size=picture.target_size[::-1])


def _said(pictures: PictureSet, key: str) -> str:
    """What counts now, for people who do not see the card."""
    if pictures.mask(pictures.find(key)):
        said = "The mask is kept. What it leaves out is red in the card below."
    else:
        said = "There is no mask: all of the picture matters."
    return views.sentences([said], class_="soft")
