"""What each of several processes does in the tests of rollouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.rollouts import Rollouts
from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.data.source import Env
from treadle.inference.sampling import Sampling
from treadle.objectives.policy import GRPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.train.fit import Fit, fit
from treadle.train.parallel.ddp import DDP
from treadle.train.precision import FP32

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


class SeldomTold(Problems):
    """The first four problems give every answer the same reward, and so do two of each four that
    follow, which are those of the second of two processes."""

    def problem(self, index: int) -> Problem:
        told = index >= 4 and index % 4 < 2
        return Problem((user(f"write {index}"),), "told" if told else "", "letters")

    def score(self, problem: Problem, completion: str) -> float:
        return sum(c.islower() for c in completion) / 8 if problem.answer else 1.0


def learn_in_step(folder: Path) -> None:
    """Two steps of GRPO, and the weights after them."""
    plan, model = DDP(), tiny_model()
    world = plan.setup("cpu")
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    here = Env(model=model, tokenizer=tokenizer, scratch=folder)
    source = Rollouts(
        problems=SeldomTold(), prompts=4, completions=8, sampling=Sampling(max_tokens=8)
    )
    fit(
        model,
        source.open(replace(here, rank=world.rank, world=world.size)),
        GRPO(),
        optimizer=AdamW(lr=1e-2),
        schedule=Constant(),
        config=Fit(steps=2, precision=FP32()),
        plan=plan,
        world=world,
        folder=folder / f"checkpoints-{world.size}",
    )
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    save_file(weights, folder / f"learned-{world.rank}-of-{world.size}.safetensors")
    plan.close()
