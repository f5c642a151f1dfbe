"""Dataset folder → cached examples: all work that need not be repeated in every step.

Knows the frozen parts that encode pictures and captions; does not know what trains.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dataset_and_utils import Example, ExampleDataset, TokenMap
from sdxl import settings
from sdxl.data.dataset_folder import read_dataset_folder
from sdxl.model.components import Components, add_placeholder_tokens
from sdxl.model.prompt_chunks import token_ids
from sdxl.speed.compiled_blocks import fuse_blocks
from sdxl.training.caption_fit import require_tokens_fit, tell_of_cuts
from sdxl.training.data_parallel import of_all, shared_out
from sdxl.training.random_views import View, views_of

T = TypeVar("T")

PIXELS_AT_ONCE = 1024 * 1024
"""Most pixels in one batch of the autoencoder, so that its activations fit in memory together with the model."""


@torch.no_grad()
def cache_examples(
    folder: Path,
    components: Components,
    token_map: TokenMap,
    *,
    seed: int,
    views: int = 0,
    flip: bool = False,
    leave_out: Collection[int] = (),
) -> ExampleDataset:
    """Encode the pictures and captions of a dataset folder. Adds the map's placeholder tokens to the tokenizers.

    The ids of all captions get the length of the longest, so that any of them can share a batch. Each picture becomes one sample of the autoencoder's posterior, multiplied by its `scaling_factor`.

    Of several processes each encodes its share of the pictures, and all get all of them, as one process would encode them.

    views: how many random crops of each picture to learn, in addition to the whole picture.
    flip: learn every view mirrored too.
    leave_out: numbers of pictures that are not learned, from 0.

    Raises:
        ContractError, DatasetError: the folder's table or pictures are wrong, or a caption names a token too late.
    """
    add_placeholder_tokens(components, token_map)
    if settings.speed() != "eager":
        fuse_blocks(components.vae)
    generator = torch.Generator(components.device).manual_seed(seed)
    pictures = read_dataset_folder(folder)
    pictures = [picture for index, picture in enumerate(pictures) if index not in leave_out]
    captions = {prepared.picture.name: prepared.caption for prepared in pictures}
    cut = require_tokens_fit(captions, components.tokenizers, token_map)  # before any picture is encoded
    tell_of_cuts(cut)
    ids = token_ids([prepared.caption for prepared in pictures], components.tokenizers, token_map)
    own, encoded = shared_out(len(pictures)), []
    with ThreadPoolExecutor() as threads:
        # Threads decode and crop the next pictures while the GPU encodes one. Each picture has its own random numbers,
        # so that results depend neither on the order of the threads nor on the number of processes.
        tasks = (
            partial(views_of, pictures[index], np.random.default_rng((seed, index)), crops=views, flip=flip)
            for index in own
        )
        most = (1 + views) * (1 + flip)
        with tqdm(total=len(own) * most, desc="Encoding pictures and their crops", unit="view") as progress:
            for index, shown in zip(own, _ahead(threads, tasks), strict=True):
                generator.manual_seed(int(np.random.SeedSequence((seed, index, 2)).generate_state(1)[0]))
                first, second = ids[index]
                on_device = first.to(components.device), second.to(components.device)
                encoded.append([])
                for view, latents in zip(shown, _encode(shown, components, generator), strict=True):
                    encoded[-1].append(_example(view, latents, on_device))
                    progress.update()
                progress.update(most - len(shown))  # some pictures have no pixels for crops
    if len(own) < len(pictures):  # others have encoded the rest; what they send comes through the CPU
        there = of_all([[_moved(example, torch.device("cpu")) for example in views] for views in encoded])
        encoded = [[_moved(example, components.device) for example in views] for views in there]
    return ExampleDataset([example for views in encoded for example in views])


def kept_out(pictures: int) -> set[int]:
    """Which of so many pictures training does not see, so that it can be checked on them: one of 20, two of 40 or more."""
    return {pictures // 2, pictures // 4} if pictures >= 40 else {pictures // 2} if pictures >= 20 else set()


@torch.no_grad()
def held_out_examples(
    folder: Path, components: Components, token_map: TokenMap, *, seed: int, pictures: Collection[int]
) -> ExampleDataset:
    """What training does not see, all of one shape: the whole of `pictures`, or crops of the first two if there are none.

    A picture without pixels to spare has no crops; then it is the whole picture, which training does see.
    """
    prepared = read_dataset_folder(folder)
    numbers = sorted(pictures) or [index for index in range(min(len(prepared), 2))]
    size = prepared[numbers[0]].framing.target_size
    generator = torch.Generator(components.device).manual_seed(seed)
    examples = []
    for number in numbers:
        picture = prepared[number]
        if picture.framing.target_size != size:
            continue
        view = views_of(
            picture, np.random.default_rng((seed, number, 1)), crops=0 if pictures else 1, flip=False
        )[-1]
        [(first, second)] = token_ids([picture.caption], components.tokenizers, token_map)
        [latents] = _encode([view], components, generator)
        examples.append(_example(view, latents, (first.to(components.device), second.to(components.device))))
    return ExampleDataset(examples)


def _moved(example: Example, device: torch.device) -> Example:
    """`example` on `device`."""
    first, second = (ids.to(device) for ids in example.token_ids)
    latents, mask, time_ids = (one.to(device) for one in (example.latents, example.mask, example.time_ids))
    return replace(example, latents=latents, mask=mask, token_ids=(first, second), time_ids=time_ids)


def _example(view: View, latents: Tensor, ids: tuple[Tensor, Tensor]) -> Example:
    return Example(
        latents=latents,
        mask=_latent_mask(view.mask, latents),
        token_ids=ids,
        time_ids=torch.tensor(view.time_ids, dtype=torch.float32, device=latents.device),
        share=view.share,
    )


def _ahead(threads: ThreadPoolExecutor, tasks: Iterable[Callable[[], T]], depth: int = 4) -> Iterator[T]:
    """The results of `tasks` in their order. `threads` compute up to `depth` of them ahead."""
    waiting: deque[Future[T]] = deque()
    for task in tasks:
        waiting.append(threads.submit(task))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _encode(views: list[View], components: Components, generator: torch.Generator) -> Iterator[Tensor]:
    """The latents [4, h, w] of each view, all of one size, in batches of at most `PIXELS_AT_ONCE`."""
    width, height = views[0].picture.size
    at_once = max(PIXELS_AT_ONCE // (width * height), 1)
    for start in range(0, len(views), at_once):
        stacked = np.stack([np.array(view.picture) for view in views[start : start + at_once]])
        pixels = torch.from_numpy(stacked).to(components.device).permute(0, 3, 1, 2) / 127.5 - 1
        posterior = components.vae.encode(pixels.to(components.vae.dtype)).latent_dist  # type: ignore[union-attr]
        yield from (posterior.sample(generator) * components.vae.config["scaling_factor"]).float()


def _latent_mask(mask: Image.Image | None, latents: Tensor) -> Tensor:
    """The mask [1, h, w], 0 to 1, at the size of the latents: each value is the mean of its area. All ones if there is
    no mask."""
    height, width = latents.shape[-2:]
    if mask is None:
        return torch.ones(1, height, width, device=latents.device)
    small = mask.resize((width, height), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small, dtype=np.float32) / 255)[None].to(latents.device)
