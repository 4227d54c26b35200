"""A small Llama with a tokenizer of its own learns from SmolLM2, whose vocabulary is another.

Twice with the same text and steps: alone, and with its teacher's probabilities rank by rank. The
table says whether the teacher helped.
"""

from __future__ import annotations

from treadle.core.pipeline import Pipeline
from treadle.core.processes import ProcessPerStep
from treadle.data.corpus import TextCorpus
from treadle.data.python_docs import PythonDocs
from treadle.data.source import Source
from treadle.distillation.other_tokenizer import OtherTokenizer
from treadle.distillation.taught import Taught
from treadle.evals.evaluate import Evaluate, Reading
from treadle.models.llama import tiny_llama
from treadle.models.source import Fresh, Pretrained
from treadle.objectives.causal import CausalLM
from treadle.objectives.distil import Distil, HardLabels
from treadle.objectives.objective import Objective
from treadle.objectives.ranked_labels import RankedLabels
from treadle.optim.adamw import AdamW
from treadle.reports.report import Report
from treadle.reports.side_by_side import SideBySide
from treadle.tokenizers.train import ByteLevelBPE
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained
from treadle.train.tokenizer import TrainTokenizer

VOCABULARY, STEPS = 4096, 200
DOCUMENTS = PythonDocs()
TEXT = TextCorpus(documents=DOCUMENTS, context=128, tokens_per_step=1024)


def distill_across() -> Pipeline:
    teacher = Pretrained(name="smollm2-135m-instruct")
    taught = Taught(source=TEXT, teacher=teacher, lesson=OtherTokenizer())
    mixed = Distil(terms=(HardLabels(), RankedLabels(weight=0.5)))
    tokenizer = TrainTokenizer(
        documents=DOCUMENTS, tokenizer=ByteLevelBPE(vocab_size=VOCABULARY), minutes=0.2
    )
    runs = (learn("alone", TEXT, CausalLM()), learn("ranked", taught, mixed))
    steps = (step for run in runs for step in (run, read(run.name)))
    return Pipeline(
        name="distill-across",
        steps=(tokenizer, *steps, SideBySide(), Report()),
        processes=ProcessPerStep(),
    )


def learn(name: str, source: Source, objective: Objective) -> Run:
    return Run(
        name=name,
        model=Fresh(decoder=tiny_llama(VOCABULARY, dim=256, layers=6), step="tokenizer"),
        source=source,
        objective=objective,
        optimizer=AdamW(lr=2e-3, weight_decay=0.1),
        fit=Fit(steps=STEPS, checkpoint_every=STEPS),
        minutes=2.0,
    )


def read(subject: str) -> Evaluate:
    reading = Reading(name="python docs", documents=DOCUMENTS, context=128)
    model = Trained(step=subject)
    return Evaluate(name=f"measure-{subject}", subject=subject, model=model, readings=(reading,))
