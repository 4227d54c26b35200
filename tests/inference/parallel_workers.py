"""What the processes of a tensor-parallel test do."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_generation import byte_tokenizer, tiny_model

from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.heavy_hitters import HeavyHitters
from treadle.inference.quantised import Quantised
from treadle.inference.request import Request
from treadle.inference.runner import Batch
from treadle.inference.sampling import Sampling
from treadle.inference.shards import shard
from treadle.inference.tensor_parallel import TensorParallelRunner, follow, join
from treadle.models.decoder import Decoder, DecoderModel, LinearHead
from treadle.nn.alibi import ALiBi
from treadle.nn.block import Block
from treadle.nn.ffn.ffn import MLP, GatedMLP
from treadle.nn.mixers.attention import Attention
from treadle.nn.norms import LayerNorm, RMSNorm
from treadle.nn.positions import NoPositions

CACHES = (Quantised(group=4), HeavyHitters())
"""Of one kind that lasts and one that does not."""
TEXTS = ([5, 6, 7, 8, 9, 10, 11], [200, 3], list(range(40)))


def models() -> dict[str, DecoderModel]:
    """Heads, groups, hidden units and vocabulary that do not divide by two; biases everywhere."""
    odd = GatedMLP(hidden=33, bias=True)
    grouped = Attention(
        heads=6, kv_heads=3, head_dim=4, qk_norm=RMSNorm(), qkv_bias=True, out_bias=True, window=9
    )
    gpt = Attention(heads=5, head_dim=4, positions=NoPositions(), out_bias=True)
    trees = {
        "grouped": Decoder(
            vocab=257, dim=16, context=128, blocks=(Block(mixer=grouped, ffn=odd),) * 2
        ),
        "gpt": Decoder(
            vocab=257,
            dim=20,
            context=128,
            blocks=(Block(mixer=gpt, ffn=MLP(hidden=30), norm=LayerNorm()),) * 2,
            learned_positions=True,
            head=LinearHead(bias=True),
        ),
        "alibi": Decoder(
            vocab=257,
            dim=16,
            context=128,
            blocks=(Block(mixer=Attention(heads=4, positions=ALiBi()), ffn=GatedMLP(hidden=8)),),
        ),
    }
    made = {}
    for name, tree in trees.items():
        torch.manual_seed(0)
        made[name] = tree.replace(std=0.5).build().eval()
        with torch.no_grad():
            for path, parameter in made[name].named_parameters():
                if path.endswith("bias"):
                    parameter.normal_()
    return made


def requests() -> list[Request]:
    greedy = Sampling(temperature=0.0, max_tokens=12)
    drawn = Sampling(temperature=1.0, max_tokens=12, seed=3)
    return [Request(tuple(text), sampling, n=2) for text in TEXTS for sampling in (greedy, drawn)]


def texts(engine: Engine) -> list[list[int]]:
    return [list(one.tokens) for answer in engine.generate(requests()) for one in answer]


def over_two(folder: Path) -> None:
    rank, _ = join(2)
    for name, model in models().items():
        whole = sum(p.nbytes for p in model.parameters())
        if rank:
            follow(model)
        else:
            runner = TensorParallelRunner(model, pages=40, page=4)
            tokens = [t for text in TEXTS for t in text]
            counts = [len(text) for text in TEXTS]
            tables = [[12 * i + p for p in range(12)] for i in range(3)]
            first = runner.run(Batch(tokens, counts, [0] * 3, tables, counts))
            second = runner.run(Batch([1, 2, 3, 4], [1, 2, 1], counts, tables, [1, 2, 1]))
            engine = Engine.of_runner(runner, byte_tokenizer(), EngineConfig(prefill_tokens=16))
            said = {"logits": torch.cat([first, second]).tolist(), "texts": texts(engine)}
            (folder / f"{name}.json").write_text(json.dumps(said))
            runner.close()
        held = sum(p.nbytes for p in model.parameters()) / whole
        (folder / f"{name}-held-{rank}.json").write_text(json.dumps(held))
    for cache in CACHES:
        model = tiny_model()
        if rank:
            follow(model, cache)
        else:
            runner = TensorParallelRunner(model, pages=40, page=4, cache=cache)
            engine = Engine.of_runner(runner, byte_tokenizer(), EngineConfig(cache_tokens=160))
            (folder / f"{type(cache).__name__}.json").write_text(json.dumps(texts(engine)))
            runner.close()
    joined = shard(models()["gpt"], rank, 2)
    torch.testing.assert_close(joined.head_weight(), models()["gpt"].head_weight())
    bias = joined.head.effective_bias()
    torch.testing.assert_close(bias, models()["gpt"].head.bias)
    dist.destroy_process_group()
