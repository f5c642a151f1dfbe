"""What a person does to one picture: moves its crop, paints its mask.

The mask is kept for the whole picture, so that it moves with the crop. Knows pixels of a picture set; does not know the page.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops

from sdxl.data.dataset_folder import large_file, mask_file
from sdxl.data.framing import Framing, cut
from sdxl.data.large_pictures import write_large
from sdxl.data.picture_reader import read_image
from sdxl.errors import UserInputError
from sdxl.files.archives import atomic_path
from sdxl.studio.picture_set import Picture, PictureSet


def room(picture: Picture) -> tuple[int, int]:
    """By how many pixels of the resized picture the crop can move (down, across); 0 where it fits exactly."""
    covered = picture.framing.covered_size
    height, width = (long - short for long, short in zip(covered, picture.target_size, strict=True))
    return (0, 0) if _is_all_there_is(picture) else (height, width)


def _is_all_there_is(picture: Picture) -> bool:
    """Whether the file that came was already cut, as in a saved set."""
    return picture.original.endswith(".src.png")


def move_crop(pictures: PictureSet, key: str, *, down: float, across: float) -> Picture:
    """Cut the picture `key` at another place. down, across: the place as shares of `room`, 0 to 1.

    Raises:
        UserInputError: there is no such picture, or it cannot be read.
    """
    picture = pictures.find(key)
    height, width = room(picture)
    place = (round(height * min(max(down, 0), 1)), round(width * min(max(across, 0), 1)))
    if place == picture.crop_top_left or not (height or width):
        return picture
    whole_mask = _whole_mask(pictures, picture)
    image = read_image(pictures.original(picture), name=picture.name)[0]
    framing = Framing(
        original_size=picture.original_size, crop_top_left=place, target_size=picture.target_size
    )
    prepared = pictures.prepared(picture)
    large_file(prepared).unlink(missing_ok=True)
    _save(cut(image, framing), prepared)
    write_large(image, framing, framing, prepared)
    picture = pictures.change(key, crop_top_left=place)
    if whole_mask is not None:
        _cut_mask(pictures, picture, whole_mask)
    return picture


def paint_mask(pictures: PictureSet, key: str, painted: Image.Image) -> None:
    """Let `painted`, of the prepared picture's size, be its mask: white where it matters. All black: there is no mask any more.

    Raises:
        UserInputError: there is no such picture.
    """
    picture = pictures.find(key)
    if painted.getbbox() is None:
        forget_mask(pictures, picture)
        return
    height, width = picture.target_size
    whole = _whole_mask(pictures, picture) or _black(picture)
    top, left = picture.crop_top_left
    whole.paste(painted.convert("L").resize((width, height)), (left, top))
    _cut_mask(pictures, picture, whole)


def forget_mask(pictures: PictureSet, picture: Picture) -> None:
    """Let all of the picture matter."""
    mask_file(pictures.prepared(picture)).unlink(missing_ok=True)
    pictures.whole_mask_file(picture).unlink(missing_ok=True)


def painted_in(layers: list[Image.Image]) -> Image.Image:
    """What was painted in an editor, in whatever colour: grey, white where any layer has paint."""
    assert layers
    grey = Image.new("L", layers[0].size)
    for layer in layers:
        grey = ImageChops.lighter(grey, layer.convert("RGBA").getchannel("A"))
    return grey


def box(size: tuple[int, int], edges: Sequence[float]) -> Image.Image:
    """A box in a picture of this size, in pixels: grey, white in the box.

    edges: left, top, right and bottom, in percent of the width and the height.

    Raises:
        UserInputError: nothing is in the box.
    """
    grey = Image.new("L", size)
    left, top, right, bottom = (
        round(length * min(max(edge, 0), 100) / 100) for length, edge in zip(size * 2, edges, strict=True)
    )
    if left >= right or top >= bottom:
        raise UserInputError(
            "Nothing is in the box: its right edge must be right of its left one, and its lower edge below its upper one."
        )
    grey.paste(255, (left, top, right, bottom))
    return grey


def _black(picture: Picture) -> Image.Image:
    height, width = picture.framing.covered_size
    return Image.new("L", (width, height))


def _whole_mask(pictures: PictureSet, picture: Picture) -> Image.Image | None:
    """The mask of the whole resized picture; what nobody has seen yet is black. None: there is no mask."""
    mask, whole = pictures.mask(picture), pictures.whole_mask_file(picture)
    if whole.exists():
        with Image.open(whole) as opened:
            return opened.convert("L")
    if mask is None:
        return None
    canvas = _black(picture)
    with Image.open(mask) as opened:
        top, left = picture.crop_top_left
        canvas.paste(opened.convert("L"), (left, top))
    return canvas


def _cut_mask(pictures: PictureSet, picture: Picture, whole: Image.Image) -> None:
    """Write the mask of the crop, and keep the whole one. A crop that shows nothing of it has no mask."""
    height, width = picture.target_size
    top, left = picture.crop_top_left
    mask = whole.crop((left, top, left + width, top + height))
    _save(whole, pictures.whole_mask_file(picture))
    target = mask_file(pictures.prepared(picture))
    if mask.getbbox() is None:
        target.unlink(missing_ok=True)
    else:
        _save(mask, target)


def _save(image: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all: a card may be drawn meanwhile."""
    with atomic_path(path) as partial:
        image.save(partial, "PNG")
