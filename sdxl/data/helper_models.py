"""Load the helper models that look at pictures, and free their memory.

Knows folders of models and devices; does not know what the models do.
"""

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
    """The model of `helper`, frozen, in fp32, on the first CUDA device or the CPU; freed at the end of the block.

    Raises:
        DownloadError: the model cannot be fetched.
        WeightsError: its files are damaged, or belong to another kind of model.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_frozen(helper, model_class)
    try:
        yield model.to(device)
    finally:
        model.to("meta")  # frees the memory even if somebody still holds the model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def load_frozen(helper: Helper, model_class: Any) -> Any:
    """The model of `helper`, frozen, in fp32, on the CPU.

    Raises:
        DownloadError, WeightsError: as `loaded`.
    """
    load = model_class.from_pretrained
    return load_part(helper, load, use_safetensors=True, dtype=torch.float32).eval().requires_grad_(False)


@contextlib.contextmanager
def lent(part: Any, device: torch.device) -> Iterator[None]:
    """While the context lasts, the frozen model `part` is on `device`."""
    before, own = part.device, [(weight, weight.data) for weight in part.parameters()]
    part.to(device)
    try:
        yield
    finally:
        for weight, data in own:  # nothing has changed them: the old tensors save a copy
            weight.data = data
        part.to(before)  # the buffers


def load_part(helper: Helper, load: Callable[..., Any], **options: Any) -> Any:
    """Load the model, tokenizer or processor of `helper` from its folder with the function `load`.

    Raises:
        DownloadError: the model cannot be fetched.
        WeightsError: its files are missing or damaged, or belong to another kind of model.
    """
    folder = helper_folder(helper)
    try:
        return load(folder, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise WeightsError(
            f"{helper.purpose} in {folder} cannot be loaded ({type(error).__name__}): fetch it again, or name another "
            f"in {helper.setting}."
        ) from error
