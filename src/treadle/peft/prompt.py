"""Prompt tuning: learned embeddings before the first token; P-tuning makes them with a network.

    h = model([P; E x]),     P [n, D] trained

Lester et al. 2021, arXiv:2104.08691; Liu et al. 2021, P-tuning, arXiv:2103.10385. What later tokens
see of P are its keys and values, so P goes through the layers once a batch, not once a document.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field

from treadle.core.cards import Card
from treadle.models.decoder import DecoderModel
from treadle.models.transform import M, Transform
from treadle.nn.prefix import KeysValues
from treadle.peft.prefix import Prefix, attach, plain_decoder, real_tokens, record
from treadle.peft.virtual import Direct, VirtualTokens

CARD = Card(
    id="ft.prompt",
    paper="Lester et al. 2021, arXiv:2104.08691; Liu et al. 2021, P-tuning, arXiv:2103.10385",
    summary="Learned embeddings before the first token, direct or out of a small network.",
    recipe="treadle run fine-tune steps.sft.optimizer.lr=0.01 "
    "steps.sft.transforms='[{kind: PromptTuning, encoder: {kind: ReLUNetwork}}]'",
    oracle="tests/peft/test_peft_prefix.py::test_prompts_match_peft",
)


class PromptTuning(Transform):
    """Learned embeddings; with a network as encoder this is P-tuning."""

    tokens: int = Field(default=16, ge=1)
    """n."""
    encoder: VirtualTokens = Direct()

    def __call__(self, model: M) -> M:
        decoder = plain_decoder(model, "PromptTuning")
        with torch.no_grad():
            rows = decoder.config.embedding_scale * real_tokens(decoder, self.tokens)
        return attach(model, SoftPrompt(self, rows))


class SoftPrompt(Prefix):
    def __init__(self, config: PromptTuning, rows: torch.Tensor) -> None:
        super().__init__()
        self.config, self.count = config, config.tokens
        self.virtual = config.encoder.build(rows.shape[1], rows).to(rows.device)

    def tables(self, model: DecoderModel) -> Mapping[int, KeysValues]:
        rows: torch.Tensor = self.virtual()
        if model.position is not None:
            rows = rows + model.position(torch.arange(self.count, device=rows.device))
        return record(model, rows)
