"""Public benchmarks from the Hugging Face hub, as their papers and lm-eval put them."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.evals.commonsense import ARC, PIQA, BoolQ, HellaSwag, Winogrande
from treadle.evals.evaluate import Evaluate
from treadle.evals.gsm8k import GSM8K
from treadle.evals.mmlu import MMLU
from treadle.evals.rows import Examples
from treadle.evals.shots import FirstShots
from treadle.evals.wikitext import WikiText
from treadle.models.source import Pretrained


def standard_benchmarks() -> Pipeline:
    """MMLU, GSM8K, ARC, PIQA, HellaSwag, Winogrande, BoolQ and WikiText."""
    return Pipeline(
        name="standard-benchmarks",
        steps=(
            Evaluate(
                name="benchmarks",
                subject="base",
                model=Pretrained(name="smollm2-135m-instruct"),
                benchmarks=(
                    ARC(name="arc-easy", rows=hub("allenai/ai2_arc", "test", "ARC-Easy")),
                    ARC(name="arc-challenge", rows=hub("allenai/ai2_arc", "test", "ARC-Challenge")),
                    PIQA(rows=hub("baber/piqa", "validation")),
                    HellaSwag(rows=hub("Rowan/hellaswag", "validation")),
                    Winogrande(rows=hub("allenai/winogrande", "validation", "winogrande_xl")),
                    BoolQ(rows=hub("aps/super_glue", "validation", "boolq")),
                    MMLU(
                        rows=hub("cais/mmlu", "test", "all"),
                        shots=FirstShots(rows=hub("cais/mmlu", "dev", "all"), count=5),
                    ),
                    GSM8K(
                        rows=hub("openai/gsm8k", "test", "main"),
                        shots=FirstShots(rows=hub("openai/gsm8k", "train", "main"), count=5),
                    ),
                    WikiText(rows=hub("Salesforce/wikitext", "test", "wikitext-2-raw-v1")),
                ),
                minutes=600.0,
            ),
        ),
    )


def hub(name: str, split: str, subset: str | None = None) -> Examples:
    return Examples(path=f"hf:{name}", split=split, subset=subset)
