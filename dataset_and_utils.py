"""The contract on disk: token map, token embeddings, cached examples.

Knows how the tokens of a fine-tune are named, written and read; does not know how they are trained. Imports nothing
else of this project: copy this one file next to your script to use a fine-tune with a plain diffusers pipeline.

torch is imported in the functions that need it, so that entry points check their inputs without it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

POOLED_AT_EOS = {"pooled_at": "eos"}
"""Metadata of embeddings that were trained with the pooled output of the end-of-text token."""

_TOKEN_MAP_ENTRY = re.compile(r"([A-Za-z_]+):([0-9]{1,9})")
_PLACEHOLDERS = re.compile(r"(<s[0-9]{1,3}>)+")
MOST_ROWS = 1000
"""Embedding rows of all tokens of a fine-tune together, so numbers of placeholders have at most three digits."""


class UserInputError(ValueError):
    """An input, a file or a setting is wrong. The message is one sentence that names it and the remedy.

    Messages quote what strangers wrote, so they are kept to one line of `LONGEST_MESSAGE` characters that can be printed.
    """

    LONGEST_MESSAGE = 400

    def __init__(self, message: str) -> None:
        line = "".join(
            character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in message
        )
        if len(line) > self.LONGEST_MESSAGE:  # cut the middle: the end says what to do
            half = self.LONGEST_MESSAGE // 2
            line = f"{line[:half]}…{line[1 - half :]}"
        super().__init__(line)


class ContractError(UserInputError):
    """A token map, a table of captions or a file of embeddings is malformed."""


# Token map --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenMap:
    """The words of captions that are new tokens, and how many embedding rows each one has.

    `TokenMap.parse("CLOCK_TOK:2,MT_TOK:3").placeholders` is `{"CLOCK_TOK": "<s0><s1>", "MT_TOK": "<s2><s3><s4>"}`.
    The rows are numbered across all tokens.
    """

    placeholders: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> TokenMap:
        """Read `NAME:SIZE,NAME:SIZE`: names of letters and underscores, sizes from 1 to 64.

        Raises:
            ContractError: malformed, a repeated name, or a size out of range.
        """
        placeholders: dict[str, str] = {}
        count = 0
        for entry in (part.strip() for part in text.split(",")):
            match = _TOKEN_MAP_ENTRY.fullmatch(entry)
            if match is None or not 1 <= (size := int(match[2])) <= 64:
                raise ContractError(
                    f"token_map {text!r} is wrong at {entry!r}: write NAME:SIZE, a name of letters and underscores "
                    'and a size from 1 to 64, such as "TOK:2" or "CLOCK_TOK:2,MT_TOK:3".'
                )
            if match[1] in placeholders:
                raise ContractError(f"token_map {text!r} names {match[1]} twice: give each token one entry.")
            placeholders[match[1]] = "".join(f"<s{count + row}>" for row in range(size))
            count += size
            if count > MOST_ROWS:
                raise ContractError(
                    f"token_map asks for more than {MOST_ROWS} rows in all: give tokens fewer rows."
                )
        return cls(placeholders)

    @property
    def new_tokens(self) -> list[str]:
        """The placeholder tokens, one for each embedding row: `["<s0>", "<s1>", ...]`."""
        return re.findall(r"<s[0-9]+>", "".join(self.placeholders.values()))

    def parse_init(self, text: str) -> dict[str, str]:
        """Read `NAME:word,NAME:word`: the word that each token's embedding rows start from.

        Returns placeholder token → word, such as `{"<s0>": "dog", "<s1>": "dog"}`.

        Raises:
            ContractError: malformed, or a name that is not in the map.
        """
        words: dict[str, str] = {}
        for entry in (part.strip() for part in text.split(",") if part.strip()):
            name, colon, word = (part.strip() for part in entry.partition(":"))
            if not colon or not word or name not in self.placeholders:
                raise ContractError(
                    f"token_init {text!r} is wrong at {entry!r}: write NAME:word for tokens of token_map "
                    f'({", ".join(self.placeholders)}), such as "{next(iter(self.placeholders))}:dog".'
                )
            words |= {token: word for token in re.findall(r"<s[0-9]+>", self.placeholders[name])}
        return words

    def substitute(self, text: str) -> str:
        """Replace each token in `text` by its placeholder tokens. Only whole words in the same case are tokens.

        Some people write a token as <TOK>; the brackets are replaced with it.
        """
        if not self.placeholders:
            return text
        return self._words().sub(
            lambda match: self.placeholders.get(match[0]) or self.placeholders[match[0][1:-1]], text
        )

    def named_in(self, text: str) -> bool:
        """Whether `text` contains at least one token of the map as a whole word."""
        return bool(self.placeholders) and self._words().search(text) is not None

    def _words(self) -> re.Pattern[str]:
        names = "|".join(sorted(map(re.escape, self.placeholders), key=len, reverse=True))
        return re.compile(rf"<(?:{names})>|(?<!\w)(?:{names})(?!\w)")

    def write(self, path: Path) -> None:
        """Write `special_params.json`."""
        path.write_text(json.dumps(dict(self.placeholders), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> TokenMap:
        """Read `special_params.json`.

        Raises:
            ContractError: not a JSON object that maps words to placeholder tokens.
        """
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ContractError(
                f"{path.name} cannot be read as JSON: take it from a finished training."
            ) from error
        if not isinstance(content, dict) or not all(
            word and word.isprintable() and isinstance(value, str) and _PLACEHOLDERS.fullmatch(value)
            for word, value in content.items()
        ):
            example = '{"TOK": "<s0><s1>"}'
            raise ContractError(f"{path.name} must look like {example}: take it from a finished training.")
        if sum(value.count("<") for value in content.values()) > MOST_ROWS:
            raise ContractError(
                f"{path.name} names more than {MOST_ROWS} placeholder tokens: take it from a finished training."
            )
        return cls(content)


# Token embeddings -------------------------------------------------------------------------------------------


def pool_at_eos(text_encoder: torch.nn.Module, eos_token_id: int) -> None:
    """Make a CLIP text model take its pooled output from the first `eos_token_id`.

    SDXL's published second encoder has `eos_token_id` 2, for which transformers pools at the *highest* id of a
    sequence. That is the end of text until a token is added; then it is the added token, and all text after it is
    lost. The id is in the configuration and in the module built from it, so set both.
    """
    for module in text_encoder.modules():
        if isinstance(getattr(module, "eos_token_id", None), int):
            module.eos_token_id = eos_token_id  # type: ignore[assignment]
        config = getattr(module, "config", None)
        if config is not None:
            config.eos_token_id = eos_token_id  # type: ignore[union-attr]


def write_embeddings(
    path: str | os.PathLike[str], rows: Sequence[Tensor], *, pooled_at_eos: bool = True
) -> None:
    """Write `embeddings.pti`: `rows[i]` [tokens, dim_i] belongs to text encoder i.

    pooled_at_eos: whether they were trained with prompts pooled at the end of text.
    """
    from safetensors.torch import save_file

    tensors = {f"text_encoders_{index}": row.detach().cpu().contiguous() for index, row in enumerate(rows)}
    save_file(tensors, path, metadata=POOLED_AT_EOS if pooled_at_eos else None)


def read_embeddings(path: str | os.PathLike[str]) -> tuple[list[Tensor], bool]:
    """Read `embeddings.pti`: the rows [tokens, dim_i] of each text encoder, and whether to pool at the end of text.

    Raises:
        ContractError: no such file, not safetensors, or not as many tokens for each text encoder.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            rows = [file.get_tensor(f"text_encoders_{index}") for index in range(len(file.keys()))]
            at_eos = (file.metadata() or {}).get("pooled_at") == POOLED_AT_EOS["pooled_at"]
    except (OSError, SafetensorError) as error:
        raise ContractError(
            f"{Path(path).name} holds no token embeddings: take it from a finished training."
        ) from error
    if not rows or any(row.ndim != 2 or len(row) != len(rows[0]) or len(row) == 0 for row in rows):
        raise ContractError(
            f"{Path(path).name} must hold one [tokens, dim] tensor for each encoder, of equal lengths."
        )
    return rows, at_eos


class TokenEmbeddingsHandler:
    """Adds trained tokens `<s0>`, `<s1>`, … to the text encoders and tokenizers of a plain diffusers pipeline.

    handler = TokenEmbeddingsHandler([pipe.text_encoder, pipe.text_encoder_2], [pipe.tokenizer, pipe.tokenizer_2])
    handler.load_embeddings("training_out/embeddings.pti")
    pipe("A photo of <s0><s1>")
    """

    def __init__(self, text_encoders: Sequence[PreTrainedModel], tokenizers: Sequence) -> None:
        if len(text_encoders) != len(tokenizers):
            raise ValueError(f"Got {len(text_encoders)} text encoders but {len(tokenizers)} tokenizers.")
        self.text_encoders = list(text_encoders)
        self.tokenizers = list(tokenizers)

    def load_embeddings(self, file_path: str | os.PathLike[str]) -> None:
        """Read `embeddings.pti`, add its tokens and set their rows, in each encoder's dtype and on its device.

        Encoders then pool at the end of text if the file says so. Files of the trainer of 2023–24 do not: they were
        trained with the pooled output of the highest id, and the encoders keep their pooling.

        Raises:
            ContractError: the file is malformed, or made for other text encoders.
        """
        import torch

        rows, at_eos = read_embeddings(file_path)
        widths = [_table(encoder).weight.shape[1] for encoder in self.text_encoders]
        if widths != [row.shape[1] for row in rows]:
            raise ContractError(
                f"{file_path} was made for text encoders of widths {[row.shape[1] for row in rows]}, but these have "
                f"{widths}: load it into the base that it was trained on."
            )
        tokens = [f"<s{index}>" for index in range(len(rows[0]))]
        for encoder, tokenizer, row in zip(self.text_encoders, self.tokenizers, rows, strict=True):
            ids = add_tokens(tokenizer, tokens)
            table = _table(encoder)
            if max(ids) >= table.num_embeddings:
                encoder.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
                table = _table(encoder)
            with torch.no_grad():
                table.weight[ids] = row.to(table.weight)
            if at_eos:
                pool_at_eos(encoder, eos_id(tokenizer))

    def save_embeddings(self, file_path: str | os.PathLike[str]) -> None:
        """Write `embeddings.pti`: the rows of all tokens `<s0>`, `<s1>`, … in the tokenizers."""
        rows = []
        for encoder, tokenizer in zip(self.text_encoders, self.tokenizers, strict=True):
            vocabulary, ids = tokenizer.get_vocab(), []
            while (token := f"<s{len(ids)}>") in vocabulary:
                ids.append(vocabulary[token])
            rows.append(_table(encoder).weight[ids])
        write_embeddings(file_path, rows)


def _table(encoder: PreTrainedModel) -> torch.nn.Embedding:
    return encoder.get_input_embeddings()  # type: ignore[return-value]


def eos_id(tokenizer) -> int:
    """The id of the tokenizer's end-of-text token."""
    return int(tokenizer.convert_tokens_to_ids(tokenizer.eos_token))


def add_tokens(tokenizer, tokens: Sequence[str]) -> list[int]:
    """Add `tokens` to a tokenizer as words that it never splits, and return their ids. Existing tokens keep their ids."""
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer.convert_tokens_to_ids(list(tokens))


# Cached examples --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Example:
    """One picture, encoded for training."""

    latents: Tensor
    """Scaled latents [4, h, w], h and w in latent pixels."""
    mask: Tensor
    """Weight of each latent pixel in the loss, [1, h, w], 0 to 1."""
    token_ids: tuple[Tensor, Tensor]
    """Ids of the caption, with its placeholder tokens, for each text encoder: [77·n] each, in n chunks of 77."""
    time_ids: Tensor
    """SDXL's size conditioning [6]: original height and width, crop top and left, target height and width, in pixels."""
    share: float = 1.0
    """How often the example is drawn, compared with others. Stacked examples do not have it."""

    def take(self, rows: Tensor) -> Example:
        """Select the examples at `rows` [B], an integer tensor on their device, from stacked examples."""
        return Example(
            latents=self.latents[rows],
            mask=self.mask[rows],
            token_ids=(self.token_ids[0][rows], self.token_ids[1][rows]),
            time_ids=self.time_ids[rows],
        )


class ExampleDataset:
    """Cached examples, in the form that torch's data loaders take."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def pictures(self) -> int:
        """How many pictures the examples are views of."""
        return round(sum(example.share for example in self.examples))

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def collate(self, indices: Sequence[int]) -> Example:
        """Stack the B examples at `indices`, all of one shape: latents [B, 4, h, w], mask [B, 1, h, w], ids 2×[B, 77·n]."""
        import torch

        chosen = [self.examples[index] for index in indices]
        first, second = (
            torch.stack([example.token_ids[encoder] for example in chosen]) for encoder in (0, 1)
        )
        return Example(
            latents=torch.stack([example.latents for example in chosen]),
            mask=torch.stack([example.mask for example in chosen]),
            token_ids=(first, second),
            time_ids=torch.stack([example.time_ids for example in chosen]),
        )
