"""A run: the product of all axes as one value, and the step that carries it out.

    Run(name="sft", model=Pretrained(name="smollm2-135m-instruct"), transforms=(LoRA(rank=16),),
        source=..., objective=CausalLM(), optimizer=AdamW(lr=1e-3), fit=Fit(steps=100))

Its folder holds the parameters that were trained; the manifest holds the whole configuration, so
`Trained(step="sft")` gives the model back, whatever transforms it was made with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from treadle.core.config import Config, parse, to_yaml
from treadle.core.errors import FileFormatError, TreadleError
from treadle.core.files import atomic_file, write_json
from treadle.core.pipeline import Reads, Step, Workspace, find_step, read_manifest
from treadle.data.source import Env, Source
from treadle.kernels.heap import keep_tensors_apart, release_tensors
from treadle.models.decoder import DecoderModel
from treadle.models.source import ModelSource, Opened, origins, outlined, weight_bytes
from treadle.models.transform import Transform, transformed
from treadle.objectives.objective import Objective
from treadle.optim.optimizer import Optimizer, Schedule
from treadle.optim.schedules import Cosine
from treadle.tokenizers.load import tokenizer_of
from treadle.train.fit import Fit, fit
from treadle.train.hooks import Hook, JsonLines, ShowProgress, TensorBoard, WarnAbove
from treadle.train.moved import changes, prints_of, summary
from treadle.train.parallel.plan import Plan, SingleProcess
from treadle.train.precision import settle
from treadle.train.rng import seed_everything

WEIGHTS, MOVED = "trained.safetensors", "moved.json"


class Training(Step):
    """A shape: a step whose folder holds the trained parameters of a model."""

    model: ModelSource
    transforms: tuple[Transform, ...] = ()

    def check(self, workspace: Workspace) -> None:
        self.outline(workspace)

    def outline(self, workspace: Workspace) -> DecoderModel | None:
        """What it will train, without values, where that is known before it is trained.

        Raises:
            TreadleError: there is no such model, or a transform does not fit it.
        """
        return outlined(self.model, self.transforms, workspace)


class Run(Training):
    """Train one model with one objective."""

    parallel: ClassVar[bool] = True
    name: str = "train"
    source: Source
    objective: Objective
    optimizer: Optimizer
    schedule: Schedule = Cosine()
    fit: Fit
    plan: Plan = SingleProcess()
    seed: int = 0

    def execute(self, workspace: Workspace) -> Mapping[str, Any]:
        folder = workspace.folder
        if shared := keep_tensors_apart():
            workspace.progress.say(f"memory: {shared}")
        seed_everything(self.seed)  # fresh weights and adapters: the same on every rank
        opened = self.model.open(workspace)
        model = transformed(opened.model, self.transforms)
        world = self.plan.setup()
        precision = settle(
            self.fit.precision, world.device, folder / "precision.yaml", workspace.progress.say
        )
        precision.prepare(model.to(world.device))  # as it is trained: a source may ask it
        env = Env(
            model=model,
            tokenizer=tokenizer_of(opened),
            scratch=folder / "scratch",
            seed=self.seed,
            rank=world.rank,
            world=world.size,
            device=str(world.device),
            autocast=partial(precision.autocast, world.device),
            workspace=workspace,
            steps=self.fit.steps,
        )
        env.scratch.mkdir(exist_ok=True)
        seed_everything(self.seed + 1 + world.rank)  # dropout: each rank its own
        hooks: list[Hook] = []
        if world.rank == 0:
            hooks = [
                JsonLines(folder / "metrics.jsonl"),
                TensorBoard(folder / "tensorboard"),
                ShowProgress(workspace.progress, self.name),
                WarnAbove(workspace.progress, self.name),
            ]
        stream = self.source.open(env)
        release_tensors()  # what loading took
        before = prints_of(model)
        result = fit(
            model,
            stream,
            self.objective,
            optimizer=self.optimizer,
            schedule=self.schedule,
            config=self.fit.replace(precision=precision),
            plan=self.plan,
            world=world,
            folder=folder / "checkpoints",
            hooks=hooks,
            description=to_yaml(self),
        )
        weights = self.plan.full_state(model)
        moved: dict[str, float] = {}
        if world.rank == 0:
            moved = changes(before, weights, steps=result.steps)
            write_json(folder / MOVED, moved)
            save_trained(model, weights, folder / WEIGHTS)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {
            "kind": "train",
            "metrics_file": "metrics.jsonl",
            "loss": result.loss,
            "steps": result.steps,
            "tokens": result.tokens,
            "skipped_steps": result.skipped,
            "refused": [f"step {e.step}: {e.reason} (data {e.data})" for e in result.events],
            "precision": str(precision.dtype()).removeprefix("torch."),
            "parameters": sum(p.numel() for p in model.parameters()),
            "parameters_trained": trained,
            "moved": summary(moved) if moved else "",
        }


class Trained(ModelSource, Reads):
    """The model that an earlier `Training` of the pipeline trained, with its transforms."""

    def open(self, workspace: Workspace) -> Opened:
        return open_trained(workspace.output(self.step), workspace)

    def outline(self, workspace: Workspace) -> DecoderModel | None:
        return self._training(workspace).outline(workspace)

    def origins(self, workspace: Workspace) -> Iterator[Path]:
        """Of the model that the step trained: its folder has no copy."""
        yield from origins(self._training(workspace).model, workspace)

    def _training(self, workspace: Workspace) -> Training:
        return as_training(find_step(workspace.pipeline, self.step), f"`{self.step}`")


def open_trained(folder: Path, workspace: Workspace) -> Opened:
    """The model of a finished training step, base and transforms included.

    Raises:
        TreadleError: the folder holds no training step.
        FileFormatError: its weights do not fit its configuration.
    """
    config = read_manifest(folder)["config"]
    step = parse(config, expect=Config, where=lambda path: str(folder / "manifest.json"))
    run = as_training(step, str(folder))
    opened = run.model.open(workspace)
    model = transformed(opened.model, run.transforms)
    load_trained(model, folder / WEIGHTS)
    size = (opened.bytes_on_disk or 0) + weight_bytes(folder / WEIGHTS)
    return Opened(model, opened.origin, opened.metadata, size)


def as_training(step: Config, name: str) -> Training:
    """The step, if it is one that trains.

    Raises:
        TreadleError: it is another.
    """
    if not isinstance(step, Training):
        raise TreadleError(f"{name} is a {type(step).__name__} step: it trains no model")
    return step


def save_trained(model: DecoderModel, weights: Mapping[str, Tensor], path: Path) -> None:
    """The parameters that train, by name."""
    tensors = {n: weights[n] for n, p in model.named_parameters() if p.requires_grad}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary)


def load_trained(model: DecoderModel, path: Path) -> None:
    """Put saved parameters back; all that train must be there, and nothing else."""
    tensors = load_file(path)
    expected = {n for n, p in model.named_parameters() if p.requires_grad}
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)[:3]
        raise FileFormatError(
            f"{path}: its parameters are not those that the run trains (first: {', '.join(odd)}): "
            "the folder was changed, or comes from another version; train again"
        )
    model.load_state_dict(tensors, strict=False)
