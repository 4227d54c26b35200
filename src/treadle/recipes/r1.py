"""The road of DeepSeek-R1: a model learns to think, by a little teaching and much reinforcement.

cold-start    a few worked solutions whose steps stand in a private channel
reason        GRPO on problems with a verifier
rejection     what the reinforced model writes, where the verifier accepts it
general       what the base model writes when it keeps to instructions
sft           the base model learns both, anew
final         reinforcement on problems and on instructions

Guo et al. 2025, arXiv:2501.12948, section 2.3. Each stage is measured on held-out problems.
"""

from __future__ import annotations

from treadle.alignment.frozen import FrozenCopy
from treadle.alignment.instructions import FollowInstructions
from treadle.alignment.private_reasoning import OfVisible, ThinkFirst
from treadle.alignment.reasoning_gym import ReasoningGym
from treadle.alignment.rejection import RejectionSample, Sampled, SampledAndGeneral
from treadle.alignment.rewards import Part, PrivatelyReasoned, Reward, Weighted
from treadle.alignment.rollouts import Rollouts
from treadle.alignment.samplers import NativeKernels
from treadle.core.pipeline import Pipeline, Step
from treadle.data.problems import Interleaved, Problems
from treadle.data.supervised import Supervised
from treadle.evals.evaluate import Exam
from treadle.evals.thinking import MeasureThinking
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource, Pretrained
from treadle.objectives.policy import GRPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.recipes.families import QUICKSTART
from treadle.recipes.quickstart import lessons, sft
from treadle.reports.report import Report
from treadle.reports.side_by_side import SideBySide
from treadle.train.fit import Fit
from treadle.train.run import Run, Trained

FAMILIES = QUICKSTART[1:]
BASE = Pretrained(name="smollm2-135m-instruct")
TRAINING = ReasoningGym(families=FAMILIES, seed=1)
THINKING = Weighted(
    parts=(
        Part(name="correct", reward=OfVisible(), weight=0.9),
        Part(name="format", reward=PrivatelyReasoned(), weight=0.1),
    )
)


def r1() -> Pipeline:
    taught = ThinkFirst(of=lessons(*FAMILIES).conversations)
    cold = sft(BASE).replace(
        name="cold-start",
        source=Supervised(conversations=taught, per_step=8),
        fit=Fit(steps=24, checkpoint_every=4),
    )
    mixed = SampledAndGeneral(
        sampled=(Sampled(step="rejection"), Sampled(step="general")), per_step=8
    )
    again = sft(BASE).replace(source=mixed, fit=Fit(steps=24, checkpoint_every=4))
    both = Interleaved(families=(TRAINING.replace(reward=THINKING, seed=3), FollowInstructions()))
    runs = (
        (cold,),
        (reinforced("reason", "cold-start", rollouts(TRAINING).replace(reward=THINKING), 12),),
        (
            accepted("rejection", Trained(step="reason"), TRAINING.replace(seed=2), 8),
            accepted("general", BASE, FollowInstructions(seed=2), 3, reward=None),
            again,
        ),
        (reinforced("final", "sft", rollouts(both), 6),),
    )
    steps: list[Step] = [measured("base", BASE)]
    for stage in runs:
        steps += [*stage, measured(stage[-1].name, Trained(step=stage[-1].name), BASE)]
    return Pipeline(name="r1", steps=(*steps, SideBySide(), Report()))


def rollouts(problems: Problems) -> Rollouts:
    return Rollouts(
        problems=problems,
        completions=6,
        sampling=Sampling(max_tokens=96),
        tokens=2048,
        reference=FrozenCopy(),
        sampler=NativeKernels(),
    )


def reinforced(name: str, start: str, source: Rollouts, steps: int) -> Run:
    """GRPO, held to the model that it starts from."""
    return Run(
        name=name,
        model=Trained(step=start),
        source=source,
        objective=GRPO(beta=0.001),
        optimizer=AdamW(lr=1e-4),
        schedule=Constant(),
        fit=Fit(steps=steps, checkpoint_every=2),
        minutes=steps * 0.8,
    )


def accepted(
    name: str, model: ModelSource, problems: Problems, rounds: int, reward: Reward | None = THINKING
) -> RejectionSample:
    source = rollouts(problems).replace(completions=4, reward=reward)
    return RejectionSample(name=name, model=model, rollouts=source, rounds=rounds, minutes=3.0)


def measured(
    subject: str, model: ModelSource, against: ModelSource | None = None
) -> MeasureThinking:
    """The same held-out problems for every stage, and how far it went from the base model."""
    return MeasureThinking(
        name=f"measure-{subject}",
        subject=subject,
        model=model,
        exams=tuple(
            Exam(
                name=family.name,
                problems=ReasoningGym(families=(family,), split="heldout"),
                count=60,
            )
            for family in FAMILIES
        ),
        against=against,
    )
