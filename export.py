"""The export entry point: from fine-tunes in any form to one fine-tune in the form that another program reads.

Knows the command line and the order of the stages; does not know how a stage works.

    python export.py out/trained_model.tar --to kohya -o exported/
    python export.py a.safetensors b.safetensors --scale 0.8 --scale 0.5 --to lora --rank 32 -o exported/
"""

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl import settings
from sdxl.command_line import run_into
from sdxl.errors import UploadError, UserInputError
from sdxl.process import configure_logging, repeat_on_cpu
from sdxl.workspace import RESULT, workspace_of_run

if TYPE_CHECKING:
    from sdxl.model.export_forms import Exported

log = logging.getLogger(__name__)

FORMS = {
    "ours": "trained_model.tar, as a training writes it",
    "diffusers": "pytorch_lora_weights.safetensors and token rows",
    "kohya": "a LoRA for ComfyUI, AUTOMATIC1111, Forge, InvokeAI and kohya's scripts, and embeddings",
    "onetrainer": "the same with the names that OneTrainer reads",
    "single_file": "a whole checkpoint for all of these programs, and embeddings",
    "lora": "trained_model.tar with a LoRA, also from a whole fine-tune",
}
"""Public name of a form → what it is."""
_TARS = ("ours", "lora")
"""Forms that are packed."""


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What a user asked for."""

    sources: tuple[str, ...]
    """Paths, URLs or hub names of fine-tunes."""
    scales: tuple[float, ...]
    """The strength of each."""
    form: str
    """A key of `FORMS`."""
    rank: int | None = None
    """The largest rank of a LoRA; None: what is exact, and 64 for what is not."""
    precision: str = "keep"
    """"keep", "fp16" or "fp32": the numbers of a LoRA's matrices."""
    push: str | None = None
    """Repository on the hub."""
    public: bool = False
    """Whether everybody may see a new repository."""
    samples: tuple[tuple[str, Path | None], ...] = ()
    """Example prompts for the model card, with their pictures."""


def export(request: ExportRequest, output: Path) -> tuple[list[Path], list[str]]:
    """Read, merge and write; return the files in `output`, and a sentence for each thing that was lost.

    The base is the one that `SDXL_BASE` names.

    Raises:
        UserInputError: a fine-tune cannot be read or does not fit the base, or a setting is wrong.
    """
    # Here, after the request is checked: importing these takes seconds.
    from sdxl.files.archives import pack_tar
    from sdxl.files.hub_upload import check_repository, upload
    from sdxl.model import export_forms
    from sdxl.model.bases import find_base
    from sdxl.model.components import default_device
    from sdxl.serving.combining import combine, read_all
    from sdxl.serving.pipeline import load_pipeline
    from sdxl.serving.tuned_pipeline import TunedPipeline

    if request.push:
        check_repository(request.push)
    found = find_base(settings.base_name())
    tuned = TunedPipeline(load_pipeline(found.folder, default_device(), **found.replaced()))
    base = export_forms.LoadedBase(
        folder=found.folder,
        vae=found.vae,
        parameters=tuned.parameters,
        layers=tuned.layers,
        unet_config=tuned.pipeline.unet.config,
    )
    failure = None
    with workspace_of_run("export") as workspace:
        read = read_all(request.sources, request.scales, tuned)
        exported, lost = combine(
            read, base, tuned, form=request.form, rank=request.rank, precision=request.precision
        )
        folder = workspace / "unpacked-form"  # swept if the run is killed
        folder.mkdir()
        lost += export_forms.FORMS[request.form](folder, exported, base)
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        if request.push:
            _write_card(folder, files, request, exported, lost)
            try:
                log.info("Uploading to %s", request.push)
                log.info("Uploaded: %s", upload(folder, request.push, private=not request.public))
            except UploadError as error:
                failure = error
        if request.form in _TARS:
            pack_tar({str(path): folder / path for path in files}, workspace / RESULT)
            delivered = _deliver(workspace, [Path(RESULT)], output)
        else:
            delivered = _deliver(folder, files, output)
        shutil.rmtree(workspace)
    if failure is not None:
        raise UploadError(f"{failure} The files are in {output}.") from failure
    return delivered, lost


# Delivering -----------------------------------------------------------------------------------------------------------


def _write_card(
    folder: Path, files: Sequence[Path], request: ExportRequest, exported: "Exported", lost: Sequence[str]
) -> None:
    """Write README.md and the example pictures into `folder`."""
    from sdxl.model.model_card import Sample, model_card

    samples = []
    for index, (prompt, picture) in enumerate(request.samples):
        name = f"images/{index}{picture.suffix.lower()}" if picture else None
        if picture and name:
            (folder / "images").mkdir(exist_ok=True)
            shutil.copyfile(picture, folder / name)
        samples.append(Sample(prompt=prompt, picture=name))
    names = [path.as_posix() for path in files]
    text = model_card(names, exported.about, request.push or "", samples, lost)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _deliver(folder: Path, files: Sequence[Path], output: Path) -> list[Path]:
    """Move `files` from `folder` to `output`, each atomically."""
    from sdxl.files.archives import atomic_path

    for path in files:
        with atomic_path(output / path) as partial:
            shutil.move(folder / path, partial)
    return [output / path for path in files]


# Command line ---------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python export.py",
        description=(__doc__ or "").splitlines()[0],
        epilog="forms:\n" + "\n".join(f"  {form:12} {what}" for form, what in FORMS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "sources", nargs="+", metavar="FINE_TUNE", help="path, URL or hub name; several are merged"
    )
    made.add_argument("--to", choices=list(FORMS), required=True, dest="form", help="the form to write")
    made.add_argument(
        "--scale",
        type=float,
        action="append",
        default=[],
        help="strength of each fine-tune in turn; default 1",
    )
    made.add_argument("--rank", type=int, help="largest rank of a LoRA; default: what is exact, else 64")
    made.add_argument(
        "--precision", choices=["keep", "fp16", "fp32"], default="keep", help="numbers of a LoRA"
    )
    made.add_argument(
        "--push", metavar="OWNER/NAME", help="also put it on the Hugging Face hub, with a model card"
    )
    made.add_argument("--public", action="store_true", help="let everybody see the new repository")
    made.add_argument(
        "--prompt", action="append", default=[], help="an example prompt for the model card; repeat it"
    )
    made.add_argument(
        "--picture", type=Path, action="append", default=[], help="the picture of each prompt in turn"
    )
    made.add_argument(
        "-o", "--output", type=Path, default=Path(), metavar="DIR", help="folder for the results"
    )
    return made


def request_of(arguments: argparse.Namespace) -> ExportRequest:
    """Check the command line.

    Raises:
        UserInputError: options do not fit together.
    """
    sources, scales = arguments.sources, arguments.scale or [1.0] * len(arguments.sources)
    if len(scales) != len(sources):
        raise UserInputError(
            f"--scale is given {len(scales)} times for {len(sources)} fine-tunes: give it once for each, in their order."
        )
    if any(not abs(scale) <= 10 for scale in scales):  # NaN is not either
        raise UserInputError(f"--scale is {scales}, but must be from -10 to 10.")
    if arguments.rank is not None and not 1 <= arguments.rank <= 1024:
        raise UserInputError(f"--rank is {arguments.rank}, but must be from 1 to 1024.")
    prompts, pictures = arguments.prompt, arguments.picture
    if len(pictures) > len(prompts):
        raise UserInputError("There are more --picture than --prompt: give each picture its prompt.")
    for picture in pictures:
        if not picture.is_file() or picture.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise UserInputError(f"--picture {picture} is no png, jpg or webp file: give another.")
    if (prompts or arguments.public) and not arguments.push:
        raise UserInputError(
            "--prompt, --picture and --public are for the model card: add --push owner/name."
        )
    return ExportRequest(
        sources=tuple(sources),
        scales=tuple(scales),
        form=arguments.form,
        rank=arguments.rank,
        precision=arguments.precision,
        push=arguments.push,
        public=arguments.public,
        samples=tuple((text, pictures[i] if i < len(pictures) else None) for i, text in enumerate(prompts)),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 for a failed export, 2 for wrong options, 130 for Ctrl-C."""
    arguments = parser().parse_args(argv)
    try:
        request = request_of(arguments)
    except UserInputError as error:
        print(f"{error} See --help.", file=sys.stderr)
        return 2
    os.environ.setdefault("SDXL_WORKSPACE", str(arguments.output))

    def work() -> None:
        repeat_on_cpu()
        configure_logging()
        files, lost = export(request, arguments.output)
        for sentence in lost:
            print(f"Lost: {sentence}", file=sys.stderr)
        for path in files:
            print(path)

    return run_into(arguments.output, work)


if __name__ == "__main__":
    sys.exit(main())
