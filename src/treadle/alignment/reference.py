"""The reference of preference learning: log-probabilities computed once, before training."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from treadle.alignment.trees import Tree, TreeStream, assemble_trees, in_parts, tree_size
from treadle.core.config import Config
from treadle.core.files import atomic_file
from treadle.data.batch import within_budget
from treadle.data.source import Env
from treadle.nn.modes import evaluating
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
    """The model as the run finds it; the numbers are kept beside the run as they come, and survive
    a restart."""

    @torch.no_grad()
    def __call__(
        self, env: Env, numbers: list[int], tree: Callable[[int], Tree], tokens: int
    ) -> Float[Tensor, "R A"]:
        path = env.scratch / "reference.safetensors"
        known = _read(path) if path.exists() else {}
        if missing := [i for i in numbers if i not in known]:
            before = len(known)
            with _progress(env, len(missing)) as done:
                for part in in_parts(missing):
                    known |= _asked(env, part, [tree(i) for i in part], tokens)
                    _write(path, known)
                    done(len(known) - before)
        return torch.stack([known[i] for i in numbers])


def _asked(
    env: Env, numbers: Sequence[int], trees: Sequence[Tree], tokens: int
) -> dict[int, Float[Tensor, " A"]]:
    found: dict[int, Float[Tensor, " A"]] = {}
    with evaluating(env.model), env.autocast():
        for run in within_budget([tree_size(t) for t in trees], tokens):
            batch = assemble_trees([trees[i] for i in run]).to(env.device)
            rows = sequence_logprobs(env.model, batch).cpu().unflatten(0, (len(run), -1))
            found |= {numbers[i]: row for i, row in zip(run, rows, strict=True)}
    return found


def _write(path: Path, known: Mapping[int, Float[Tensor, " A"]]) -> None:
    found = torch.tensor(list(known)), torch.stack(list(known.values()))
    with atomic_file(path) as temporary:
        save_file(dict(zip(("numbers", "logprobs"), found, strict=True)), temporary)


def _read(path: Path) -> dict[int, Float[Tensor, " A"]]:
    kept = load_file(path)
    return dict(zip(kept["numbers"].tolist(), kept["logprobs"], strict=True))


@contextmanager
def _progress(env: Env, total: int) -> Iterator[Callable[[float], None]]:
    if env.workspace is None:
        yield lambda done: None
        return
    with env.workspace.progress.task("reference", total) as task:
        yield task.update


def reference_of(stream: TreeStream, reference: Reference) -> Float[Tensor, "K A"] | None:
    """What a reference says of the answers of the K trees that a stream has kept: of those that the
    run will come to, and NaN of the others."""
    coming = stream.coming()
    numbers = [stream.kept[i] for i in coming]
    rows = reference(stream.env, numbers, stream.tree, stream.tokens)
    if rows is None:
        return None
    table = rows.new_full((len(stream.kept), rows.shape[1]), math.nan)
    table[torch.tensor(coming)] = rows
    return table
