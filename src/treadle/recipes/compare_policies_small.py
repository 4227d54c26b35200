"""The contest of `compare-policies` with a model of a million weights that learns from nothing.

It has its own tokenizer and reads sums only, so that all 24 runs take minutes: for trying things
out, and for seeing how far seeds differ. What it says of methods holds for this model alone.
"""

from __future__ import annotations

from treadle.alignment.reasoning_gym import Family, ReasoningGym
from treadle.alignment.samplers import OwnWeights
from treadle.alignment.worked_solutions import WorkedSolutions
from treadle.core.pipeline import Pipeline
from treadle.data.chat_texts import ChatTexts
from treadle.data.supervised import Supervised
from treadle.models.llama import tiny_llama
from treadle.models.source import Fresh
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.recipes.policy_methods import Contest
from treadle.reports.report import Report
from treadle.reports.seeds import SeedTable
from treadle.tokenizers.train import ByteLevelBPE
from treadle.train.fit import Fit
from treadle.train.precision import FP32
from treadle.train.run import Run, Trained
from treadle.train.tokenizer import TrainTokenizer

VOCABULARY = 300
SUMS = ReasoningGym(
    families=(
        Family(
            name="chain_sum",
            settings=(("min_terms", 2), ("max_terms", 2), ("min_digits", 1), ("max_digits", 2)),
        ),
    ),
    instruction="",
)


def compare_policies_small() -> Pipeline:
    worked = WorkedSolutions(problems=SUMS, amount=8192)
    decoder = tiny_llama(VOCABULARY, dim=128, layers=4, heads=4, kv_heads=2, context=256)
    start = Run(
        name="sft",
        model=Fresh(decoder=decoder, step="tokenizer"),
        source=Supervised(conversations=worked, per_step=32),
        objective=CausalLM(),
        optimizer=AdamW(lr=2e-3),
        fit=Fit(steps=400, precision=FP32()),
        minutes=2.0,
    )
    contest = Contest(
        start=Trained(step="sft"),
        problems=SUMS,
        held_out=SUMS.replace(split="heldout"),
        sampler=OwnWeights(),
        longest=32,
        lots=24,
        lr=3e-4,
        minutes=0.4,
    )
    tokenizer = TrainTokenizer(
        documents=ChatTexts(conversations=worked, amount=512),
        tokenizer=ByteLevelBPE(vocab_size=VOCABULARY),
        minutes=0.1,
    )
    measured = contest.measured("sft", Trained(step="sft"))
    return Pipeline(
        name="compare-policies-small",
        steps=(tokenizer, start, measured, *contest.steps(), SeedTable(), Report()),
    )
