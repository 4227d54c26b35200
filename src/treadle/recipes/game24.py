"""A small model learns the Game of 24 from worked games; then trees of thoughts against chains.

It learns to make moves and to judge beginnings; a search that asks both spends tokens on branches,
a chain on whole attempts. The table has accuracy and tokens of each way.
"""

from __future__ import annotations

from treadle.alignment.game24 import Game24, Game24Lessons
from treadle.core.pipeline import Pipeline
from treadle.data.chat_texts import ChatTexts
from treadle.data.supervised import Supervised
from treadle.evals.evaluate import Exam
from treadle.evals.reason import Reason
from treadle.inference.reasoning.prompting import OneAnswer
from treadle.inference.reasoning.tree import MCTS, Beam, ByModel, DepthFirst, Search, TreeOfThoughts
from treadle.inference.reasoning.votes import BestOfN, ByVerifier, SelfConsistency
from treadle.inference.sampling import Sampling
from treadle.models.llama import tiny_llama
from treadle.models.source import Fresh
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.reports.report import Report
from treadle.tokenizers.chat import LastTurn
from treadle.tokenizers.train import ByteLevelBPE
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained
from treadle.train.tokenizer import TrainTokenizer

VOCABULARY = 384
CHAIN = Sampling(max_tokens=64)


def game24() -> Pipeline:
    lessons = Game24Lessons()
    tokenizer = TrainTokenizer(
        documents=ChatTexts(conversations=lessons, amount=1024),
        tokenizer=ByteLevelBPE(vocab_size=VOCABULARY),
        minutes=0.2,
    )
    decoder = tiny_llama(VOCABULARY, dim=192, layers=6, heads=6, kv_heads=3, context=256)
    learn = Run(
        name="sft",
        model=Fresh(decoder=decoder, step="tokenizer"),
        source=Supervised(conversations=lessons, per_step=64, tokens=4096, turns=LastTurn()),
        objective=CausalLM(),
        optimizer=AdamW(lr=2e-3),
        fit=Fit(steps=1500, checkpoint_every=100),
        minutes=12.0,
    )
    chains = (
        OneAnswer(sampling=CHAIN.replace(temperature=0.0)),
        OneAnswer(sampling=CHAIN),
        *(SelfConsistency(n=n, sampling=CHAIN) for n in (8, 24)),
        *(BestOfN(n=n, sampling=CHAIN) for n in (8, 24)),
        BestOfN(n=24, sampling=CHAIN, by=ByVerifier()),
    )
    trees = (
        tree(Beam(width=3, depth=4)),
        tree(Beam(width=5, depth=4)),
        tree(DepthFirst(threshold=0.3, depth=4, visits=12, enough=0.9)),
        tree(MCTS(simulations=12, depth=4)),
    )
    reason = Reason(
        name="reason",
        model=Trained(step="sft"),
        strategies=(*chains, *trees),
        exams=(Exam(name="game24", problems=Game24(held_out=True), count=100),),
        minutes=8.0,
    )
    return Pipeline(name="game24", steps=(tokenizer, learn, reason, Report()))


def tree(search: Search) -> TreeOfThoughts:
    line = Sampling(max_tokens=24, stop=("\n",))
    return TreeOfThoughts(search=search, branching=6, valuation=ByModel(), sampling=line)
