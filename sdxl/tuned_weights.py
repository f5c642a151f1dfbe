"""Apply a fine-tune to a pipeline, and take it off again without a trace.

Knows pipelines and fine-tunes on disk; does not know requests.
"""

import copy
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dataset_and_utils import TokenEmbeddingsHandler, TokenMap, eos_id, pool_at_eos
from sdxl.artifacts import FineTune
from sdxl.errors import WeightsError

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

log = logging.getLogger(__name__)

PUBLISHED_EOS = 2
"""`eos_token_id` of SDXL's published second encoder: pools at the highest id of a sequence."""


@dataclass
class _TextState:
    """What a fine-tune changes about one text encoder."""

    tokenizer: Any
    table: nn.Module
    vocab_size: int


class TunedPipeline:
    """A pipeline whose base weights are kept, and at most one fine-tune on top of them."""

    def __init__(self, pipeline: "StableDiffusionXLPipeline") -> None:
        self.pipeline = pipeline
        self.token_map = TokenMap({})
        self._base_unet: dict[str, Tensor] = {}
        """Copies, on the CPU, of the UNet's tensors that the active fine-tune replaced."""
        self._base_text = [
            _TextState(tokenizer, encoder.get_input_embeddings(), encoder.config.vocab_size)
            for encoder, tokenizer in self._text_parts()
        ]
        self._lora = False

    def _text_parts(self) -> list[tuple[Any, Any]]:
        pipeline = self.pipeline
        return [(pipeline.text_encoder, pipeline.tokenizer), (pipeline.text_encoder_2, pipeline.tokenizer_2)]

    def activate(self, fine_tune: FineTune | None, *, lora_scale: float = 1.0) -> None:
        """Restore the base, then apply `fine_tune`; whatever fails or interrupts it, the base is what remains.

        Raises:
            WeightsError: the fine-tune does not fit this base.
            ContractError: its embeddings do not.
        """
        self.restore()
        if fine_tune is None:
            return
        try:
            if fine_tune.embeddings is not None:
                self._apply_embeddings(fine_tune)
            if fine_tune.unet is not None:
                self._apply_unet(fine_tune)
            if fine_tune.lora is not None:
                self._apply_lora(fine_tune, lora_scale)
            self.token_map = fine_tune.token_map
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back as the base has it; may be called at any time."""
        self.token_map = TokenMap({})
        if self._lora:
            self.pipeline.unload_lora_weights()
            self._lora = False
        if self._base_unet:
            state = self.pipeline.unet.state_dict()
            for name, value in self._base_unet.items():
                state[name].copy_(value)
            self._base_unet = {}
        for (encoder, _), base in zip(self._text_parts(), self._base_text, strict=True):
            encoder.set_input_embeddings(base.table)
            encoder.config.vocab_size = base.vocab_size
            pool_at_eos(encoder, eos_id(base.tokenizer))
        self.pipeline.tokenizer, self.pipeline.tokenizer_2 = (base.tokenizer for base in self._base_text)

    def _apply_embeddings(self, fine_tune: FineTune) -> None:
        """Load the rows into copies of the tables and tokenizers, so that restoring is putting the originals back."""
        encoders = [encoder for encoder, _ in self._text_parts()]
        tokenizers = [copy.deepcopy(base.tokenizer) for base in self._base_text]
        for encoder, base in zip(encoders, self._base_text, strict=True):
            weight = base.table.weight
            assert isinstance(weight, Tensor)
            encoder.set_input_embeddings(nn.Embedding.from_pretrained(weight.detach().clone()))
            pool_at_eos(
                encoder, PUBLISHED_EOS
            )  # the way of unmarked files; the handler switches for marked ones
        self.pipeline.tokenizer, self.pipeline.tokenizer_2 = tokenizers
        TokenEmbeddingsHandler(encoders, tokenizers).load_embeddings(fine_tune.embeddings)  # type: ignore[arg-type]

    @torch.no_grad()
    def _apply_unet(self, fine_tune: FineTune) -> None:
        assert fine_tune.unet is not None
        tuned = load_file(fine_tune.unet)
        state = self.pipeline.unet.state_dict()
        strangers = [name for name in tuned if name not in state or tuned[name].shape != state[name].shape]
        if strangers:
            raise WeightsError(
                f"{fine_tune.unet.name} does not fit this base ({len(strangers)} tensors such as {strangers[0]}): "
                "load it into the base model it was trained on."
            )
        for name, value in tuned.items():
            self._base_unet[name] = state[name].to("cpu", copy=True)
            state[name].copy_(value)

    def _apply_lora(self, fine_tune: FineTune, scale: float) -> None:
        assert fine_tune.lora is not None
        self._lora = True
        try:
            self.pipeline.load_lora_weights(
                str(fine_tune.lora.parent), weight_name=fine_tune.lora.name, adapter_name="tuned"
            )
            self.pipeline.set_adapters(["tuned"], [scale])
        except (ValueError, RuntimeError, KeyError) as error:
            raise WeightsError(
                f"{fine_tune.lora.name} does not fit this base ({error}): load it into the base it was trained on."
            ) from error
