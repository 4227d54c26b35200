"""The other road: from raw text to a tokenizer and a small Llama, beside an n-gram baseline."""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.data.corpus import TextCorpus
from treadle.data.documents import Documents
from treadle.data.python_docs import PythonDocs
from treadle.evals.continuations import Continuations
from treadle.evals.evaluate import Evaluate, Reading
from treadle.evals.ngram_baseline import NgramBaseline
from treadle.models.llama import tiny_llama
from treadle.models.source import Fresh
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import WSD
from treadle.reports.report import Report
from treadle.tokenizers.train import ByteLevelBPE
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained
from treadle.train.tokenizer import TrainTokenizer

VOCABULARY = 4096


def quickstart_scratch() -> Pipeline:
    documents: Documents = PythonDocs()
    trained = Trained(step="pretrain")
    readings = (Reading(name="python docs", documents=documents, context=256),)
    return Pipeline(
        name="quickstart-scratch",
        steps=(
            TrainTokenizer(
                documents=documents, tokenizer=ByteLevelBPE(vocab_size=VOCABULARY), minutes=0.2
            ),
            Run(
                name="pretrain",
                model=Fresh(decoder=tiny_llama(VOCABULARY, dim=256, layers=6), step="tokenizer"),
                source=TextCorpus(documents=documents, context=256, tokens_per_step=2048),
                objective=CausalLM(),
                optimizer=AdamW(lr=2e-3, weight_decay=0.1),
                schedule=WSD(),
                fit=Fit(steps=1200, checkpoint_every=200),
                minutes=8.0,
            ),
            NgramBaseline(model=trained, documents=documents, readings=readings, minutes=0.5),
            Evaluate(
                name="measure-pretrain",
                subject="pretrain",
                model=trained,
                readings=readings,
            ),
            Continuations(
                name="samples",
                model=trained,
                beginnings=("Return a list of", "The following example shows how to", "If the"),
            ),
            Report(),
        ),
    )
