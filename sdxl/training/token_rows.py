"""Trainable embedding rows beside a frozen embedding table.

Knows embeddings; does not know text, losses or optimizers.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


class TokenRows(nn.Module):
    """An embedding layer whose last ids are looked up in a small fp32 parameter of their own.

    Only `rows` [tokens, dim] takes gradients, so no optimizer state, gradient or update ever spans the vocabulary.
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

        words: a new id → ids of the known word that its row starts from, as their mean; the rows without one are drawn
        at the scale of the table's entries.
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
        index = ids - self.first_id
        is_new = (index >= 0) & (index < len(self.rows))
        known = F.embedding(ids.masked_fill(is_new, 0), self.table.weight)
        new = F.embedding(index.masked_fill(~is_new, 0), self.rows)
        return torch.where(is_new[..., None], new.to(known.dtype), known)

    @torch.no_grad()
    def pull_to_scale(self, strength: float = 0.1) -> None:
        """Draw the rows' standard deviation a little towards the table's: σ ← σ^(1−strength) · σ_table^strength.

        Rows that outgrow the table drown the other words of a prompt.
        """
        self.rows.mul_((self.table_std / self.rows.std().clamp_min(1e-8)) ** strength)


def install(
    text_encoder: PreTrainedModel,
    ids: list[int],
    generator: torch.Generator,
    words: Mapping[int, list[int]] = MappingProxyType({}),
) -> TokenRows:
    """Put `TokenRows` for consecutive `ids` in the place of the encoder's embedding table, and return them.

    words: a new id → ids of the known word that its row starts from.
    """
    assert ids == list(range(ids[0], ids[0] + len(ids))), "tokenizers number added tokens consecutively"
    table = text_encoder.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    rows = TokenRows(table, ids[0], len(ids), generator, words)
    text_encoder.set_input_embeddings(rows)
    return rows


def remove(text_encoder: PreTrainedModel, rows: TokenRows) -> None:
    """Put the encoder's own table back."""
    text_encoder.set_input_embeddings(rows.table)
