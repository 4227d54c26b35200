"""How often a model ranks two answers as the labels of held-out pairs do."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.alignment.preferences import Pairs, pair_tree
from treadle.alignment.trees import assemble_trees, tree_size, usable
from treadle.core.config import Config
from treadle.core.pipeline import Step, Workspace
from treadle.core.results import EVALUATION, Figure, accuracy
from treadle.data.batch import Batch, within_budget
from treadle.data.source import Env
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource
from treadle.objectives.dpo import sequence_logprobs
from treadle.objectives.reward import sequence_scores
from treadle.tokenizers.load import tokenizer_of
from treadle.train.precision import Auto, Precision


class Judge(Config):
    """A shape: how good a model finds an answer."""

    @abstractmethod
    def __call__(self, model: DecoderModel, batch: Batch) -> Float[Tensor, " S"]:
        """Of each answer of a batch of trees."""


class ScoreOf(Judge):
    """What a reward model says."""

    def __call__(self, model: DecoderModel, batch: Batch) -> Float[Tensor, " S"]:
        return sequence_scores(model, batch)


class LikelihoodOf(Judge):
    """How likely a language model finds it, a token on average."""

    def __call__(self, model: DecoderModel, batch: Batch) -> Float[Tensor, " S"]:
        return sequence_logprobs(model, batch) / batch.per_sequence(batch.weights)


class SumOfLikelihoods(Judge):
    """How likely it finds the whole answer: less that of the model before, DPO's own reward."""

    def __call__(self, model: DecoderModel, batch: Batch) -> Float[Tensor, " S"]:
        return sequence_logprobs(model, batch)


class MeasurePreferences(Step):
    """The share of pairs whose chosen answer gets the higher number.

    With `against`, the judge's number for another model is subtracted first: for the log-
    probabilities of a model trained by DPO and those of the model before it, that is the implicit
    reward.
    """

    model: ModelSource
    subject: str
    """The stage that is measured: the name of the step that made the model."""
    pairs: Pairs
    judge: Judge = LikelihoodOf()
    against: ModelSource | None = None
    limit: int = Field(400, ge=1)
    """Take the first so many pairs."""
    tokens: int = Field(4096, ge=8)
    longest: int = Field(512, ge=2)
    precision: Precision = Auto()

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        scores, left_out = self._scores(self.model, workspace)
        if self.against is not None:
            scores = scores - self._scores(self.against, workspace)[0]
        margin = scores[:, 0] - scores[:, 1]
        wins = ((margin > 0).double() + (margin == 0).double() / 2).tolist()
        name = "agreement" if self.against is None else "agreement of the change"
        results: dict[str, Figure] = {name: accuracy(wins)}
        return {
            "kind": EVALUATION,
            "subject": self.subject,
            "results": results,
            "tokens_per_second": None,
            "size_bytes": None,
            "mean_margin": float(margin.mean()),
            "pairs_left_out": left_out,
        }

    def _scores(self, source: ModelSource, workspace: Workspace) -> tuple[Tensor, int]:
        opened = source.open(workspace)
        precision = self.precision.resolve("cpu")
        model = opened.model.eval().requires_grad_(False)
        precision.prepare(model)
        env = Env(model=model, tokenizer=tokenizer_of(opened), scratch=workspace.folder)
        pairs = self.pairs.resolve(workspace)
        tree = partial(pair_tree, env, pairs, self.longest)
        count = min(self.limit, pairs.count())
        kept = usable(count, tree, workspace.folder / "left_out.json", "pair")
        trees = [tree(i) for i in kept]
        rows = []
        runs = within_budget([tree_size(t) for t in trees], self.tokens)
        with (
            workspace.progress.task(self.name, len(trees)) as task,
            precision.autocast("cpu"),
            torch.inference_mode(),
        ):
            for run in runs:
                rows.append(self.judge(model, assemble_trees([trees[i] for i in run])).float())
                task.update(run[-1] + 1)
        return torch.cat(rows).unflatten(0, (-1, 2)), count - len(kept)
