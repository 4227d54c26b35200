"""An encoder learns the language of a field: words of its text are hidden, and it says which."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.data.masked import MaskedTexts
from treadle.data.python_docs import PythonDocs
from treadle.models.heads import WordHead
from treadle.models.source import Pretrained
from treadle.objectives.masked import MaskedLM
from treadle.optim.adamw import AdamW
from treadle.reports.report import Report
from treadle.train.fit import Fit
from treadle.train.run import Run


def masked_words() -> Pipeline:
    train = Run(
        name="train",
        model=Pretrained(name="all-minilm-l6-v2"),
        transforms=(WordHead(),),
        source=MaskedTexts(documents=PythonDocs()),
        objective=MaskedLM(),
        optimizer=AdamW(lr=3e-4),
        fit=Fit(steps=200, checkpoint_every=100),
        minutes=5.0,
    )
    return Pipeline(name="masked-words", steps=(train, Report()))
