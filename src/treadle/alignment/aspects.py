"""Pairs compared in several aspects, and as a whole, in one stream; and what a mixture makes of
them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from treadle.alignment.confidence import confidences_of
from treadle.alignment.measure import Judge
from treadle.alignment.preferences import Pairs, pair_tree
from treadle.alignment.trees import Tree, TreeStream, assemble_trees, extended
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.batch import Batch
from treadle.data.source import Env, Source
from treadle.models.decoder import DecoderModel
from treadle.objectives.reward_mixture import WHOLE, AspectBatch, mixture_scores


class Aspect(Config):
    """Pairs that were compared in one aspect."""

    name: str = Field(min_length=1)
    pairs: Pairs


class AspectPreferences(Source):
    """The pairs of all aspects, and the same pairs again as whole verdicts for the gate."""

    aspects: tuple[Aspect, ...] = Field(min_length=2)
    whole: tuple[Pairs, ...] = ()
    """Pairs that were compared as a whole; if none are named, those of the aspects stand for
    them: then a prompt is to be judged in the aspect in which such prompts were compared."""
    per_step: int = Field(16, ge=1)
    tokens: int = Field(4096, ge=8)
    longest: int = Field(512, ge=2)

    @model_validator(mode="after")
    def _names_differ(self) -> AspectPreferences:
        names = [a.name for a in self.aspects]
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            raise ValueError(f"two aspects are called `{min(twice)}`: rename one")
        return self

    def open(self, env: Env) -> AspectStream:
        return AspectStream(self, env)


class AspectStream(TreeStream):
    """Trees of a prompt, the chosen answer and the rejected one."""

    def __init__(self, config: AspectPreferences, env: Env) -> None:
        self.longest = config.longest
        parts = [a.pairs.resolve(env.workspace) for a in config.aspects]
        whole = [p.resolve(env.workspace) for p in config.whole] or parts
        supplies = [(k, p) for k, p in enumerate(parts)] + [(WHOLE, p) for p in whole]
        self.index = [(k, p, i) for k, p in supplies for i in range(p.count())]
        """Aspect, supply and number in it of each pair."""
        count, per_step, tokens = len(self.index), config.per_step, config.tokens
        super().__init__(env, count=count, per_step=per_step, tokens=tokens, what="pair")
        used = {self.index[i][0] for i in self.kept}
        asked = {k: f"of the aspect `{a.name}`" for k, a in enumerate(config.aspects)}
        for k, which in {**asked, WHOLE: "of those compared as a whole"}.items():
            if k not in used:
                raise TreadleError(
                    f"no pair {which} can be learned from: see {env.scratch / 'left_out.json'}"
                )
        records = [p.pair(i) for _, p, i in (self.index[n] for n in self.kept)]
        self.confidence = confidences_of(records)

    def tree(self, index: int) -> Tree:
        _, pairs, number = self.index[index]
        return pair_tree(self.env, pairs, self.longest, number)

    def batch(self, trees: list[Tree], places: list[int]) -> AspectBatch:
        rows = torch.tensor(places)
        return extended(
            AspectBatch,
            assemble_trees(trees),
            aspects=torch.tensor([self.index[self.kept[i]][0] for i in places]),
            confidence=None if self.confidence is None else self.confidence[rows],
        )


class MixtureOf(Judge):
    """What a mixture of rewards says, by its gate."""

    def __call__(self, model: DecoderModel, batch: Batch) -> Float[Tensor, " S"]:
        return mixture_scores(model, batch).scores


class AspectOf(Judge):
    """What it says in one aspect."""

    number: int = Field(ge=0)

    def __call__(self, model: DecoderModel, batch: Batch) -> Float[Tensor, " S"]:
        aspects = mixture_scores(model, batch).aspects
        if self.number >= aspects.shape[1]:
            raise TreadleError(
                f"AspectOf: there is no aspect {self.number}; the model has {aspects.shape[1]}"
            )
        return aspects[:, self.number]
