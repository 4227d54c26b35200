from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from treadle.core.errors import TreadleError
from treadle.data.conversations import ConversationFiles
from treadle.data.source import Env, Work
from treadle.data.supervised import Supervised
from treadle.models.hub.load import load_model
from treadle.objectives.causal import CausalLM
from treadle.tokenizers.chat import LastTurn, encode_chat
from treadle.tokenizers.tokenizer import Tokenizer
from treadle.tokenizers.train import ByteLevelBPE

MARKED = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}\n{% endfor -%}"
)
ROWS = [
    [("user", "Weave?"), ("assistant", "Yes, on a treadle loom.")],
    [
        ("system", "Be brief."),
        ("user", "Warp?"),
        ("assistant", "No."),
        ("user", "Weft?"),
        ("assistant", "The weft runs across, the warp along."),
    ],
    [
        ("user", "0123456789 zyxwvutsrqponmlkjihgfedcba ZYXWVUTSRQPONM"),
        ("assistant", "As long as its warp."),
    ],
    [("user", "Reed?"), ("assistant", "")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [{"messages": [{"role": r, "content": c} for r, c in row]} for row in ROWS]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    bpe = ByteLevelBPE(vocab_size=320)([c for row in ROWS for _, c in row])
    return bpe.with_template(MARKED)


@pytest.fixture
def files(rows: list[dict[str, Any]], tmp_path: Path) -> ConversationFiles:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return ConversationFiles(path=str(path))


@pytest.fixture
def env(tokenizer: Tokenizer, tmp_path: Path) -> Env:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    model = load_model(tmp_path / "model", dtype=torch.float32).model
    return Env(model=model, tokenizer=tokenizer, scratch=tmp_path, seed=1)


@pytest.mark.parametrize("tokens", [1000, 40])
def test_loss_matches_trl(
    env: Env, files: ConversationFiles, rows: list[dict[str, Any]], tmp_path: Path, tokens: int
) -> None:
    """The loss and gradient of TRL's trainer on the same conversations, padded there."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    source = Supervised(conversations=files, per_step=len(rows), tokens=tokens, longest=128)
    work = next(source.open(env))
    assert (len(work.batches) == 1) == (tokens == 1000)
    outputs = [CausalLM()(env.model, batch) for batch in work.batches]
    loss = sum(o.total for o in outputs) / sum(o.weight for o in outputs)
    loss.backward()

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trainer = trl.SFTTrainer(
        model=theirs,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "trl"),
            assistant_only_loss=True,
            max_length=128,
            per_device_train_batch_size=len(rows),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            loss_type="nll",
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(theirs, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        env.model.embedding.weight.grad, theirs.model.embed_tokens.weight.grad
    )
    weights = sum(float(b.weights.sum()) for b in work.batches)
    assert weights == float((batch["labels"][:, 1:] != -100).sum())


def test_only_assistant_tokens_are_learned(env: Env, files: ConversationFiles) -> None:
    work = next(Supervised(conversations=files, per_step=5, tokens=1000).open(env))
    said = env.tokenizer.decode(work.batches[0].targets.tolist(), skip_special=False)
    expected = ["".join(f"{c}<|im_end|>" for r, c in row if r == "assistant") for row in ROWS]
    assert sorted(said.split("<|im_end|>")) == sorted("".join(expected).split("<|im_end|>"))


def test_only_the_last_turn_if_so_wished(env: Env, files: ConversationFiles) -> None:
    source = Supervised(conversations=files, per_step=5, tokens=1000, turns=LastTurn())
    said = env.tokenizer.decode(next(source.open(env)).batches[0].targets.tolist())
    assert sorted(said) == sorted("".join(row[-1][1] for row in ROWS))


def test_answers_cut_away_are_counted(env: Env, files: ConversationFiles) -> None:
    whole = encode_chat(env.tokenizer, [m.plain() for m in files.conversation(2).messages])
    prompt = whole.mask.index(True)
    others = [
        encode_chat(env.tokenizer, [m.plain() for m in files.conversation(i).messages])
        for i in (0, 1, 3, 4)
    ]
    assert all(o.mask.index(True) < prompt for o in others)
    stream = Supervised(conversations=files, per_step=5, tokens=1000, longest=prompt).open(env)
    work = next(stream)
    assert work.metrics == {"conversations_without_answer": 1.0}
    assert len(work.batches[0].layout.lengths) == 4

    none = Supervised(conversations=files, per_step=5, tokens=1000, longest=4).open(env)
    with pytest.raises(TreadleError, match=r"none of 5 conversations has.*raise `longest`"):
        next(none)


def test_resumed_equals_uninterrupted(env: Env, files: ConversationFiles) -> None:
    source = Supervised(conversations=files, per_step=2, tokens=64)

    def told(stream: Any, count: int) -> list[list[int]]:
        return [b.tokens.tolist() for _ in range(count) for b in next(stream).batches]

    stream = source.open(env)
    told(stream, 4)
    state = json.loads(json.dumps(stream.state()))
    rest = told(stream, 5)
    again = source.open(env)
    again.restore(state)
    assert told(again, 5) == rest
    shares = [
        set(map(tuple, documents(next(source.open(Env(**{**vars(env), "rank": r, "world": 2}))))))
        for r in range(2)
    ]
    assert not shares[0] & shares[1]
    assert shares[0] | shares[1] == set(map(tuple, documents(next(source.open(env)))))


def documents(work: Work) -> list[list[int]]:
    return [
        batch.tokens[list(batch.layout.span(i))].tolist()
        for batch in work.batches
        for i in range(len(batch.layout.lengths))
    ]
