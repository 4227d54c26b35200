"""The oracle: a tiny random Llama of transformers, scored by lm-eval one question at a time.

lm-eval's own task files are used; only where their rows come from is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import tokenizers
import torch
import transformers
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

TASKS = Path(lm_eval.__file__).parent / "tasks"
TEXT = (
    "Question: Which of these is the best answer? The first, the second, or none.\n"
    "Janet has 16 eggs, eats 3 and sells the rest for $2 each: 13 * 2 = 26\n#### 26\n"
    "A. yes B. no C. water D. the sun; energy, food and heat. Answer: 1234567890\n"
)


@dataclass(frozen=True)
class Tiny:
    """One model, as transformers has it and as a folder that treadle reads."""

    folder: Path
    lm: HFLM
    context: int


def tiny(folder: Path, *, context: int = 512, bos: bool = False, scale: float = 8.0) -> Tiny:
    """A random model with sharp opinions (`scale` on its head), its tokenizer, and its folder."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    if bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>" if bos else None, eos_token="<eos>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=context)
    return Tiny(folder, lm, context)


def lm_eval_samples(
    lm: HFLM, task: dict[str, Any], rows: dict[str, Sequence[dict[str, Any]]], tmp: Path
) -> list[dict[str, Any]]:
    """lm-eval's own record of each row, in order; `task` overrides its task file `include`."""
    files = {}
    for split, examples in rows.items():
        path = tmp / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in examples), encoding="utf-8")
        files[split] = str(path)
    spec = {
        **task,
        "task": "oracle",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp / "cache")},
        "training_split": "train" if "train" in rows else None,
        "fewshot_split": "train" if "train" in rows else None,
        "validation_split": None,
        "test_split": "test",
    }
    (tmp / "oracle.yaml").write_text(json.dumps(spec))
    datasets.disable_progress_bars()
    manager = TaskManager(include_defaults=False, include_path=str(tmp))
    found = evaluate(lm, manager.load(["oracle"]), bootstrap_iters=0, log_samples=True)
    assert found is not None
    samples: list[dict[str, Any]] = sorted(found["samples"]["oracle"], key=lambda s: s["doc_id"])
    return samples
