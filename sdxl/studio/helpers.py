"""What models do for a picture set: describe its pictures, find its subject.

They are the models of `preprocess.py`, which fetches them from the hub when they are first needed. Knows which pictures it is
given and what becomes of the answer; does not know models.
"""

import shutil
import tempfile
from pathlib import Path

from sdxl.data.dataset_folder import PreparedPicture, large_file, mask_file, read_dataset_folder
from sdxl.studio.drops import prepare
from sdxl.studio.picture_set import Picture, PictureSet


def describe(pictures: PictureSet) -> int:
    """Let the captioning model write the captions of all pictures that are used; return how many.

    Raises:
        UserInputError: the entry point says why not.
    """
    used = pictures.used
    about = pictures.project.about
    with tempfile.TemporaryDirectory(prefix="describe-", dir=pictures.folder) as folder:
        found = _asked(pictures, used, Path(folder), caption_text=f"{about.plain_caption},")
        captions = [one.caption for one in found]
    pictures.set_captions({one.key: text for one, text in zip(used, captions, strict=True)})
    return len(used)


def find_masks(pictures: PictureSet, words: str, *, faces: bool = False) -> int:
    """Mask what `words` name, or faces, in all pictures that are used, and cut the pictures around it; return how many.

    Raises:
        UserInputError: the entry point says why not.
    """
    used = pictures.used
    asked = {"use_face_detection_instead": True} if faces else {"mask_target_prompts": words}
    with tempfile.TemporaryDirectory(prefix="masks-", dir=pictures.folder) as folder:
        captions = {one.key: one.caption for one in used}
        found = _asked(pictures, used, Path(folder), captions=captions, **asked)
        for picture, one in zip(used, found, strict=True):
            target = pictures.prepared(picture)
            for old in (mask_file(target), large_file(target), pictures.whole_mask_file(picture)):
                old.unlink(missing_ok=True)
            for new, place in (
                (one.picture, target),
                (one.mask, mask_file(target)),
                (one.large, large_file(target)),
            ):
                if new is not None:
                    shutil.copyfile(new, place)
            pictures.change(
                picture.key,
                original_size=one.framing.original_size,
                crop_top_left=one.framing.crop_top_left,
                target_size=one.framing.target_size,
            )
    return len(used)


def _asked(
    pictures: PictureSet,
    used: list[Picture],
    folder: Path,
    *,
    captions: dict[str, str] | None = None,
    **inputs: object,
) -> list[PreparedPicture]:
    """What `preprocess.py` makes of the pictures, in their order. captions: key → text; None: a model writes them."""
    source = folder / "source"
    source.mkdir()
    for number, picture in enumerate(used):
        original = pictures.original(picture)
        shutil.copyfile(original, source / f"{number}{original.suffix}")
        if captions is not None:
            (source / f"{number}.txt").write_text(captions[picture.key], encoding="utf-8")
    prepare(source, folder, **inputs)
    return read_dataset_folder(folder / "prepared")
