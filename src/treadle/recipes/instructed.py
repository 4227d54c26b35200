"""Instructions that a program checks: what recipes of reinforcement share."""

from __future__ import annotations

from treadle.alignment.instructions import FollowInstructions
from treadle.alignment.rollouts import Rollouts
from treadle.evals.evaluate import Evaluate, Exam
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource, Pretrained

BASE = Pretrained(name="smollm2-135m-instruct")
"""It follows one in six as it was published."""
LONGEST = 40
"""Tokens of an answer at most."""
UNSEEN = FollowInstructions(held_out=True)


def rollouts() -> Rollouts:
    return Rollouts(
        problems=FollowInstructions(seed=1),
        prompts=8,
        completions=8,
        sampling=Sampling(max_tokens=LONGEST),
    )


def followed(subject: str, model: ModelSource) -> Evaluate:
    """Unseen instructions; answers are sampled as they are in training."""
    return Evaluate(
        name=f"measure-{subject}",
        subject=subject,
        model=model,
        exams=(Exam(name="instructions", problems=UNSEEN, count=150),),
        sampling=Sampling(max_tokens=LONGEST),
        minutes=0.5,
    )
