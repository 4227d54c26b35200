"""Private reasoning: the shape of what is learned, and a model that keeps to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.private_reasoning import ThinkFirst
from treadle.alignment.reasoning_gym import Family, ReasoningGym
from treadle.alignment.rewards import PrivatelyReasoned
from treadle.alignment.verifiers import extract_answer, marks
from treadle.alignment.worked_solutions import WorkedSolutions
from treadle.core.errors import TreadleError
from treadle.data.records import Chat, Problem, assistant, user
from treadle.data.source import Env
from treadle.data.supervised import Conversations, Supervised
from treadle.inference.engine import Engine
from treadle.inference.reasoning.prompting import OneAnswer
from treadle.inference.reasoning.strategy import Thinker, private, visible
from treadle.inference.sampling import Sampling
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.train.fit import Fit, fit
from treadle.train.parallel.plan import SingleProcess
from treadle.train.precision import FP32

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<end>{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
PROBLEM = Problem((user("?"),), "4", "number")


class Given(Conversations):
    text: str = "1 + 3 = 4\nAnswer: 4"

    def conversation(self, index: int) -> Chat:
        return Chat((user("?"), assistant(self.text)))

    def count(self) -> int:
        return 1


def test_steps_are_put_into_tags() -> None:
    said = ThinkFirst(of=Given()).conversation(0).messages[-1].content
    assert said == "<think>\n1 + 3 = 4\n</think>\nAnswer: 4"
    bare = ThinkFirst(of=Given(text="Answer: 4")).conversation(0).messages[-1].content
    assert visible(bare) == "Answer: 4"
    with pytest.raises(TreadleError, match="conversation 0: its last turn has no line"):
        ThinkFirst(of=Given(text="It is 4.")).conversation(0)


def test_solutions_stay_right() -> None:
    pytest.importorskip("reasoning_gym")
    solutions = WorkedSolutions(problems=ReasoningGym(families=(Family(name="leg_counting"),)))
    for index in range(20):
        said = ThinkFirst(of=solutions).conversation(index).messages[-1].content
        problem = solutions.problems.problem(index)
        assert marks(problem, visible(said)) == 1.0
        assert private(said) in solutions.conversation(index).messages[-1].content
        assert PrivatelyReasoned()(problem, said) == 1.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think>\nAnswer: 4", 1.0),
        ("<think></think>\nAnswer: 4", 0.0),
        ("<think>Answer: 4</think>\nfour", 0.0),
        ("<think>a</think><think>b</think>\nAnswer: 4", 0.0),
        ("so <think>a</think>\nAnswer: 4", 0.0),
        ("Answer: 4", 0.0),
    ],
)
def test_the_format_is_rewarded(text: str, reward: float) -> None:
    assert PrivatelyReasoned()(PROBLEM, text) == reward


def test_a_trained_model_thinks_in_private(tmp_path: Path) -> None:
    """What it writes after training: reasoning that is hidden, and an answer that is not."""
    model, plan = tiny_model(), SingleProcess()
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    source = Supervised(conversations=ThinkFirst(of=Given()), per_step=1)
    torch.manual_seed(0)
    fit(
        model,
        source.open(Env(model=model, tokenizer=tokenizer, scratch=tmp_path)),
        CausalLM(),
        optimizer=AdamW(lr=2e-2),
        schedule=Constant(),
        config=Fit(steps=80, precision=FP32()),
        plan=plan,
        world=plan.setup("cpu"),
        folder=tmp_path / "checkpoints",
    )
    thinker = Thinker(Engine(model.eval(), tokenizer), extract_answer)
    sampling = Sampling(temperature=0.0, max_tokens=60)
    (thought,) = OneAnswer(sampling=sampling)(thinker, [({"role": "user", "content": "?"},)])
    assert private(thought.text) == "1 + 3 = 4"
    assert visible(thought.text) == "Answer: 4"
    assert thought.answer == "4"
