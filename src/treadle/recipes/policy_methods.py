"""PPO and the variants of GRPO as values of the same axes, and a contest among them."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.alignment.advantages import (
    Advantage,
    BatchNormalised,
    GroupCentred,
    GroupNormalised,
    LeaveOneOut,
)
from treadle.alignment.ppo import PPORollouts
from treadle.alignment.rollouts import Rollouts
from treadle.alignment.samplers import Sampler
from treadle.alignment.value_head import ValueHead
from treadle.core.pipeline import Step
from treadle.data.problems import Problems
from treadle.evals.evaluate import Evaluate, Exam
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource
from treadle.models.transform import Transform
from treadle.objectives.policy import (
    GRPO,
    ClippedRatio,
    ClippedWeight,
    PerBudget,
    PerToken,
    SequenceRatio,
)
from treadle.objectives.ppo import PPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained


@dataclass(frozen=True)
class Contest:
    """What all methods have in common: the start, the problems and the budget of samples."""

    start: ModelSource
    problems: Problems
    """With a seed, which the contest sets."""
    held_out: Problems
    """Of the same kind, none of which is trained on."""
    sampler: Sampler
    longest: int
    """Tokens of an answer at most."""
    lots: int
    """Times that `prompts` x `completions` answers are sampled."""
    lr: float
    transforms: tuple[Transform, ...] = ()
    """What is trained of the start; all of it if empty."""
    temperature: float = 0.0
    """Of the answers that are measured."""
    seeds: int = 3
    prompts: int = 8
    completions: int = 8
    exam: int = 100
    """Held-out problems."""
    minutes: float = 2.0

    def steps(self) -> list[Step]:
        """Every method from every seed, each measured."""
        found: list[Step] = []
        for seed in range(self.seeds):
            for name, advantage, objective in variants(self.longest):
                run = self.run(f"{name}-s{seed}", seed).replace(objective=objective)
                source = self.rollouts(seed).replace(advantage=advantage)
                found += [run.replace(source=source), self.measured(run.name)]
            # Each lot is learned in two halves, so PPO takes twice the steps with equal samples.
            lots = PPORollouts(rollouts=self.rollouts(seed), epochs=1, minibatches=2)
            ppo = self.run(f"ppo-s{seed}", seed).replace(
                transforms=(*self.transforms, ValueHead()),
                source=lots,
                fit=Fit(steps=2 * self.lots),
            )
            found += [ppo, self.measured(ppo.name)]
        return found

    def run(self, name: str, seed: int) -> Run:
        return Run(
            name=name,
            model=self.start,
            transforms=self.transforms,
            source=self.rollouts(seed),
            objective=PPO(),
            optimizer=AdamW(lr=self.lr),
            schedule=Constant(),
            fit=Fit(steps=self.lots),
            minutes=self.minutes,
            seed=seed,
        )

    def rollouts(self, seed: int) -> Rollouts:
        return Rollouts(
            problems=self.problems.replace(seed=1 + seed),
            prompts=self.prompts,
            completions=self.completions,
            sampling=Sampling(max_tokens=self.longest),
            sampler=self.sampler,
        )

    def measured(self, subject: str, model: ModelSource | None = None) -> Evaluate:
        """Held-out problems."""
        return Evaluate(
            name=f"measure-{subject}",
            subject=subject,
            model=model or Trained(step=subject),
            exams=(Exam(name="held out", problems=self.held_out, count=self.exam),),
            sampling=Sampling(temperature=self.temperature, max_tokens=self.longest),
            minutes=0.3,
        )


def variants(longest: int) -> tuple[tuple[str, Advantage, GRPO], ...]:
    """Name, advantage, and ratio, clipping and normalisation of the family of GRPO."""
    whole = PerBudget(tokens=longest)
    # The paper's bounds of 3e-4 are for samples in full precision; rounded ones are farther away.
    sequence = GRPO(ratio=SequenceRatio(), surrogate=ClippedRatio(low=0.1, high=0.1))
    return (
        ("grpo", GroupNormalised(), GRPO()),
        ("dr-grpo", GroupCentred(), GRPO(normalisation=whole)),
        (
            "dapo",
            GroupNormalised(),
            GRPO(surrogate=ClippedRatio(high=0.28), normalisation=PerToken()),
        ),
        ("gspo", GroupNormalised(), sequence),
        ("cispo", GroupNormalised(), GRPO(surrogate=ClippedWeight(), normalisation=PerToken())),
        ("rloo", LeaveOneOut(), GRPO(normalisation=whole)),
        ("reinforce-pp", BatchNormalised(), GRPO(normalisation=PerToken())),
    )
