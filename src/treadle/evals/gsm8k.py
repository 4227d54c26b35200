"""GSM8K: grade-school word problems, solved in steps that end with `#### 42`.

Scored twice: `strict` wants the answer behind `####`, `flexible` takes the last number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from treadle.core.cards import Card
from treadle.evals.generative import Extraction, Generative, OpenItem
from treadle.evals.rows import Examples, Row, wrong_row
from treadle.evals.shots import Shots, before
from treadle.inference.sampling import Sampling

CARD = Card(
    id="ev.gsm8k",
    paper="Cobbe et al. 2021, arXiv:2110.14168; Wei et al. 2022, arXiv:2201.11903",
    summary="GSM8K with worked shots, strict and flexible extraction.",
    recipe="treadle eval smollm2-135m-instruct --like standard-benchmarks",
    oracle="tests/evals/test_evals_gsm8k.py::test_matches_lm_eval",
)

STRICT = Extraction(name="strict", pattern=r"#### (-?[0-9.,]+)")
FLEXIBLE = Extraction(name="flexible", pattern=r"(-?[$0-9.,]{2,})|(-?[0-9]+)", match=-1)


class GSM8K(Generative):
    """Rows with `question` and `answer`; five shots of the training split are usual."""

    name: str = "gsm8k"
    rows: Examples
    shots: Shots | None = None
    sampling: Sampling = Sampling(
        temperature=0.0, max_tokens=256, stop=("Question:", "</s>", "<|im_end|>")
    )
    extractions: tuple[Extraction, ...] = (STRICT, FLEXIBLE)

    def items(self) -> Sequence[OpenItem]:
        pool = [self._shot(row) for row in self.shots.rows.open()] if self.shots else []
        items = []
        for index, row in enumerate(self.rows.take(self.limit)):
            shots = before(self.shots, pool, index, self._shot(row))
            items.append(OpenItem(index, "", shots + self._question(row), row["answer"]))
        return items

    def marks(self, item: OpenItem, text: str) -> Mapping[str, float]:
        wanted = normal(item.target)
        found = {extraction.name: extraction(text) for extraction in self.extractions}
        return {k: float(v is not None and normal(v) == wanted) for k, v in found.items()}

    def _question(self, row: Row) -> str:
        if not {"question", "answer"} <= row.keys():
            raise wrong_row(self.name, row)
        return f"Question: {row['question']}\nAnswer:"

    def _shot(self, row: Row) -> str:
        return f"{self._question(row)} {row['answer']}"


def normal(answer: str) -> str:
    """The number alone: no steps before `####`, dollars, thousands' commas or full stop."""
    return re.sub(r",|\$|(?s:.*)#### |\.$", "", answer).lower()
