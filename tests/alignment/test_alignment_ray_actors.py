"""Rollout workers by Ray: two give what one process gives, and one that is killed is replaced."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_generation import byte_tokenizer, tiny_model

from treadle.alignment.ray_actors import Pool, RayActors, Spelling
from treadle.alignment.rollouts import Rollouts
from treadle.alignment.samplers import OwnWeights, Sampler
from treadle.core.errors import TreadleError
from treadle.core.pipeline import Pipeline, Workspace
from treadle.core.progress import Silent
from treadle.data.problems import Problems
from treadle.data.records import Problem, user
from treadle.data.source import Env
from treadle.inference.sampling import Sampling
from treadle.models.decoder import DecoderModel
from treadle.objectives.policy import GRPO
from treadle.optim.adamw import AdamW
from treadle.optim.schedules import Constant
from treadle.train.fit import Fit, fit
from treadle.train.parallel.plan import SingleProcess
from treadle.train.precision import FP32

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


class SmallLetters(Problems):
    def problem(self, index: int) -> Problem:
        return Problem((user(f"write {index}"),), "", "letters")

    def score(self, problem: Problem, completion: str) -> float:
        return sum(c.islower() for c in completion) / max(1, len(completion))


class Log(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def env(folder: Path, log: Log | None = None) -> Env:
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    workspace = Workspace(folder, folder, Pipeline(name="p", steps=()), log or Silent())
    return Env(model=tiny_model(), tokenizer=tokenizer, scratch=folder, workspace=workspace)


def rollouts(sampler: Sampler) -> Rollouts:
    return Rollouts(
        problems=SmallLetters(),
        prompts=5,
        completions=4,
        sampling=Sampling(max_tokens=10),
        sampler=sampler,
    )


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(TreadleError, match=r"pip install 'treadle\[ray\]'"):
        rollouts(RayActors()).open(env(tmp_path))


def test_tokenizers_travel() -> None:
    tokenizer = byte_tokenizer().with_template(TEMPLATE)
    built = Spelling.of(tokenizer).build()
    text = tokenizer.render([user("hi").plain()], add_generation_prompt=True)
    assert built.encode(text) == tokenizer.encode(text)
    assert built.stop_ids == tokenizer.stop_ids
    assert built.render([user("hi").plain()], add_generation_prompt=True) == text


class DeadActorError(Exception):
    """As Ray has it."""


class FakeRay:
    """Actors in this process, which die when they are told to."""

    exceptions = SimpleNamespace(RayActorError=DeadActorError)

    def __init__(self, deaths: int = 0) -> None:
        self.deaths, self.running = deaths, False
        self.begun: list[float] = []
        self.set_aside: list[float] = []
        self.shares: list[int] = []

    def is_initialized(self) -> bool:
        return self.running

    def init(self, num_cpus: float, **rest: bool) -> None:
        self.running = True
        self.begun.append(num_cpus)

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.begun[-1]} if self.begun else {}

    def put(self, value: object) -> object:
        return value

    def get(self, made: Callable[[], object]) -> object:
        return made()

    def remote(self, num_cpus: float) -> Callable[[type], SimpleNamespace]:
        self.set_aside.append(num_cpus)

        def hired(*arguments: object) -> SimpleNamespace:
            def sample(weights: object, requests: list[int]) -> Callable[[], object]:
                def made() -> object:
                    if self.deaths:
                        self.deaths -= 1
                        raise DeadActorError("gone")
                    self.shares.append(len(requests))
                    return [[10 * r] for r in requests]

                return made

            return SimpleNamespace(sample=SimpleNamespace(remote=sample))

        return lambda kind: SimpleNamespace(remote=hired)


def faked(monkeypatch: pytest.MonkeyPatch, deaths: int = 0) -> FakeRay:
    fake = FakeRay(deaths)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.exceptions", fake.exceptions)
    return fake


@pytest.mark.parametrize(
    ("workers", "cores", "begun"), [(2, 1.0, 2), (5, 0.5, 3), (1, 2.5, 3), (3, 0.0, 1)]
)
def test_a_cluster_has_room_for_all_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: int, cores: float, begun: int
) -> None:
    """One that finds no core would be waited for without end."""
    fake = faked(monkeypatch)
    Pool(RayActors(workers=workers, cores=cores), env(tmp_path), 4)
    assert fake.begun == [begun]
    assert fake.set_aside == [cores] * workers
    Pool(RayActors(workers=workers, cores=cores), env(tmp_path), 4)
    assert fake.begun == [begun], "one that runs is used"


def test_workers_that_find_no_core_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake, log = faked(monkeypatch), Log()
    fake.init(num_cpus=2)
    Pool(RayActors(workers=2), env(tmp_path, log), 4)
    assert log.lines == []
    Pool(RayActors(workers=5, cores=0.5), env(tmp_path, log), 4)
    assert log.lines == ["rollouts: the workers wait for 2.5 cores, but Ray has 2"]


def test_workers_get_a_model_on_the_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faked(monkeypatch)
    here = env(tmp_path)
    assert Pool(RayActors(), here, 4).parts[0] is here.model
    moved = Pool(RayActors(), replace(here, device="cuda"), 4).parts[0]
    assert moved is not here.model
    assert {p.device.type for p in moved.parameters()} == {"cpu"}


def test_shares_are_dealt_out_and_put_back_in_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = faked(monkeypatch)
    pool = Pool(RayActors(workers=3), env(tmp_path), 4)
    assert pool.sample(range(7)) == [[10 * i] for i in range(7)]
    assert fake.shares == [3, 2, 2]
    assert pool.sample(range(2)) == [[0], [10]]
    assert fake.shares[3:] == [1, 1], "who has nothing to do is not asked"


def test_deaths_are_named_and_limited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake, log = faked(monkeypatch, deaths=2), Log()
    pool = Pool(RayActors(workers=2, replacements=2), env(tmp_path, log), 4)
    assert pool.sample(range(4)) == [[10 * i] for i in range(4)]
    died = "rollouts: worker 0 died and is replaced; its share is redone"
    assert log.lines == [died, died]
    assert pool.replaced == 2
    fake.deaths = 3
    with pytest.raises(TreadleError, match=r"3 rollout workers died in one step \(last: gone\)"):
        pool.sample(range(4))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "240")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def trained(sampler: Sampler, folder: Path) -> DecoderModel:
    here, plan = env(folder), SingleProcess()
    fit(
        here.model,
        rollouts(sampler).open(here),
        GRPO(),
        optimizer=AdamW(lr=1e-2),
        schedule=Constant(),
        config=Fit(steps=3, precision=FP32()),
        plan=plan,
        world=plan.setup("cpu"),
        folder=folder / type(sampler).__name__,
    )
    return here.model


@pytest.mark.slow
def test_two_workers_train_what_one_process_trains(cluster: None, tmp_path: Path) -> None:
    """Three steps: a worker that kept old weights would sample other texts from the second on."""
    alone = trained(OwnWeights(), tmp_path)
    pooled = trained(RayActors(workers=2), tmp_path)
    for (name, a), b in zip(alone.named_parameters(), pooled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    start = tiny_model()
    assert any(
        not torch.allclose(a, b, atol=1e-3)
        for a, b in zip(start.parameters(), pooled.parameters(), strict=True)
    )


def kill(pool: Pool, place: int) -> None:
    import ray

    os.kill(ray.get(pool.workers[place].process.remote()), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_worker_is_replaced(cluster: None, tmp_path: Path) -> None:
    """Under new weights, which the new one gets too; and the pool goes on after."""
    log = Log()
    here = env(tmp_path, log)
    pool = Pool(RayActors(workers=2), here, 10)
    stream = rollouts(OwnWeights()).open(here)
    alone = stream.sample
    for dies in (None, 1, None, 0):
        with torch.no_grad():
            for parameter in here.model.parameters():
                parameter.mul_(1.1)
        stream.drawn, stream.sample = 0, alone
        expected = [c.tokens for g in stream.roll() for c in g.completions]
        if dies is not None:
            kill(pool, dies)
        stream.drawn, stream.sample = 0, pool.sample
        assert [c.tokens for g in stream.roll() for c in g.completions] == expected
    assert log.lines == [
        f"rollouts: worker {place} died and is replaced; its share is redone" for place in (1, 0)
    ]
    assert pool.replaced == 2


@pytest.mark.slow
def test_too_many_deaths_end_the_run(cluster: None, tmp_path: Path) -> None:
    pool = Pool(RayActors(workers=1, replacements=0), env(tmp_path), 20)
    stream = rollouts(OwnWeights()).open(env(tmp_path))
    stream.sample = pool.sample
    assert len(stream.roll()) == 5
    kill(pool, 0)
    with pytest.raises(TreadleError, match="1 rollout workers died in one step"):
        stream.roll()
