"""Where a run's model comes from: fresh weights or a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from treadle.core.files import write_json
from treadle.core.pipeline import MANIFEST, Pipeline, Workspace
from treadle.models.hub.save import save_hf
from treadle.models.llama import tiny_llama
from treadle.models.source import Fresh, Pretrained


def workspace(root: Path) -> Workspace:
    (root / "tokens").mkdir()
    write_json(root / "tokens" / MANIFEST, {})
    return Workspace(root, root, Pipeline.model_construct())


def test_fresh_weights_follow_the_seed_and_leave_others_alone(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    fresh = Fresh(step="tokens", decoder=tiny_llama(61, dim=32, layers=1), seed=3)
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    one, two = fresh.open(place), fresh.open(place)
    other = fresh.replace(seed=4).open(place)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.model.embedding.weight, two.model.embedding.weight)
    assert not torch.equal(one.model.embedding.weight, other.model.embedding.weight)
    assert one.origin == tmp_path / "tokens" / "tokenizer"


def test_pretrained_opens_a_folder_in_float32(tmp_path: Path) -> None:
    model = tiny_llama(61, dim=32, layers=1).build()
    save_hf(model, tmp_path / "m", dtype=torch.bfloat16, fields={"eos_token_id": 7})
    opened = Pretrained(name=str(tmp_path / "m")).open(workspace(tmp_path))
    weight = opened.model.embedding.weight
    assert torch.equal(weight, model.embedding.weight.bfloat16().float())
    assert all(p.requires_grad for p in opened.model.parameters())
    assert opened.metadata["eos_token_id"] == 7
    assert opened.origin == tmp_path / "m"
