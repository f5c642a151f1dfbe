"""How to use a result: commands with its real words and file names.

Knows the files of a result and the programs that read them; does not know how they were made.
"""

import json
import shlex
from pathlib import Path

from sdxl.files.sources import HUB_NAME
from sdxl.model.fine_tune_files import EMBEDDINGS, LORA, UNET, WEB_UI
from sdxl.model.web_ui_files import file_stems
from sdxl.report.markup import Html, join, section, tag
from sdxl.report.overview import note
from sdxl.report.told import Told
from sdxl.settings import SDXL
from sdxl.workspace import RESULT

_LONGEST_PROMPT = 300


def usage(told: Told) -> Html:
    """The section with commands for this project, diffusers and web UIs."""
    prompt = _prompt(told)
    inputs = f"-i {shlex.quote(f'prompt={prompt}')} -i replicate_weights=@{RESULT}"
    base = "" if told.base == SDXL else f"SDXL_BASE={shlex.quote(told.base)} "
    words = join(_listed([tag("code", word) for word in told.words]))
    return section(
        "use",
        "How to use it",
        tag("p", "Write ", words, " in prompts, as a separate word and in the same case."),
        tag("h3", "With this project"),
        tag("pre", f"{base}python predict.py {inputs} -o pictures/"),
        tag("p", "With Cog:"),
        tag("pre", f"cog predict {inputs}"),
        Html()
        if HUB_NAME.fullmatch(told.base)
        else note(f"For {told.base}, write where the base is on your machine."),
        tag("h3", "With diffusers"),
        *_made_whole(told),
        tag(
            "p",
            "Copy ",
            tag("code", "dataset_and_utils.py"),
            " next to your script, and unpack the tar into ",
            tag("code", "training_out/"),
            ".",
        ),
        tag("pre", _diffusers(told, prompt), class_="program", tabindex=0),
        *_web_uis(told),
    )


def _prompt(told: Told) -> str:
    """A prompt that names a word: one of the previews, or a plain one."""
    shown = (prompt for prompt in told.history.prompts if told.token_map.named_in(prompt))
    return next(
        (prompt for prompt in shown if len(prompt) <= _LONGEST_PROMPT and prompt[0] != "@"),
        f"a photo of {told.words[0]}",
    )


def _made_whole(told: Told) -> list[Html]:
    """What must be done first with a difference, which only this project reads."""
    if told.form != "difference":
        return []
    return [
        tag("p", "First make the difference a whole UNet, in a new tar:"),
        tag("pre", f"SDXL_BASE={shlex.quote(told.base)} python export.py {RESULT} --to ours -o whole/"),
    ]


def _diffusers(told: Told, prompt: str) -> str:
    base, variant = json.dumps(told.base, ensure_ascii=False), ', variant="fp16"' if told.base == SDXL else ""
    one_file = told.base.endswith(".safetensors")
    kind, read = (
        ("StableDiffusionXLPipeline", "from_single_file")
        if one_file
        else ("DiffusionPipeline", "from_pretrained")
    )
    weights = (
        f'pipe.load_lora_weights("training_out", weight_name="{LORA}")'
        if told.form == "lora"
        else f'pipe.unet.load_state_dict(load_file("training_out/{UNET}"), strict=False)'
    )
    lines = [
        "import torch",
        f"from diffusers import {kind}",
        *([] if told.form == "lora" else ["from safetensors.torch import load_file"]),
        "from dataset_and_utils import TokenEmbeddingsHandler",
        "",
        f"pipe = {kind}.{read}({base}, dtype=torch.float16{variant})",
        'pipe = pipe.to("cuda")',
        weights,
        "encoders, tokenizers = [pipe.text_encoder, pipe.text_encoder_2], [pipe.tokenizer, pipe.tokenizer_2]",
        f'TokenEmbeddingsHandler(encoders, tokenizers).load_embeddings("training_out/{EMBEDDINGS}")',
        f'pipe({json.dumps(told.token_map.substitute(prompt), ensure_ascii=False)}).images[0].save("picture.png")',
    ]
    return "\n".join(lines)


def _web_uis(told: Told) -> list[Html]:
    """Where the files of the folder `web_ui` go. Nothing if there is no such folder."""
    folder = told.folder / WEB_UI
    names = sorted(path.name for path in folder.glob("*.safetensors")) if folder.is_dir() else []
    stems = file_stems(told.words)
    embeddings = {word: f"{stem}.safetensors" for word, stem in stems.items()}
    weights = [name for name in names if name not in embeddings.values()]
    there = [name for name in embeddings.values() if name in names]
    if not names:
        return []
    files = [*weights, *there]
    comfy = [*_into(weights, "models/loras" if told.form == "lora" else "models/checkpoints")]
    comfy += _into(there, "models/embeddings")
    a1111 = [*_into(weights, "models/Lora" if told.form == "lora" else "models/Stable-diffusion")]
    a1111 += [] if told.form == "lora" else _into(there, "embeddings")
    written = " ".join(f"embedding:{stem}" for word, stem in stems.items() if embeddings[word] in names)
    in_prompts = " ".join(
        [*(f"<lora:{Path(name).stem}:1>" for name in weights if told.form == "lora"), *told.words]
    )
    return [
        tag("h3", "In web UIs"),
        tag(
            "p", f"The tar's folder {WEB_UI} has ", join(_listed([tag("code", name) for name in files])), "."
        ),
        tag(
            "ul",
            tag("li", tag("strong", "ComfyUI: "), *comfy, "Write ", tag("code", written), "."),
            tag(
                "li",
                tag("strong", "AUTOMATIC1111 and Forge: "),
                *a1111,
                "Write ",
                tag("code", in_prompts),
                ".",
            ),
        ),
    ]


def _into(names: list[str], folder: str) -> list[Html]:
    """A sentence that says where files go."""
    if not names:
        return []
    listed = join(_listed([tag("code", name) for name in names]))
    return [join(["Put ", listed, " into ", tag("code", folder), ". "])]


def _listed(parts: list[Html]) -> list[str]:
    """Parts with commas between them, and the last one after "and"."""
    if len(parts) < 2:
        return [*parts]
    return [*[part for head in parts[:-1] for part in (head, ", ")][:-1], " and ", parts[-1]]
