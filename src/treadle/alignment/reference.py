"""The reference of preference learning: log-probabilities computed once, before training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from treadle.alignment.trees import Tree, assemble_trees, tree_size
from treadle.core.config import Config
from treadle.core.files import atomic_file
from treadle.data.batch import within_budget
from treadle.data.source import Env
from treadle.objectives.dpo import sequence_logprobs


class Reference(Config):
    """A shape: log-probabilities of answers under a model that is not trained."""

    @abstractmethod
    def __call__(
        self, env: Env, numbers: list[int], tree: Callable[[int], Tree], tokens: int
    ) -> Float[Tensor, "R A"] | None:
        """Of the A answers of each of the trees `numbers`; `tokens` at most in one pass."""


class NoReference(Reference):
    """For objectives that need none, such as SimPO, ORPO, CPO and reward models."""

    def __call__(
        self, env: Env, numbers: list[int], tree: Callable[[int], Tree], tokens: int
    ) -> None:
        return None


class InitialModel(Reference):
    """The model as the run finds it; the numbers are kept beside the run and survive a restart."""

    @torch.no_grad()
    def __call__(
        self, env: Env, numbers: list[int], tree: Callable[[int], Tree], tokens: int
    ) -> Float[Tensor, "R A"]:
        path = env.scratch / "reference.safetensors"
        if not path.exists():
            trees = [tree(i) for i in numbers]
            parts = []
            with evaluating(env.model), env.autocast():
                for run in within_budget([tree_size(t) for t in trees], tokens):
                    batch = assemble_trees([trees[i] for i in run]).to(env.device)
                    parts.append(sequence_logprobs(env.model, batch).cpu())
            table = torch.cat(parts).unflatten(0, (len(trees), -1))
            with atomic_file(path) as temporary:
                save_file({"logprobs": table}, temporary)
        return load_file(path)["logprobs"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout meanwhile."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
