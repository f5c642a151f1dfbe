"""The place in step 1 where one picture's crop is moved and its mask painted.

Knows components and events; does not know pixels.
"""

from typing import Any

import gradio as gr
from PIL import Image

from sdxl.errors import UserInputError
from sdxl.studio import crops, views
from sdxl.studio.picture_set import PictureSet
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
            self.paint = gr.ImageEditor(
                label="Mask",
                type="pil",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(colors=["#ff7828"], color_mode="fixed", default_size=24),
                height=460,
            )
            with gr.Row():
                keep = gr.Button("Keep this mask", variant="primary", elem_id="keep-mask")
                clear = gr.Button("No mask")
                close = gr.Button("Close", elem_id="close-editor")
        self._fills = [self.group, self.title, self.across, self.down, self.paint]
        moves = [key, self.picture, self.across, self.down, version]
        for slider in (self.across, self.down):
            slider.release(
                self.move, moves, [self.paint, version], trigger_mode="always_last", api_visibility=PRIVATE
            )
        keep.click(self.keep, [key, self.picture, self.paint, version], version, api_visibility=PRIVATE)
        clear.click(self.clear, [key, self.picture, version], [*self._fills, version], api_visibility=PRIVATE)
        # Hidden rather than removed: Gradio still asks a removed editor for what is painted.
        close.click(lambda: gr.update(visible="hidden"), None, self.group, api_visibility=PRIVATE).then(
            None, js="() => studio.leave()"
        )

    def opens_with(self, button: gr.Button, picture: str) -> None:
        """Let `button` open the editor with this picture."""

        @told
        def show(key: str) -> list[Any]:
            return [picture, *_filled(PictureSet(self._studio.project(key)), picture)]

        button.click(show, self._key, [self.picture, *self._fills], api_visibility=PRIVATE).then(
            None, js="() => studio.edit()"
        )

    @told
    def move(self, key: str, picture: str, across: float, down: float, number: int) -> list[Any]:
        """Move the crop. across, down: percent of the way."""
        pictures = PictureSet(self._studio.project(key))
        crops.move_crop(pictures, picture, down=down / 100, across=across / 100)
        return [_filled(pictures, picture)[-1], number + 1]

    @told
    def keep(self, key: str, picture: str, painted: dict[str, Any] | None, number: int) -> int:
        """Keep what is painted as the mask."""
        layers: list[Image.Image] = (painted or {}).get("layers") or []
        if not layers:
            raise UserInputError("Nothing is painted yet: paint over what matters first.")
        crops.paint_mask(PictureSet(self._studio.project(key)), picture, crops.painted_in(layers))
        return number + 1

    @told
    def clear(self, key: str, picture: str, number: int) -> list[Any]:
        """Forget the mask."""
        pictures = PictureSet(self._studio.project(key))
        crops.forget_mask(pictures, pictures.find(picture))
        return [*_filled(pictures, picture), number + 1]


def _filled(pictures: PictureSet, key: str) -> list[Any]:
    """The editor with the picture `key` in it."""
    picture = pictures.find(key)
    height, width = crops.room(picture)
    top, left = picture.crop_top_left
    mask = pictures.mask(picture)
    said = ["Paint over what matters. If nothing is painted, all of it matters."]
    if not (height or width):
        said.append("There is nothing to move: the crop shows the whole picture.")
    title = views.sentences([f"Crop and mask of {picture.name}"], class_="title")
    shown = {
        "background": str(pictures.prepared(picture)),
        "layers": [views.painted(mask)] if mask else [],
        "composite": None,
    }
    return [
        gr.update(visible=True),
        title + views.sentences(said, class_="soft"),
        gr.update(value=round(100 * left / width) if width else 0, visible=bool(width)),
        gr.update(value=round(100 * top / height) if height else 0, visible=bool(height)),
        gr.update(value=shown, canvas_size=picture.target_size[::-1]),
    ]
