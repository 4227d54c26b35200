"""Learning without forgetting: the composed loss beside its formula written out."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from chat_env import Numbered, chat_env
from expert_models import nowhere

from treadle.core.pipeline import Workspace
from treadle.data.source import Env
from treadle.data.supervised import Supervised
from treadle.distillation.lwf import without_forgetting
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource, Opened


class FormerSelf(ModelSource):
    """A model as it was before the new task."""

    seed: int = 5

    def open(self, workspace: Workspace) -> Opened:
        return Opened(former(self.seed), workspace.root)


def former(seed: int) -> DecoderModel:
    torch.manual_seed(seed)
    model = chat_env(Path()).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_loss_by_hand(tmp_path: Path, monkeypatch: object) -> None:
    from treadle.distillation import taught

    env = chat_env(tmp_path)
    env = Env(**{**vars(env), "workspace": nowhere()})
    taught_tokenizer = env.tokenizer
    monkeypatch.setattr(taught, "tokenizer_of", lambda opened: taught_tokenizer)  # type: ignore[attr-defined]
    source = Supervised(conversations=Numbered(word="loom"), per_step=3)
    parts = without_forgetting(source, FormerSelf(), keep=0.7, temperature=2.0)
    (batch,) = next(parts.source.open(env)).batches
    output = parts.objective(env.model, batch)
    old, new = former(5), env.model
    rows = [m.logits(m(batch.tokens, batch.context()))[batch.sources] for m in (old, new)]
    p_old = (rows[0] / 2).softmax(-1)
    kl = (p_old * (p_old.log() - (rows[1] / 2).log_softmax(-1))).sum()
    expected = F.cross_entropy(rows[1], batch.targets, reduction="sum") + 0.7 * 4 * kl
    torch.testing.assert_close(output.total, expected, rtol=1e-4, atol=1e-3)
    assert float(kl.detach()) > 0.1
