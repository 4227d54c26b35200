"""A reward model as the reward: what people prefer, learned from pairs, is earned by answers.

    r = sigmoid(s(x, y) - c),     s the model's score

By Bradley and Terry that is the probability that the answer is better than one whose score is c.
Beyond that nothing is to be gained, so a policy has less to win by going where the scores are
large and wrong (Wang et al. 2024, arXiv:2402.00742). A reward model can be gamed all the same
(Gao et al. 2022, arXiv:2210.10760): hold the policy to a reference, join several models by
`Weighted` with `UncertaintyWeighted` or `WorstOf`, and measure by something else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from pydantic import Field

from treadle.alignment.measure import Judge, ScoreOf
from treadle.alignment.trees import Tree, answer_tree, assemble_trees, says_something
from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.data.batch import within_budget
from treadle.data.rating import Rater, Rating, Scored
from treadle.data.records import Problem, assistant
from treadle.data.source import Env
from treadle.inference.reasoning.strategy import visible
from treadle.models.source import ModelSource
from treadle.tokenizers.load import tokenizer_of
from treadle.train.precision import Auto, Precision

CARD = Card(
    id="al.reward.learned",
    paper="Ouyang et al. 2022, arXiv:2203.02155; Wang et al. 2024, arXiv:2402.00742",
    summary="Answers earn what a reward model, or several of them, says of them.",
    recipe="treadle run rlhf",
    oracle="tests/alignment/test_alignment_learned_reward.py::test_rewards_match_transformers",
)


class LearnedReward(Rating):
    """What a trained model says of what the user sees: private reasoning is not read. The prompt
    of a group is computed once for all its answers."""

    model: ModelSource
    judge: Judge = ScoreOf()
    """`MixtureOf` or `AspectOf` where the model is a mixture."""
    centre: float = 0.0
    """The score that is worth one half."""
    longest: int = Field(1024, ge=2)
    """Prompt and answer are read up to this many tokens, or to the model's context."""
    tokens: int = Field(4096, ge=1)
    """Most tokens in a pass."""
    precision: Precision = Auto()

    def open(self, env: Env, patience: float) -> Rater:
        """A rater: an answer that says nothing is worth 0; one that the model cannot read, since
        its prompt fills the context, is counted as a failure.

        Raises:
            TreadleError: there is no pipeline to find the model in, or it gives no such score.
        """
        if env.workspace is None:
            raise TreadleError("LearnedReward: models are found in pipelines alone")
        opened = self.model.open(env.workspace)
        precision = self.precision.resolve(env.device)
        model = opened.model.eval().requires_grad_(False).to(env.device)
        precision.prepare(model)
        reader = Env(
            model=model,
            tokenizer=tokenizer_of(opened),
            scratch=env.scratch,
            device=env.device,
            autocast=partial(precision.autocast, env.device),
        )
        return partial(self._rate, reader)

    def _rate(self, reader: Env, problem: Problem, texts: Sequence[str]) -> list[Scored]:
        answers = [(assistant(visible(text)),) for text in texts]
        said = [i for i, answer in enumerate(answers) if says_something(answer)]
        found = [Scored(0.0) for _ in texts]
        if not said:
            return found
        try:
            read = [answers[i] for i in said]
            tree = answer_tree(reader, problem.prompt, read, self.longest)
        except TreadleError as error:
            return [Scored(0.0, failure=f"the reward model cannot read it: {error}") for _ in texts]
        for place, score in zip(said, self._scores(reader, tree), strict=True):
            found[place] = self._worth(score)
        return found

    def _worth(self, score: float) -> Scored:
        if not math.isfinite(score):
            return Scored(0.0, failure=f"the reward model's score was {score}")
        return Scored(1 / (1 + math.exp(min(self.centre - score, 700.0))))

    @torch.no_grad()
    def _scores(self, reader: Env, tree: Tree) -> list[float]:
        """Of each answer, as many in a pass as there is room for beside the prompt."""
        root, answers = tree[0], tree[1:]
        room = max(self.tokens - len(root.tokens), 1)
        scores: list[float] = []
        for run in within_budget([len(a.tokens) for a in answers], room):
            batch = assemble_trees([[root, *(answers[i] for i in run)]]).to(reader.device)
            with reader.autocast():
                scores += self.judge(reader.model, batch).float().tolist()
        return scores
