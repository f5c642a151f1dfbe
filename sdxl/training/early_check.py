"""What can be checked as soon as the captions are known, before anything takes time.

Knows the inputs of a training and the base's tokenizers; does not know how pictures are prepared.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from dataset_and_utils import add_tokens
from sdxl.model.components import load_tokenizers
from sdxl.training.caption_fit import require_tokens_fit
from sdxl.training.config import words_of
from sdxl.training.data_parallel import world_size
from sdxl.training.inputs import TrainInputs
from sdxl.training.token_rows import tell_of_split_words


def early_check(inputs: TrainInputs, base: Path, resolution: int) -> Callable[[Mapping[str, str]], None]:
    """Make a check that takes each picture's name and its caption, or how its caption will begin.

    The check refuses captions whose token is cut off, and settings that do not fit the number of pictures. Words of
    token_init that the base knows only in pieces are logged at once.

    base: the base's folder.
    resolution: side of the training pictures in pixels.

    Raises:
        WeightsError: the base has no tokenizers.
    """
    tokenizers = load_tokenizers(base)
    tell_of_split_words(inputs.token_map.parse_init(words_of(inputs.options.token_init)), tokenizers[0])
    for tokenizer in tokenizers:
        add_tokens(tokenizer, inputs.token_map.new_tokens)

    def check(captions: Mapping[str, str]) -> None:
        require_tokens_fit(captions, tokenizers, inputs.token_map)
        inputs.training_config(resolution=resolution, images=len(captions), processes=world_size())

    return check
