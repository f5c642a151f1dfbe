"""The models that help to prepare pictures, loaded one at a time and given back before anything else is loaded."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import SafetensorError

from sdxl.errors import WeightsError
from sdxl.files.hub import Helper, helper_folder


@contextlib.contextmanager
def loaded(helper: Helper, model_class: Any) -> Iterator[Any]:
    """The model of `helper`, frozen, on the first CUDA device or the CPU, in fp32; its memory is freed afterwards.

    Raises:
        DownloadError: the model cannot be fetched.
        WeightsError: its files are damaged or of another kind.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = part_of(helper, model_class.from_pretrained, use_safetensors=True, dtype=torch.float32)
    try:
        yield model.eval().requires_grad_(False).to(device)
    finally:
        model.to("meta")  # whoever still holds the model holds no memory
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def part_of(helper: Helper, load: Callable[..., Any], **options: Any) -> Any:
    """What `load` reads from the folder of `helper`: its model, tokenizer or processor.

    Raises:
        DownloadError: the model cannot be fetched.
        WeightsError: its files are missing, damaged or of another kind.
    """
    folder = helper_folder(helper)
    try:
        return load(folder, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise WeightsError(
            f"{helper.purpose} in {folder} cannot be loaded ({type(error).__name__}): fetch it again, or name another "
            f"in {helper.setting}."
        ) from error
