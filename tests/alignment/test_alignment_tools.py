"""Tools over several turns: whose tokens are learned, what is told, what never ends a run."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alignment.learn import learn
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.episodes import Environment, Episode, Heard, Play, Seat, heard_tokens
from treadle.alignment.measure_played import MeasurePlayed
from treadle.alignment.played import Lane, Played, lanes_batch, lanes_of, played_metrics
from treadle.alignment.reasoning_gym import Family, ReasoningGym
from treadle.alignment.sandbox import bubblewrap_works
from treadle.alignment.tool_solutions import CalculatorSolutions
from treadle.alignment.tools import (
    Calculator,
    CallableTool,
    PythonTool,
    WithTools,
    calculate,
    call_text,
)
from treadle.core.errors import TreadleError
from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Workspace, read_manifest
from treadle.core.progress import Silent
from treadle.data.problems import Problems
from treadle.data.records import Messages, Problem, assistant, user
from treadle.data.source import Env
from treadle.inference.sampling import Sampling
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource, Opened
from treadle.objectives.policy import GRPO
from treadle.train.parallel import talk
from treadle.train.precision import FP32

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% if m.role == 'assistant' %}<end>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


class Chatter(Play):
    """Answers each utterance with its own words in capitals, twice; rewards small letters."""

    def __init__(self, most: int) -> None:
        self.left = most
        self.said: list[str] = []

    def hear(self, seat: int, said: str) -> Heard:
        self.said.append(said)
        self.left -= 1
        letters = sum(c.islower() for c in said) / max(1, len(said))
        rewards = (letters,)
        if not self.left:
            return Heard(None, rewards=rewards)
        return Heard(0, told={0: f"{len(said)} SIGNS"}, rewards=rewards)


class Chatting(Environment):
    rounds: int = 3

    def openings(self, index: int) -> tuple[Messages, ...]:
        return ((user(f"talk {index}"),),)

    def begin(self, index: int) -> Play:
        return Chatter(self.rounds)


def env(model: DecoderModel, folder: Path) -> Env:
    return Env(model=model, tokenizer=byte_tokenizer().with_template(TEMPLATE), scratch=folder)


SMALL = tuple("abcdefghijklm")
"""Each ends a turn, so that turns end soon."""


def chatting(**changes: object) -> Played:
    return Played(
        environment=Chatting(),
        prompts=3,
        completions=4,
        sampling=Sampling(max_tokens=60, temperature=0.9, stop=SMALL),
        turns=3,
        tokens=400,
    ).replace(**changes)


def test_logprobs_over_turns_equal_those_of_sampling(tmp_path: Path) -> None:
    """What the engine recorded turn by turn is what the update computes on the whole play."""
    model = tiny_model(context=256)
    stream = chatting().open(env(model, tmp_path))
    work = next(stream)
    assert work.metrics["turns"] > 1.5
    lanes = lanes_of(chatting().open(env(model, tmp_path)).roll(), 4)
    spread = [statistics.stdev(lane.rewards) for lane in lanes]
    assert work.metrics["reward_std"] == pytest.approx(sum(spread) / len(spread))
    assert len(work.batches) > 1
    for batch in work.batches:
        output = GRPO()(model, batch)
        assert float(output.metrics["mismatch"] / output.weight) < 1e-5


def test_the_loss_is_that_of_own_tokens_alone(tmp_path: Path) -> None:
    """Value and gradient against one sequence at a time, with everything else masked by hand."""
    model = tiny_model(context=256)
    stream = chatting(completions=2, prompts=1).open(env(model, tmp_path))
    episodes = [e for e in stream.roll() if e.turns > 1] + stream.roll()
    seats = tuple(e.seats[0] for e in episodes)
    advantages = [1.0, -0.5, 0.25, 2.0][: len(seats)]
    assert any(not all(s.learned) for s in seats)
    batch = lanes_batch([Lane(seats)], [advantages], 0.9)
    output = GRPO()(model, batch)
    ours = torch.autograd.grad(output.total / output.weight, list(model.parameters()))
    total = torch.zeros(())
    for seat, advantage in zip(seats, advantages, strict=True):
        sequence = torch.tensor([*seat.prompt, *seat.tokens])
        logp = (model.logits(model(sequence)).float() / 0.9).log_softmax(-1)
        own = [len(seat.prompt) + i for i, mine in enumerate(seat.learned) if mine]
        old = torch.tensor(seat.logprobs)
        now = torch.stack([logp[t - 1, sequence[t]] for t in own])
        ratio = (now - old).exp()
        clipped = ratio.clamp(0.8, 1.2)
        total = total + torch.minimum(ratio * advantage, clipped * advantage).mean()
    theirs = torch.autograd.grad(-total / len(seats), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_is_heard_stands_where_the_template_has_it() -> None:
    """A play's tokens read as the rendered conversation, whether the turn's end was said or not."""
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    messages = [user("q"), assistant("abc"), user("r")]
    end = tokenizer.token_id("<end>")
    assert tokenizer.decode(heard_tokens(tokenizer, messages, end)) == "u:ra:"
    for last in (end, ord("c")):
        said = tokenizer.encode("abc") + ([end] if last == end else [])
        seat = Seat([user("q")])
        seat.ready(tokenizer)
        seat.speak(said, [0.0] * len(said), "abc")
        seat.messages.append(user("r"))
        whole = seat.ready(tokenizer)
        rendered = tokenizer.render([m.plain() for m in messages], add_generation_prompt=True)
        assert list(whole) == tokenizer.encode(rendered)
        assert sum(seat.learned) == len(said)
        assert len(seat.learned) == len(seat.tokens)
    silent = tokenizer.with_template("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(TreadleError, match="does not repeat what the assistant said"):
        heard_tokens(silent, messages, end)


@pytest.mark.parametrize(
    ("expression", "value"),
    [("1 + 2 * 3", 7), ("(4 - 10) / 4", -1.5), ("-7 // 2", -4), ("17 % 5", 2), ("2.5*2", 5)],
)
def test_calculator(expression: str, value: float) -> None:
    assert calculate(expression) == value
    assert float(Calculator()({"expression": expression})) == value
    assert Calculator()({"expression": "10/5"}) == "2"


@pytest.mark.parametrize(
    "expression", ["2 ** 9999", "__import__('os')", "1 +", "x", "True", "1," * 300, "'a' * 9"]
)
def test_the_calculator_knows_nothing_else(expression: str) -> None:
    with pytest.raises(ValueError, match=r"expression|only numbers"):
        calculate(expression)


def test_python_runs_in_the_sandbox() -> None:
    tool = PythonTool(seconds=5.0)
    assert tool({"code": "print(6 * 7)"}) == "42"
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        tool({"code": "1 / 0"})
    with pytest.raises(RuntimeError, match="status 3"):
        tool({"code": "import os; os._exit(3)"})
    with pytest.raises(TimeoutError, match=r"no end within 0\.3 s"):
        PythonTool(seconds=0.3)({"code": "while True: pass"})
    if bubblewrap_works():
        with pytest.raises(RuntimeError):
            tool({"code": "import socket; socket.create_connection(('1.1.1.1', 53), 1)"})


class BrokenTool(CallableTool):
    """Raises, hangs or leaves, as it is asked."""

    def name(self) -> str:
        return "broken"

    def describe(self) -> str:
        return "broken(how)"

    def __call__(self, arguments: dict[str, str]) -> str:
        if arguments["how"] == "hang":
            while True:
                pass
        raise SystemError("it burns")


class Sum(Problems):
    """Right is an answer of 4."""

    def problem(self, index: int) -> Problem:
        return Problem((user(f"2 + 2, {index}"),), "4", "number")

    def score(self, problem: Problem, completion: str) -> float:
        return float(completion.endswith("4"))


SUM = WithTools(problems=Sum(), tools=(Calculator(), BrokenTool()), calls=3)


@pytest.mark.parametrize(
    ("said", "told", "failure"),
    [
        (call_text("calculator", expression="2+2"), "4", ""),
        (
            call_text("calculator", expression="2/0"),
            "error: ZeroDivisionError: division by zero",
            "tool `calculator`: ZeroDivisionError: division by zero",
        ),
        (
            call_text("calculatr", expression="2"),
            "error: LookupError: there is no tool `calculatr`; did you mean `calculator`?",
            "tool `calculatr`: LookupError: there is no tool `calculatr`; did you mean "
            "`calculator`?",
        ),
        (call_text("calculator", x="2"), "error: KeyError: 'expression'", "KeyError"),
        (call_text("broken", how="raise"), "error: SystemError: it burns", "SystemError"),
        ("<tool_call>{oops", "error: ", "a call is malformed"),
        ("<tool_call>[1]", "error: a call is an object", "a call is malformed"),
        ("<tool_call>" + "[" * 100_000, "error: ", "a call is malformed"),
    ],
)
def test_calls_are_answered_whatever_happens(said: str, told: str, failure: str) -> None:
    heard = SUM.begin(0).hear(0, said)
    assert heard.next == 0
    assert f"<tool_response>{told}" in heard.told[0]
    assert failure in heard.failure
    assert bool(heard.failure) == bool(failure)


class LongWinded(CallableTool):
    """Says a thousand words, or fails with as many."""

    def name(self) -> str:
        return "wordy"

    def describe(self) -> str:
        return "wordy(fail)"

    def __call__(self, arguments: dict[str, str]) -> str:
        if arguments["fail"]:
            raise ValueError("x" * 1000)
        return "x" * 1000


def test_what_the_model_hears_is_short() -> None:
    environment = WithTools(problems=Sum(), tools=(LongWinded(),))
    heard = environment.begin(0).hear(0, call_text("wordy", fail=""))
    assert heard.told[0] == f"<tool_response>{'x' * 400}</tool_response>"
    heard = environment.begin(0).hear(0, call_text("wordy", fail="yes"))
    error = f"ValueError: {'x' * 388}"
    assert heard.told[0] == f"<tool_response>error: {error}</tool_response>"
    assert heard.failure == f"tool `wordy`: {error}"
    assert calculate("10" + "+1" * 199) == 209
    with pytest.raises(ValueError, match="the expression is too long"):
        calculate("100" + "+1" * 199)


def test_a_misconfigured_tool_ends_the_run() -> None:
    class Missing(BrokenTool):
        def __call__(self, arguments: dict[str, str]) -> str:
            raise TreadleError("its library is absent")

    play = WithTools(problems=Sum(), tools=(Missing(),)).begin(0)
    with pytest.raises(TreadleError, match="its library is absent"):
        Episode(0, 0, play, (Seat([]),)).hear(call_text("broken", how="so"), 1.0)


def test_answers_are_scored_and_calls_are_limited() -> None:
    play = SUM.begin(0)
    call = call_text("calculator", expression="2+2")
    both = play.hear(0, call + call_text("calculator", expression="3*3"))
    assert both.told[0] == "<tool_response>4</tool_response>\n<tool_response>9</tool_response>"
    assert play.hear(0, "Answer: 4") == Heard(None, rewards=(1.0,))
    assert SUM.begin(0).hear(0, "Answer: 5") == Heard(None, rewards=(0.0,))
    play = SUM.begin(0)
    for _ in range(3):
        assert play.hear(0, call).next == 0
    assert play.hear(0, call) == Heard(None, rewards=(0.0,))


def test_the_prompt_tells_of_the_tools() -> None:
    ((message,),) = SUM.openings(0)
    assert message.content.startswith("2 + 2, 0\nYou may call tools with <tool_call>")
    assert "- calculator(expression)" in message.content
    assert SUM.replace(told=False).openings(0) == (Sum().problem(0).prompt,)
    with pytest.raises(ValueError, match="two tools have one name"):
        WithTools(problems=Sum(), tools=(Calculator(), Calculator()))


class Log(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


class Calling(Environment):
    """The model's words are put into a call of the broken tool."""

    def openings(self, index: int) -> tuple[Messages, ...]:
        return SUM.openings(index)

    def begin(self, index: int) -> Play:
        return Called()


class Called(Play):
    def __init__(self) -> None:
        self.inner = SUM.begin(0)
        self.turn = 0

    def hear(self, seat: int, said: str) -> Heard:
        self.turn += 1
        if self.turn < 3:
            call = call_text("broken", how="hang" if self.turn == 2 else "raise")
            return self.inner.hear(seat, call + call)
        if said[:1] > "\x80":
            raise ZeroDivisionError("the world ends")
        return Heard(None, rewards=(float("nan") if said[:1] > "@" else len(said) / 20,))


def test_nothing_that_fails_ends_the_run(tmp_path: Path) -> None:
    """Tools that raise and hang, an environment that raises, a reward that is no number."""
    log = Log()
    workspace = Workspace(tmp_path, tmp_path, Pipeline(name="p", steps=()), log)
    here = replace(env(tiny_model(context=512), tmp_path), workspace=workspace)
    source = chatting(environment=Calling(), patience=0.05, turns=4, completions=6)
    work = next(source.open(here))
    assert work.metrics["environment_failures"] > 18
    named = {line.removeprefix("environment: ") for line in log.lines}
    assert "tool `broken`: SystemError: it burns" in named
    assert "tool `broken`: OvertimeError: no answer within 0.05 s" in named
    assert {"ZeroDivisionError: the world ends", "the reward was nan"} & named
    assert len(log.lines) == len(set(log.lines))
    assert all(math.isfinite(v) for v in work.metrics.values())


@pytest.mark.parametrize("reward", [None, "much"])
def test_a_reward_that_is_no_number_is_a_fault(reward: object) -> None:
    class Odd(Play):
        def hear(self, seat: int, said: str) -> Heard:
            return Heard(None, rewards=(1.0, reward))  # type: ignore[arg-type]

    episode = Episode(0, 0, Odd(), (Seat([]), Seat([])))
    episode.hear("so", 1.0)
    assert [seat.reward for seat in episode.seats] == [0.0, 0.0]
    (failure,) = episode.failures
    assert failure.startswith("TypeError: must be real number")
    assert episode.speaker is None


class Failing(Environment):
    """Every play fails in its own way, without end."""

    def openings(self, index: int) -> tuple[Messages, ...]:
        return ((user(f"fail {index}"),),)

    def begin(self, index: int) -> Play:
        return Failed(index)


class Failed(Play):
    def __init__(self, index: int) -> None:
        self.index = index

    def hear(self, seat: int, said: str) -> Heard:
        return Heard(None, failure=f"fault {self.index}")


def test_faults_are_told_once_and_not_without_end(tmp_path: Path) -> None:
    log = Log()
    workspace = Workspace(tmp_path, tmp_path, Pipeline(name="p", steps=()), log)
    here = replace(env(tiny_model(), tmp_path), workspace=workspace)
    stream = chatting(environment=Failing(), prompts=5, sampling=Sampling(max_tokens=1)).open(here)
    for drawn in (0, 0, 5):
        stream.drawn = drawn
        stream.roll()
    assert log.lines == [f"environment: fault {i}" for i in range(8)]


def test_measures_of_plays() -> None:
    """Means over two plays of two seats, one of which never speaks."""
    seats = [
        Seat([], reward=r, logprobs=[0.0] * n) for r, n in ((1, 3), (0.5, 2), (0.25, 6), (0, 0))
    ]
    plays = [
        Episode(0, 0, Failed(0), (seats[0], seats[1]), turns=3, cut_off=True, failures=["x", "y"]),
        Episode(1, 0, Failed(0), (seats[2], seats[3]), turns=2, failures=["z"]),
    ]
    assert played_metrics(plays) == {
        "reward": 1.75 / 4,
        "turns": 2.5,
        "completion_tokens": 11 / 4,
        "cut_off": 0.5,
        "environment_failures": 3.0,
    }


def test_ranks_share_the_plays(tmp_path: Path) -> None:
    """The second of two processes plays the second half of a step's problems."""
    here = env(tiny_model(context=256), tmp_path)
    short = chatting(prompts=4, sampling=Sampling(max_tokens=2))
    whole = short.open(here)
    second = short.open(replace(here, rank=1, world=2))
    for _ in range(2):
        plays = whole.roll()
        assert [e.number for e in second.roll()] == [e.number for e in plays[8:]]
    assert {e.number for e in plays} == {4, 5, 6, 7}
    with pytest.raises(TreadleError, match="prompts=4 cannot be shared by 3 processes"):
        short.open(replace(here, world=3))


class AlwaysRight(Problems):
    """Every prompt of an even number is longer than the model's context."""

    def problem(self, index: int) -> Problem:
        return Problem((user("long " * (90 if index % 2 == 0 else 1)),), "", "any")

    def score(self, problem: Problem, completion: str) -> float:
        return 1.0


def test_plays_that_teach_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Openings that fill the context are counted; equal rewards everywhere are an error."""
    source = chatting(environment=Chatting(rounds=1), prompts=2)
    plain = WithTools(problems=AlwaysRight(), tools=(Calculator(),), told=False)
    stream = source.replace(environment=plain).open(env(tiny_model(context=256), tmp_path))
    with pytest.raises(TreadleError, match="all plays of a problem ended with equal rewards"):
        next(stream)
    assert stream.left_out == 8
    # Several processes stay in step: one without a signal has a batch to spare, and adds nothing.
    one_of_two = source.replace(environment=plain).open(env(tiny_model(context=256), tmp_path))
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(talk, "summed", lambda *numbers: (3,))
        work = next(one_of_two)
    assert work.batches == ()
    assert work.spare is not None
    assert not work.spare.advantages.any()
    everything = plain.replace(told=True)
    with pytest.raises(TreadleError, match="the openings of all 2 problems of a step fill"):
        next(source.replace(environment=everything).open(env(tiny_model(context=128), tmp_path)))


def test_a_stream_of_plays_goes_on_where_it_was(tmp_path: Path) -> None:
    stream = chatting().open(env(tiny_model(context=256), tmp_path))
    next(stream)
    state = json.loads(json.dumps(stream.state()))
    expected = next(stream)
    again = chatting().open(env(tiny_model(context=256), tmp_path))
    again.restore(state)
    found = next(again)
    assert [b.tokens.tolist() for b in found.batches] == [
        b.tokens.tolist() for b in expected.batches
    ]


def test_what_has_no_room_is_not_learned_on(tmp_path: Path) -> None:
    """A play that fills the context in a later turn ends there, with what was said so far."""
    stream = chatting(turns=9, environment=Chatting(rounds=9)).open(env(tiny_model(), tmp_path))
    episodes = stream.roll()
    long = [e for e in episodes if e.cut_off and e.turns > 1]
    assert long
    for seat in (e.seats[0] for e in episodes):
        assert len(seat.prompt) + len(seat.tokens) <= 128
        assert seat.learned[-1]
        assert sum(seat.learned) == len(seat.logprobs)


def test_copies_of_a_play_draw_differently(tmp_path: Path) -> None:
    """In the first turn and in later ones, though each later prompt is alone in its request."""
    stream = chatting(completions=8, prompts=1).open(env(tiny_model(context=256), tmp_path))
    episodes = stream.roll()
    first = {e.play.said[0] for e in episodes}
    assert len(first) > 4
    later = [e.play.said[1] for e in episodes if len(e.play.said) > 1]
    assert len(later) > 3
    assert len({s[:1] for s in later}) > 1


def test_reward_over_turns_rises(tmp_path: Path) -> None:
    source = chatting(prompts=4, completions=8, environment=Chatting(rounds=2), turns=2)
    seen = learn(env(tiny_model(context=256), tmp_path), source, steps=24)
    assert seen.late("reward", 5) > seen.early("reward", 3) + 0.2


CHAIN = ReasoningGym(families=(Family(name="chain_sum"),))


def test_worked_plays_are_solved_with_the_calculator() -> None:
    pytest.importorskip("reasoning_gym")
    environment = WithTools(problems=CHAIN, tools=(Calculator(),))
    for index in range(20):
        prompt, call, result, answer = (
            CalculatorSolutions(environment=environment).conversation(index).messages
        )
        play = environment.begin(index)
        assert (prompt,) == environment.openings(index)[0]
        assert play.hear(0, call.content).told[0] == result.content
        assert play.hear(0, answer.content).rewards == (1.0,)
        assert result.content == f"<tool_response>{answer.content[8:]}</tool_response>"
    with pytest.raises(TreadleError, match="has no Calculator"):
        CalculatorSolutions(environment=environment.replace(tools=(PythonTool(),))).conversation(0)
    with pytest.raises(TreadleError, match="tell no expression"):
        CalculatorSolutions(environment=SUM).conversation(0)


class Talker(ModelSource):
    def open(self, workspace: Workspace) -> Opened:
        folder = workspace.folder / "tokenizer"
        byte_tokenizer().with_template(TEMPLATE).save(folder)
        return Opened(tiny_model(context=256), folder)


def test_plays_are_measured(tmp_path: Path) -> None:
    step = MeasurePlayed(
        name="measure", subject="base", model=Talker(), played=chatting(), count=14,
        what="letters", precision=FP32(),
    )  # fmt: skip
    execute(Pipeline(name="p", steps=(step,)), tmp_path)
    metrics = read_manifest(tmp_path / "measure")["metrics"]
    rows = [json.loads(x) for x in (tmp_path / "measure/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 14
    assert rows[3]["prompt"] == "user: talk 3"
    assert metrics["results"]["letters"]["value"] == pytest.approx(
        sum(r["score"] for r in rows) / 14
    )
    assert any("SIGNS" in r["answer"] for r in rows)
    assert metrics["environment_failures"] == 0
