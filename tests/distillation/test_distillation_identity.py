"""What a teacher's cache is known by: the teacher's configuration, and the content of its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tiny_generation import byte_tokenizer, tiny_model
from tiny_teachers import Lines, env

from treadle.core.config import to_yaml
from treadle.core.files import write_json
from treadle.core.pipeline import MANIFEST, PIPELINE, Pipeline, Workspace
from treadle.data.corpus import TextCorpus
from treadle.data.texts import TextFiles
from treadle.distillation.cached import Cached
from treadle.distillation.students import Thinned
from treadle.distillation.taught import Taught, Teacher
from treadle.models.hub.save import save_hf
from treadle.models.source import ModelSource, Pretrained
from treadle.objectives.causal import CausalLM
from treadle.optim.adamw import AdamW
from treadle.peft.folders import WithAdapter
from treadle.train.fit import Fit
from treadle.train.from_run import FromRun
from treadle.train.run import Run, Trained


def identity(source: ModelSource, root: Path, pipeline: Pipeline | None = None) -> str:
    place = Workspace(root, root, pipeline or Pipeline(name="p", steps=()))
    return Teacher(source, replace(env(root), workspace=place)).identity


def model_folder(path: Path, seed: int = 1) -> Path:
    save_hf(tiny_model(seed=seed), path)
    byte_tokenizer().save(path)
    return path


def flip(path: Path) -> None:
    """Change one byte, neither the size of the file nor its header."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_folders_content_counts(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    (weights,) = base.glob("*.safetensors")
    for source in (
        Pretrained(name=str(base)),
        Pretrained(name=str(weights)),
        WithAdapter(model=Pretrained(name="org/name"), folder=str(base)),
        WithAdapter(model=Pretrained(name="org/name"), folder=f"{base}#1"),
        Thinned(model=Pretrained(name=str(base)), layers=(0,)),
    ):
        seen = [identity(source, tmp_path)]
        assert identity(source, tmp_path) == seen[0]
        (base / "notes.txt").write_text(str(source), encoding="utf-8")
        assert identity(source, tmp_path) == seen[0]
        flip(weights)
        seen.append(identity(source, tmp_path))
        if source != Pretrained(name=str(weights)):
            config = base / "config.json"
            config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
            seen.append(identity(source, tmp_path))
        assert len(set(seen)) == len(seen), source


def test_names_stand_for_themselves(tmp_path: Path) -> None:
    found = {
        identity(Pretrained(name=n), tmp_path) for n in ("org/a", "org/b", "smollm2-135m-instruct")
    }
    assert len(found) == 3


def trained(name: str, model: ModelSource) -> Run:
    text = TextCorpus(documents=TextFiles(path="x.txt"), context=16, tokens_per_step=32)
    return Run(
        name=name,
        model=model,
        source=text,
        objective=CausalLM(),
        optimizer=AdamW(lr=1e-3),
        fit=Fit(steps=1),
    )


def record(root: Path, step: str, key: str, weights: str, log: str = "") -> None:
    files = {"trained.safetensors": {"sha256": weights}, "log.jsonl": {"sha256": log}}
    (root / step).mkdir(exist_ok=True)
    write_json(root / step / MANIFEST, {"key": key, "files": files})


def test_of_a_step_its_key_its_weights_and_their_base_count(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    steps = (trained("one", Pretrained(name=str(base))), trained("two", Trained(step="one")))
    pipeline = Pipeline(name="p", steps=steps)
    (tmp_path / PIPELINE).write_text(to_yaml(pipeline), encoding="utf-8")
    for source in (Trained(step="two"), FromRun(folder=str(tmp_path), step="two")):
        record(tmp_path, "one", "k1", "w1")
        record(tmp_path, "two", "k2", "w2")
        seen = [identity(source, tmp_path, pipeline)]
        record(tmp_path, "two", "k2", "w2", log="another time")
        assert identity(source, tmp_path, pipeline) == seen[0]
        for step, key, weights in (("two", "k3", "w2"), ("two", "k3", "w3"), ("one", "k1", "w4")):
            record(tmp_path, step, key, weights)
            seen.append(identity(source, tmp_path, pipeline))
        flip(next(base.glob("*.safetensors")))
        seen.append(identity(source, tmp_path, pipeline))
        assert len(set(seen)) == 5, source


def test_a_teacher_that_changed_is_asked_anew(tmp_path: Path) -> None:
    def tops() -> torch.Tensor:
        text = TextCorpus(documents=Lines(), context=32, tokens_per_step=64, tokens=64)
        teacher = Pretrained(name=str(tmp_path / "base"))
        stream = Taught(source=text, teacher=teacher, lesson=Cached(k=4)).open(env(tmp_path))
        (batch, *_) = next(stream).batches
        stream.state()
        return batch.top_logprobs

    model_folder(tmp_path / "base", seed=1)
    first = tops()
    model_folder(tmp_path / "base", seed=2)
    assert not torch.equal(tops(), first)
    model_folder(tmp_path / "base", seed=1)
    assert torch.equal(tops(), first)
    assert len(list((tmp_path / "teacher").iterdir())) == 2
