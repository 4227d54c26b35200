"""A small run like a real one, made by a pipeline of steps that only record."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treadle.core.execute import execute
from treadle.core.pipeline import Pipeline, Reads, Step, Workspace
from treadle.core.results import Figure, Sample, accuracy, pooled, write_samples
from treadle.reports.report import Report

FAMILIES = ("chain_sum", "number_sorting", "letter_counting")
SKILL = {"base": 0.12, "sft": 0.35, "grpo": 0.62, "quantised": 0.58}
PERPLEXITY = {"base": 24.31, "sft": 25.02, "grpo": 24.93, "quantised": 26.4}
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>\u202e\x00 ${{7*7}} </pre>\ud800'


class FakeModel(Reads):
    """What an earlier step made."""


class FakeTrain(Step):
    """Records the curves of a training."""

    model: FakeModel | None = None
    steps: int = 300
    rewards: bool = False
    seed: int = 7
    fails: bool = False

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        draw = random.Random(self.seed)
        loss = math.nan
        with (workspace.folder / "metrics.jsonl").open("w") as file:
            for step in range(1, self.steps + 1):
                progress = step / self.steps
                loss = 0.4 + 1.9 * math.exp(-4 * progress) + draw.gauss(0, 0.08)
                row: dict[str, Any] = {
                    "step": step,
                    "steps": self.steps,
                    "loss": loss,
                    "lr": 1e-3 * min(1.0, progress / 0.1) * (1 - progress),
                    "grad_norm": 0.5 + abs(draw.gauss(0, 0.3)),
                    "tokens": 4096,
                    "seconds": 1.5 + draw.random(),
                    "skipped": step == 40,
                }
                if self.rewards:
                    row |= {
                        "loss": draw.gauss(0, 0.02),
                        "reward": 0.35 + 0.3 * progress + draw.gauss(0, 0.08),
                        "mismatch": abs(draw.gauss(0.001, 0.0004)),
                        "kl": 0.05 * progress,
                        "completion_tokens": 60 + 40 * progress + draw.gauss(0, 6),
                        "solved": 0.3 + 0.3 * progress,
                        "groups_with_signal": draw.random(),
                    }
                file.write(json.dumps(row) + "\n")
                if self.fails and step > self.steps / 2:
                    file.write('{"step": 99')
                    raise RuntimeError("stopped")
        (workspace.folder / "trained.safetensors").write_bytes(bytes(2048))
        return {
            "kind": "train",
            "metrics_file": "metrics.jsonl",
            "loss": loss,
            "steps": self.steps,
            "tokens": 4096 * self.steps,
            "parameters": 134_515_008,
            "parameters_trained": 4_884_480,
            "precision": "float32",
        }


class FakeQuantise(Step):
    """Records that weights were made smaller."""

    model: FakeModel

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        (workspace.folder / "model.gguf").write_bytes(bytes(4096))
        return {"kind": "quantise", "bits_per_weight": 4.5}


class FakeEvaluate(Step):
    """Records what a model answered."""

    subject: str
    model: FakeModel | None = None
    problems: int = 40
    hostile: bool = False

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        results: dict[str, Figure] = {}
        rows: list[Sample] = []
        for family in FAMILIES:
            scores = [float(self._solves(family, i)) for i in range(self.problems)]
            results[family] = accuracy(scores)
            rows += [self._sample(family, i, score) for i, score in enumerate(scores)]
        results["overall"] = pooled(results.values())
        perplexity = PERPLEXITY[self.kind_of_model()]
        results["wikitext-2"] = Figure(
            value=perplexity,
            low=perplexity - 0.6,
            high=perplexity + 0.6,
            n=50_000,
            unit="perplexity",
        )
        write_samples(workspace.folder, rows)
        return {
            "kind": "evaluation",
            "subject": self.subject,
            "results": results,
            "tokens_per_second": 412.0,
            "size_bytes": 85_000_000 if self.subject == "quantised" else 269_000_000,
            "parameters": 134_515_008,
        }

    def kind_of_model(self) -> str:
        """`grpo` of `grpo-s2`, which is one of several seeds."""
        return self.subject.partition("-s")[0]

    def _solves(self, family: str, index: int) -> bool:
        """Each problem has a difficulty of its own, so better models solve mostly the same ones."""
        difficulty = random.Random(f"{family} {index}").random()
        luck = random.Random(f"{family} {index} {self.subject}").gauss(0, 0.06)
        return difficulty + luck < SKILL[self.kind_of_model()]

    def _sample(self, family: str, index: int, score: float) -> Sample:
        numbers = random.Random(f"{family} {index}").choices(range(10, 999), k=4)
        total = sum(numbers)
        shown = total if score else total + 10
        steps, running = [], 0
        for number in numbers:
            running += number
            steps.append(f"{running - number} + {number} = {running}")
        chain = "\n".join(steps) + "\n" if self.subject != "base" else ""
        answer = f"{chain}<answer>{shown}</answer>"
        return Sample(
            problem=f"{family}-{index}",
            task=family,
            prompt=f"State the final answer to: {' + '.join(map(str, numbers))} =",
            answer=HOSTILE if self.hostile else answer,
            expected=str(total),
            score=score,
        )


class FakeNgram(Step):
    """Records a baseline."""

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        text = Figure(value=143.2, low=None, high=None, n=50_000, unit="perplexity")
        return {
            "kind": "evaluation",
            "subject": "5-gram",
            "baseline": True,
            "results": {"wikitext-2": text},
            "tokens_per_second": None,
            "size_bytes": None,
        }


def pipeline(*, fails: bool = False, hostile: bool = False) -> Pipeline:
    """base -> sft -> grpo -> quantised, each measured, with a report at the end."""
    return Pipeline(
        name="quickstart",
        steps=(
            FakeNgram(name="ngram"),
            FakeEvaluate(name="evaluate-base", subject="base"),
            FakeTrain(name="sft"),
            FakeEvaluate(name="evaluate-sft", subject="sft", model=FakeModel(step="sft")),
            FakeTrain(
                name="grpo",
                steps=120,
                rewards=True,
                fails=fails,
                model=FakeModel(step="sft"),
                seed=3,
            ),
            FakeEvaluate(
                name="evaluate-grpo", subject="grpo", model=FakeModel(step="grpo"), hostile=hostile
            ),
            FakeQuantise(name="export", model=FakeModel(step="grpo")),
            FakeEvaluate(
                name="evaluate-quantised",
                subject="quantised",
                model=FakeModel(step="export"),
                hostile=hostile,
            ),
            Report(),
        ),
    )


def make(root: Path, *, hostile: bool = False) -> Path:
    """Run it in `root`."""
    execute(pipeline(hostile=hostile), root)
    return root
