"""Find out which pictures are masks, and of which picture.

Knows how people name masks; does not know what is in the files.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from sdxl.data.picture_names import PictureNames
from sdxl.errors import DatasetError

_CERTAIN = ".mask"
"""A picture whose stem ends with this is a mask."""
_POSSIBLE = ("_mask", "-mask", "-masklabel")
"""A picture whose stem ends with one of these is a mask if there is a picture without that ending beside it."""
_FOLDERS = {"mask", "masks"}


def find_masks(pictures: Sequence[Path], root: Path) -> dict[Path, Path]:
    """Picture → its mask, for pictures with a mask.

    The mask of a.jpg is beside it and is called a.mask.png, a.jpg.mask.png, a_mask.png, a-mask.png or a-masklabel.png, or
    it is a.png in a folder masks or further down. If several folders hold an a.jpg, the folders' names tell which one is
    meant. The mask of 0.src.png may be called 0.mask.png. Any image format will do.

    Raises:
        DatasetError: a mask without picture, or a picture with several masks.
    """
    certain = {path for path in pictures if path.stem.lower().endswith(_CERTAIN)}
    in_folder = {path for path in pictures if _in_folder_of_masks(path.relative_to(root))} - certain
    names = PictureNames([path for path in pictures if path not in certain | in_folder], root)

    same_name = {mask: names.beside(mask) or names.named(mask.stem, root) for mask in in_folder}
    if not any(same_name.values()):  # the folder holds pictures of masks
        in_folder, same_name = set(), {}
        names = PictureNames([path for path in pictures if path not in certain], root)

    owners = {mask: _owners(mask, _CERTAIN, names) for mask in certain}
    owners |= {mask: _in_same_folder(mask, found) for mask, found in same_name.items()}
    owners |= dict(_possible(set(pictures) - certain - in_folder, names))

    masks: dict[Path, Path] = {}
    for mask in sorted(owners):
        if not owners[mask]:
            raise DatasetError(
                f"{mask.relative_to(root)} is the mask of no picture: put it beside its picture, such as a.mask.png beside a.jpg."
            )
        for picture in owners[mask]:
            if picture in masks:
                raise DatasetError(f"{picture.relative_to(root)} has several masks: keep one.")
            masks[picture] = mask
    return masks


def _in_folder_of_masks(path: Path) -> bool:
    return any(folder.lower() in _FOLDERS for folder in path.parts[:-1])


def _in_same_folder(mask: Path, found: list[Path]) -> list[Path]:
    """Of several pictures of one name in several folders, those whose folder is called like the mask's."""
    if len({picture.parent for picture in found}) < 2:
        return found
    return [picture for picture in found if picture.parent.name == mask.parent.name]


def _owners(mask: Path, ending: str, names: PictureNames) -> list[Path]:
    """The pictures whose mask has the name of `mask`, which ends with `ending`."""
    stem = mask.stem[: -len(ending)]
    return names.beside(mask.with_name(f"{stem}.png")) or names.beside(mask.with_name(f"{stem}.src.png"))


def _possible(pictures: set[Path], names: PictureNames) -> Iterator[tuple[Path, list[Path]]]:
    """The pictures with a `_POSSIBLE` ending, with the pictures beside them whose masks they are."""
    for path in pictures:
        for ending in _POSSIBLE:
            if path.stem.lower().endswith(ending):
                beside = [owner for owner in _owners(path, ending, names) if owner.parent == path.parent]
                if beside:
                    yield path, beside
