"""Trainable embedding rows for new tokens, next to a frozen embedding table.

Knows embeddings and tokenizers; does not know captions, losses or optimizers.
"""

import logging
from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedModel

from dataset_and_utils import TokenMap
from sdxl.model.components import Components, add_placeholder_tokens

log = logging.getLogger(__name__)


class TokenRows(nn.Module):
    """An embedding layer that looks up its last ids in a small fp32 parameter of its own.

    Only `rows` [tokens, dim] gets gradients, so no optimizer state, gradient or update ever has the size of the
    vocabulary.
    """

    def __init__(
        self,
        table: nn.Embedding,
        first_id: int,
        count: int,
        generator: torch.Generator,
        words: Mapping[int, list[int]] = MappingProxyType({}),
    ) -> None:
        """Rows for the ids `first_id` to `first_id + count - 1`.

        words: new id → ids of a word of the table. The row starts as the mean of their embeddings. Rows without a word
            start as noise with the table's standard deviation.
        """
        super().__init__()
        self.table = table
        self.first_id = first_id
        self.table_std = float(table.weight.detach().float().std())
        start = torch.randn(count, table.embedding_dim, generator=generator, device=generator.device)
        self.rows = nn.Parameter((start * self.table_std).to(table.weight.device))
        with torch.no_grad():
            for new_id, word in words.items():
                self.rows[new_id - first_id] = table.weight[word].float().mean(0)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [..., dim] of `ids` [...], in the table's dtype."""
        # Look every id up in both places, with a harmless id where the other place has it. Selecting by index would
        # make shapes depend on values, and the CPU would wait for the GPU.
        index = ids - self.first_id
        is_new = (index >= 0) & (index < len(self.rows))
        old = F.embedding(ids.masked_fill(is_new, 0), self.table.weight)
        new = F.embedding(index.masked_fill(~is_new, 0), self.rows)
        return torch.where(is_new[..., None], new.to(old.dtype), old)

    @torch.no_grad()
    def pull_to_scale(self, strength: float = 0.1) -> None:
        """Move the rows' standard deviation a little towards the table's: σ ← σ^(1−strength) · σ_table^strength.

        Rows that grow far beyond the table drown out the other words of a prompt.
        """
        self.rows.mul_((self.table_std / self.rows.std().clamp_min(1e-8)) ** strength)


def install(
    text_encoder: PreTrainedModel,
    ids: list[int],
    generator: torch.Generator,
    words: Mapping[int, list[int]] = MappingProxyType({}),
) -> TokenRows:
    """Replace the encoder's embedding table by `TokenRows` for consecutive `ids`, and return them.

    words: see `TokenRows`.
    """
    assert ids == list(range(ids[0], ids[0] + len(ids))), "tokenizers number added tokens consecutively"
    table = text_encoder.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    rows = TokenRows(table, ids[0], len(ids), generator, words)
    text_encoder.set_input_embeddings(rows)
    return rows


def tell_of_split_words(init: Mapping[str, str], tokenizer: CLIPTokenizer) -> None:
    """Log which words of `init`, placeholder token → word, the base does not know as one piece."""
    for word in dict.fromkeys(init.values()):
        ids = tokenizer(word, add_special_tokens=False).input_ids
        pieces = [piece.removesuffix("</w>") for piece in tokenizer.convert_ids_to_tokens(ids)]
        if len(pieces) > len(word.split()):
            log.warning(
                'The base knows the word "%s" of token_init only in pieces (%s), whose mean says little: a common word is '
                "better.",
                *(word, ", ".join(pieces)),
            )


class NewTokens:
    """The tokens that a run learns: their rows in both text encoders."""

    def __init__(
        self, components: Components, token_map: TokenMap, token_init: str, generator: torch.Generator
    ) -> None:
        """Add the map's placeholder tokens to both tokenizers, and trainable rows to both text encoders.

        token_init: the words that tokens start from, such as "TOK:dog".
        """
        self.map = token_map
        self.by_encoder: list[TokenRows] = []
        self._encoders = components.text_encoders
        ids = add_placeholder_tokens(components, token_map)
        init = token_map.parse_init(token_init)
        for encoder, tokenizer, new in zip(self._encoders, components.tokenizers, ids, strict=True):
            words = {
                new[token_map.new_tokens.index(token)]: tokenizer(word, add_special_tokens=False).input_ids
                for token, word in init.items()
            }
            self.by_encoder.append(install(encoder, new, generator, words))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The rows [tokens, dim] of each encoder."""
        return [rows.rows for rows in self.by_encoder]

    def pull_to_scale(self) -> None:
        """Move the rows of each encoder towards the scale of its table."""
        for rows in self.by_encoder:
            rows.pull_to_scale()

    def freeze_text(self) -> None:
        """Stop computing gradients of the rows."""
        for rows in self.parameters:
            rows.requires_grad_(False).grad = None

    def export(self) -> list[Tensor]:
        """Copies of the rows on the CPU."""
        return [rows.detach().cpu().clone() for rows in self.parameters]

    def remove(self) -> None:
        """Give both encoders their own embedding tables back."""
        for encoder, rows in zip(self._encoders, self.by_encoder, strict=True):
            encoder.set_input_embeddings(rows.table)
