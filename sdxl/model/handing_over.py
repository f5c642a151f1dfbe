"""Send a training's tar where its owner asked for it: to a signed URL, or to a repository on the Hugging Face hub.

Knows what of a result belongs on the hub; does not know how a result is made.
"""

import logging
import shutil
from pathlib import Path

from dataset_and_utils import TokenMap
from sdxl import settings
from sdxl.errors import UploadError
from sdxl.files.archives import unpack
from sdxl.files.result_upload import Target, upload_file
from sdxl.model.fine_tune_files import LIMITS, TOKENS, WEB_UI, is_left_out, read_record
from sdxl.model.web_ui_metadata import About

log = logging.getLogger(__name__)

_HISTORY = "history.json"
"""The numbers of a training and its captions, which are for people."""


def hand_over(tar: Path, *, upload_url: Target | None, push_to: str | None) -> str | None:
    """Send `tar` to where it is wanted; return its address there, or None if it is wanted nowhere.

    Raises:
        UploadError: it could not be sent. The tar stays, and the message says where.
    """
    try:
        if upload_url is not None:
            upload_file(tar, upload_url)
            return upload_url.address
        return push(tar, push_to) if push_to is not None else None
    except UploadError as error:
        where = "on the server" if settings.behind_server() else f"as {tar}"
        raise UploadError(f"{error} {tar.name} is kept {where}.") from error


def push(tar: Path, repository: str) -> str:
    """Commit the fine-tune in `tar` with a model card to `repository`, new ones private; return its address.

    What is for people stays out: the report has the training pictures, the history their captions.

    Raises:
        UploadError: the hub cannot be reached, or refuses.
    """
    from sdxl.files.hub_upload import upload

    folder = tar.with_name("unpacked-push")  # swept if the run is killed
    try:
        unpack(tar, folder, limits=LIMITS, skip=_stays_here)
        _write_card(folder, repository)
        log.info("Pushing the fine-tune to %s", repository)
        address = upload(folder, repository, private=True)
        log.info("It is there now: %s", address)
        return address
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stays_here(path: Path) -> bool:
    return path.parts[0] == _HISTORY or (is_left_out(path) and path.parts[0] != WEB_UI)


def _write_card(folder: Path, repository: str) -> None:
    from sdxl.model.model_card import model_card

    record = read_record(folder)
    words = TokenMap.read(folder / TOKENS).placeholders
    about = About(words=tuple(words), resolution=record["settings"]["resolution"], record=record)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    (folder / "README.md").write_text(model_card(files, about, repository, [], []), encoding="utf-8")
