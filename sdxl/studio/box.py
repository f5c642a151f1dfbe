"""How people choose a part of a picture: by painting over it, or without a mouse by four sliders for a box.

Knows components; does not know what becomes of the part.
"""

import gradio as gr

_MARGIN = 10
"""Percent of the picture around the box that the sliders begin with."""


def painted(label: str, height: int) -> gr.ImageEditor:
    """A picture to paint over, `height` CSS pixels high."""
    return gr.ImageEditor(
        label=label,
        type="pil",
        sources=(),
        transforms=(),
        format="png",  # webp would lose detail
        layers=False,
        brush=gr.Brush(colors=["#ff7828"], color_mode="fixed", default_size=24),
        height=height,
    )


class Box:
    """The sliders, and the button that uses them. Percent of the picture's width and height."""

    def __init__(self, use: str, name: str) -> None:
        """use: what the button says. name: of its element."""
        with gr.Accordion("Without a mouse", open=False, elem_id=f"{name}-box"):
            with gr.Row():
                left = _slider("Left edge of the box", _MARGIN, f"{name}-left")
                right = _slider("Right edge of the box", 100 - _MARGIN, f"{name}-right")
            with gr.Row():
                top = _slider("Upper edge of the box", _MARGIN, f"{name}-top")
                bottom = _slider("Lower edge of the box", 100 - _MARGIN, f"{name}-bottom")
            self.use = gr.Button(use, size="md", elem_id=f"{name}-use-box")
        self.edges = [left, top, right, bottom]


def _slider(label: str, value: int, name: str) -> gr.Slider:
    return gr.Slider(0, 100, value=value, step=1, label=label, min_width=160, elem_id=name)
