"""Distilling step by step: what is kept of a teacher's answers, and the loss of the two tasks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.errors import FileFormatError, TreadleError
from treadle.core.pipeline import Pipeline, Workspace
from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.data.source import Env
from treadle.distillation import rationales
from treadle.distillation.rationales import FILE, Rationales, StepByStep
from treadle.inference.request import Completion
from treadle.inference.sampling import Sampling
from treadle.models.source import ModelSource, Opened
from treadle.objectives.causal import CausalLM
from treadle.tokenizers.chat import encode_chat
from treadle.train.precision import FP32

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
ROWS = [
    {"question": f"{i} + 1?", "steps": f"one more than {i} " * (1 + i), "result": str(i + 1)}
    for i in range(4)
]


class PlusOne(Problems):
    """The number after another."""

    def problem(self, index: int) -> Problem:
        return Problem((user(f"{index} + 1? Think."),), str(index + 1), "plus")

    def score(self, problem: Problem, completion: str) -> float:
        return float(completion.rpartition(":")[2].strip() == problem.answer)


class Silence(ModelSource):
    """A model whose words are put into its mouth."""

    def open(self, workspace: Workspace) -> Opened:
        folder = workspace.root / "silence"
        byte_tokenizer().with_template(TEMPLATE).save(folder)
        return Opened(tiny_model(), folder)


def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "step").mkdir(exist_ok=True)
    return Workspace(tmp_path, tmp_path / "step", Pipeline(name="p", steps=()))


def opened(tmp_path: Path, rows: list[dict[str, str]], rank: int = 0, world: int = 1, **fields):
    folder = tmp_path / "rationales"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text("{}")
    (folder / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    work = workspace(tmp_path)
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    env = Env(
        model=tiny_model(),
        tokenizer=tokenizer,
        scratch=work.folder,
        workspace=work,
        rank=rank,
        world=world,
    )
    return StepByStep(step="rationales", **fields).open(env), env


def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, says, **fields):
    """What is kept where the teacher says `says(problem, attempt)`."""
    count = fields.get("count", 3)
    asked_for: list[int] = []

    class Mouth:
        def __init__(self, *args, **kwargs) -> None: ...

        def generate(self, requests, progress):
            seeds = [request.sampling.seed for request in requests]
            assert not set(seeds) & set(asked_for)
            asked_for.extend(seeds)
            texts = [says(seed % count, seed // count) for seed in seeds]
            return [
                [Completion(text=t, tokens=(1,), logprobs=(0.0,), finish="stop")] for t in texts
            ]

    monkeypatch.setattr(rationales, "Engine", Mouth)
    step = Rationales(
        teacher=Silence(), precision=FP32(), **{"problems": PlusOne(), "count": 3, **fields}
    )
    work = workspace(tmp_path)
    metrics = step.execute(work)
    return metrics, [json.loads(x) for x in (work.folder / FILE).read_text().splitlines()]


def test_only_accepted_solutions_are_kept(monkeypatch, tmp_path: Path) -> None:
    def says(i: int, attempt: int) -> str:
        right = i + 1 if (i, attempt) in ((0, 0), (0, 1), (2, 1)) else 99
        return f"try {attempt}\nAnswer: {right}"

    metrics, rows = asked(monkeypatch, tmp_path, says, tries=2)
    assert (metrics["problems"], metrics["asked"], metrics["kept"]) == (3, 5, 2)
    assert rows == [
        {"question": "0 + 1? Think.", "steps": "try 0", "result": "1"},
        {"question": "2 + 1? Think.", "steps": "try 1", "result": "3"},
    ]


def test_teacher_that_solves_nothing_is_refused(monkeypatch, tmp_path: Path) -> None:
    for text in ("Answer: 99", "no mark"):
        with pytest.raises(TreadleError, match="accepted none of 3 answers"):
            asked(monkeypatch, tmp_path, lambda i, attempt, text=text: text)


class Fitful(PlusOne):
    """A verifier that hangs or raises at some answers, and takes others for right."""

    def score(self, problem: Problem, completion: str) -> float:
        while "hang" in completion:
            pass
        if "crash" in completion:
            raise ZeroDivisionError("moody")
        if "please" in completion:
            return 1.0
        return super().score(problem, completion)


def test_a_verifier_that_fails_costs_its_answer_alone(monkeypatch, tmp_path: Path) -> None:
    def says(i: int, attempt: int) -> str:
        return f"{('hang', 'crash', 'fine')[i]}\nAnswer: {i + 1}"

    metrics, rows = asked(monkeypatch, tmp_path, says, problems=Fitful(), patience=0.1)
    assert [row["steps"] for row in rows] == ["fine"]
    assert (metrics["kept"], metrics["verifications_failed"]) == (1, 2)
    with pytest.raises(TreadleError, match=r"failed for all 3 .*ZeroDivisionError: moody"):
        asked(monkeypatch, tmp_path, lambda i, attempt: "crash\nAnswer: 1", problems=Fitful())


def test_an_answer_without_a_result_teaches_nothing(monkeypatch, tmp_path: Path) -> None:
    def says(i: int, attempt: int) -> str:
        return ("please\nAnswer: ", "please", "please\nAnswer: 7")[i]

    _, rows = asked(monkeypatch, tmp_path, says, problems=Fitful())
    assert [row["result"] for row in rows] == ["7"]


def test_the_same_answer_is_not_asked_for_twice(tmp_path: Path) -> None:
    step = Rationales(teacher=Silence(), problems=PlusOne(), tries=3)
    with pytest.raises(TreadleError, match="3 tries at temperature 0 are one answer"):
        step.check(workspace(tmp_path))
    step.replace(sampling=Sampling(temperature=0.5)).check(workspace(tmp_path))
    step.replace(tries=1).check(workspace(tmp_path))


@pytest.mark.parametrize("rationale", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("budget", [60, 4096])
def test_loss_is_the_papers(rationale: float, budget: int, tmp_path: Path) -> None:
    """Mean over the tokens of results plus lambda times the mean over those of steps."""
    stream, env = opened(tmp_path, ROWS, rationale=rationale, per_step=4, tokens=budget)
    model = env.model.double().eval()
    outputs = [CausalLM()(model, batch) for batch in next(stream).batches]
    total = sum(float(output.total.detach()) for output in outputs)

    def mean(ask: str, key: str) -> float:
        surprise, tokens = 0.0, 0
        for row in ROWS:
            chat = [
                {"role": "user", "content": f"{row['question']}\n{ask}"},
                {"role": "assistant", "content": row[key]},
            ]
            encoded = encode_chat(env.tokenizer, chat)
            ids = torch.tensor(encoded.ids)
            with torch.no_grad():
                logp = model.logits(model(ids)).log_softmax(-1)
            for place in range(1, len(ids)):
                if encoded.mask[place]:
                    surprise -= float(logp[place - 1, ids[place]])
                    tokens += 1
        return surprise / tokens

    expected = mean("Give only the result.", "result")
    expected += rationale * mean("Explain it step by step.", "steps")
    assert total / len(ROWS) == pytest.approx(expected, rel=1e-5)
    weight = sum(float(output.weight) for output in outputs)
    assert weight == pytest.approx(len(ROWS) * (1 + rationale), rel=1e-6)


def test_ranks_weigh_as_one_does(tmp_path: Path) -> None:
    """A token weighs the same whichever rank it came to."""

    def weights(rank: int, world: int) -> Counter[float]:
        stream, _ = opened(tmp_path, ROWS, rank, world, per_step=3, rationale=0.3)
        batches = next(stream).batches
        return Counter(round(w, 6) for batch in batches for w in batch.weights.tolist())

    assert weights(0, 2) + weights(1, 2) == weights(0, 1)


def test_silence_is_no_lesson(tmp_path: Path) -> None:
    """Of two solutions one has no steps: nobody learns to answer `step by step` with nothing."""
    rows = [ROWS[0], {**ROWS[1], "steps": ""}]
    stream, env = opened(tmp_path, rows, per_step=2)
    (batch,) = next(stream).batches
    said = env.tokenizer.decode(batch.tokens.tolist())
    assert said.count("Explain it step by step.") == 1
    assert said.count("Give only the result.") == 2
    assert float(batch.weights.sum()) == pytest.approx(3.0)  # one a piece


def test_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    stream, _ = opened(tmp_path, ROWS, per_step=3)
    next(stream)
    state = stream.state()
    wanted = [batch.tokens.tolist() for batch in next(stream).batches]
    again, _ = opened(tmp_path, ROWS, per_step=3)
    again.restore(state)
    assert [batch.tokens.tolist() for batch in next(again).batches] == wanted
    fewer, _ = opened(tmp_path, ROWS[:2])
    with pytest.raises(TreadleError, match="solutions have changed"):
        fewer.restore(state)


def test_file_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"rationales\.jsonl: no solutions of a teacher"):
        opened(tmp_path, [{"text": "x"}])
