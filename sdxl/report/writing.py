"""Write the report of a training.

Knows the order of its parts; does not know how a part is made.
"""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl.data.dataset_folder import read_dataset_folder
from sdxl.files.archives import atomic_path
from sdxl.history import History
from sdxl.report.asked import asked as settings_section
from sdxl.report.curves import curves
from sdxl.report.markup import Html, facts, section, tag
from sdxl.report.overview import navigation, overview, title
from sdxl.report.page import page
from sdxl.report.previews import previews
from sdxl.report.told import Told
from sdxl.report.training_pictures import training_pictures
from sdxl.report.usage import usage
from sdxl.workspace import REPORT


def write_report(
    folder: Path,
    *,
    history: History,
    record: Mapping[str, Any],
    dataset_folder: Path,
    advice: Sequence[str] = (),
    asked: Mapping[str, Any] | None = None,
    described: Mapping[str, str] | None = None,
) -> Path:
    """Write `REPORT` into `folder`, which holds the result of a training, and return its path.

    Parts for which there is nothing are left out. The file has less than 10 MB, however many pictures there are.

    folder: the previews of `history` and the folder `web_ui` are in it.
    record: the record of the run, as `training.json` has it.
    dataset_folder: the prepared pictures.
    advice: sentences on the pictures.
    asked: the inputs that were given, by name.
    described: what an input means, by name.

    Raises:
        DatasetError, ContractError: the dataset folder is damaged.
        OSError: the disk refuses to write.
    """
    told = Told(
        folder=folder,
        history=history,
        record=record,
        pictures=read_dataset_folder(dataset_folder),
        advice=advice,
        asked=asked or {},
        described=described or {},
    )
    parts = {
        "previews": ("Previews", previews(told)),
        "use": ("How to use it", usage(told)),
        "curves": ("Curves", curves(told)),
        "pictures": ("Pictures", training_pictures(told)),
        "settings": ("Settings", settings_section(told)),
        "versions": ("Versions", _versions(told)),
    }
    there = {name: part for name, part in parts.items() if part[1]}
    header = overview(told)
    links = navigation({name: link for name, (link, _) in there.items()})
    text = page(title(told), [Html(header + links), *(part for _, part in there.values())])
    with atomic_path(folder / REPORT) as partial:
        partial.write_text(text, encoding="utf-8")
    return folder / REPORT


def _versions(told: Told) -> Html:
    """What it takes to repeat the run."""
    versions = told.record.get("versions", {})
    digests = {
        "Pictures, SHA-256": str(told.record.get("dataset_sha256", "")),
        "Base, SHA-256": str(told.record.get("base_sha256", "")),
        "Written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return section(
        "versions",
        "Versions",
        facts({name: str(version) for name, version in versions.items()}),
        tag("div", facts(digests), class_="digests"),
        tag("p", "training.json has all of this, and history.json all numbers of the curves.", class_="note"),
    )
