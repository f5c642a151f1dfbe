"""The model card of a fine-tune on the Hugging Face hub: its README.md.

Knows what the hub shows and how other programs use the files; does not upload anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData

from sdxl.files.sources import HUB_NAME
from sdxl.model.export_forms import DIFFUSERS_LORA
from sdxl.model.fine_tune_files import DIFFERENCE, EMBEDDINGS, LORA, UNET
from sdxl.model.web_ui_metadata import About
from sdxl.settings import SDXL

_SHOWN = (
    "max_train_steps",
    "train_batch_size",
    "resolution",
    "lora_rank",
    "lora_targets",
    "unet_learning_rate",
    "lora_lr",
)
_OF_LORA, _OF_FULL = ("lora_rank", "lora_targets", "lora_lr"), ("unet_learning_rate",)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt, and a picture of it if there is one."""

    prompt: str
    picture: str | None = None
    """The picture's path in the repository."""


def model_card(
    files: Sequence[str], about: About, repository: str, samples: Sequence[Sample], lost: Sequence[str]
) -> str:
    """The text of README.md.

    files: paths of the repository's files.
    repository: its name on the hub.
    lost: a sentence for each thing that the export lost.
    """
    is_lora = not any(file in (UNET, DIFFERENCE) or file.endswith("checkpoint.safetensors") for file in files)
    header = ModelCardData(
        base_model=_hub_base(about),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license="openrail++",
        instance_prompt=", ".join(about.words) or None,
        tags=["text-to-image", "stable-diffusion-xl", "diffusers", "dreambooth", "textual-inversion"]
        + (["lora", "template:sd-lora"] if is_lora else []),
        widget=[
            {"text": sample.prompt, **({"output": {"url": sample.picture}} if sample.picture else {})}
            for sample in samples
        ]
        or None,
        ignore_metadata_errors=True,
    ).to_yaml()
    kind = "LoRA" if is_lora else "fine-tune"
    parts = [
        f"---\n{header}\n---",
        f"# {_plain(about.title)}\n\nA {kind} of {_plain(about.base)}.",
        "<Gallery />" if any(sample.picture for sample in samples) else "",
        _words(about),
        _usage(files, about, repository),
        _settings(about, is_lora),
        "\n".join(["## What this form does not hold", "", *(f"- {_plain(line)}" for line in lost)])
        if lost
        else "",
        "## Licence\n\nThe weights are under CreativeML Open RAIL++-M, like those of SDXL 1.0.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _words(about: About) -> str:
    if not about.words:
        return ""
    listed = ", ".join(f"`{_plain(word)}`" for word in about.words)
    return f"## Words\n\nWrite these words in prompts: {listed}."


def _usage(files: Sequence[str], about: About, repository: str) -> str:
    """How to use the files that there are."""
    ways = ["## How to use it"]
    example = f"a photo of {_plain(about.words[0])}" if about.words else "a photo"
    lora = next((file for file in (DIFFUSERS_LORA, LORA) if file in files), None)
    if lora or UNET in files:
        ways.append(
            "With diffusers:\n\n```python\n" + _diffusers_code(lora, files, about, repository) + "\n```"
        )
    if DIFFERENCE in files:
        ways.append(
            f"`{DIFFERENCE}` is the difference of a full fine-tune from its base. The project that trained it reads it as it is. "
            f"For other programs it makes a whole checkpoint:\n\n```bash\npython export.py {repository} --to single_file\n```"
        )
    weights = [file for file in files if file.endswith(("_lora.safetensors", "checkpoint.safetensors"))]
    if weights:
        folder = "loras" if weights[0].endswith("_lora.safetensors") else "checkpoints"
        embeddings = [f"`{file}`" for file in _embeddings(files)]
        ways.append(
            f"In ComfyUI: put `{weights[0]}` into `models/{folder}`"
            + (
                f" and {', '.join(embeddings)} into `models/embeddings`. Write `embedding:NAME` with the name of an embedding's "
                "file for its word."
                if embeddings
                else "."
            )
        )
        a1111 = "models/Lora" if folder == "loras" else "models/Stable-diffusion"
        ways.append(
            f"In AUTOMATIC1111's web UI and Forge: put `{weights[0]}` into `{a1111}`"
            + (
                f" and {', '.join(embeddings)} into `embeddings`. Write the words as they are."
                if embeddings
                else "."
            )
        )
    ways.append(f"An example prompt: `{example}`.")
    return "\n\n".join(ways)


def _embeddings(files: Sequence[str]) -> list[str]:
    others = (UNET, LORA, DIFFERENCE, DIFFUSERS_LORA)
    return [
        file
        for file in files
        if file.endswith(".safetensors")
        and Path(file).name not in others
        and not file.endswith(("_lora.safetensors", "checkpoint.safetensors"))
    ]


def _diffusers_code(lora: str | None, files: Sequence[str], about: About, repository: str) -> str:
    base = _hub_base(about)
    variant = ', variant="fp16"' if base == SDXL else ""
    lines = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "from huggingface_hub import hf_hub_download",
        "from safetensors.torch import load_file",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{base}", dtype=torch.float16{variant}).to("cuda")',
    ]
    if lora:
        lines.append(f'pipe.load_lora_weights("{repository}", weight_name="{lora}")')
    else:
        lines.append(f'pipe.unet.load_state_dict(load_file(hf_hub_download("{repository}", "{UNET}")))')
    if EMBEDDINGS not in files:
        return "\n".join([*lines, f'pipe("a photo of {_plain(about.title)}").images[0].save("picture.png")'])
    return "\n".join(
        [
            *lines,
            f'rows = load_file(hf_hub_download("{repository}", "{EMBEDDINGS}"))',
            'words = [f"<s{index}>" for index in range(len(rows["text_encoders_0"]))]',
            "for number, (encoder, tokenizer) in enumerate(",
            "    [(pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)]",
            "):",
            '    pipe.load_textual_inversion(list(rows[f"text_encoders_{number}"]), words, text_encoder=encoder, tokenizer=tokenizer)',
            "    for module in encoder.modules():  # prompts are pooled at the end of the text, not at a new word",
            '        if hasattr(module, "eos_token_id"):',
            "            module.eos_token_id = tokenizer.eos_token_id",
            "",
            "# special_params.json says which placeholders stand for a word",
            'pipe("a photo of <s0><s1>").images[0].save("picture.png")',
        ]
    )


def _settings(about: About, is_lora: bool) -> str:
    hidden = _OF_FULL if is_lora else _OF_LORA
    rows = [
        f"| {name} | {about.settings[name]} |"
        for name in _SHOWN
        if name in about.settings and name not in hidden
    ]
    return (
        "\n".join(["## Settings of the training", "", "| setting | value |", "|---|---|", *rows])
        if rows
        else ""
    )


def _hub_base(about: About) -> str:
    """The base's name on the hub; SDXL 1.0 for a base in a folder, whose name there nobody knows."""
    return about.base if HUB_NAME.fullmatch(about.base) else SDXL


def _plain(text: str) -> str:
    """Text without what Markdown, code or HTML would take for more than text: words may come from a stranger."""
    return "".join(character for character in text if character not in '`"\\<>[]|\n\r*{}#')
