"""Checkpoints: a run that is killed at any moment goes on bit for bit as if it had not been.

    checkpoints/step-000120/
        model.safetensors       parameters that train, and buffers
        optimizer.safetensors   `<parameter>/<key>`; numbers and groups in its metadata
        rank-0.safetensors      the stream, random states, scaler, clipper, guard of each process
        run.yaml                the run
        manifest.json           step, processes, shapes, and the SHA-256 of every file

A folder appears under its name only when all of it is on the disk. What fails its checksum is
named, and the checkpoint before it is taken. Nothing is ever pickled.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.errors import FileFormatError, TreadleError
from treadle.core.files import atomic_directory, sha256, write_json
from treadle.train.optimizer_file import optimizer_from_disk, optimizer_to_disk
from treadle.train.parallel import talk
from treadle.train.state import (
    TrainState,
    frozen_fingerprints,
    model_tensors,
    put,
    whole,
)
from treadle.train.tree import pack, unpack

CARD = Card(
    id="pre.checkpoints",
    paper="Eisenman et al. 2022, Check-N-Run, arXiv:2010.08679",
    summary="Atomic checkpoints with checksums; exact resume of weights, optimiser, data, RNG.",
    recipe="treadle run quickstart-scratch",
    oracle="tests/train/test_train_checkpoint.py::test_resumed_equals_uninterrupted",
)

FORMAT = "treadle-checkpoint-1"
_NAME = re.compile(r"step-(\d+)")


class CheckpointStore:
    """The checkpoints of one run, in one folder. Every rank calls each method."""

    def __init__(
        self, folder: Path, keep: int = 2, say: Callable[[str], None] = warnings.warn
    ) -> None:
        if keep < 1:
            raise TreadleError(f"checkpoints: keep={keep}; keep at least 1")
        self.folder, self.keep, self.say = folder, keep, say

    def paths(self) -> dict[int, Path]:
        """Step -> folder of each checkpoint, in order; `damage` tells which are whole."""
        if not self.folder.is_dir():
            return {}
        found = {
            int(match[1]): path
            for path in self.folder.iterdir()
            if (match := _NAME.fullmatch(path.name)) and path.is_dir()
        }
        return dict(sorted(found.items()))

    def save(self, step: int, state: TrainState) -> Path:
        """Write the checkpoint after `step` steps and remove the oldest beyond `keep`.

        Raises:
            TreadleError: the disk is full; earlier checkpoints are as they were.
        """
        model = {name: whole(tensor) for name, tensor in model_tensors(state).items()}
        optimizer, remembered = optimizer_to_disk(state)
        own = {
            "stream": state.stream.state(),
            "parts": {name: part.state() for name, part in state.parts.items()},
        }
        ranks = talk.gather_bytes(pack(own))
        frozen = frozen_fingerprints(state)
        path = self.folder / f"step-{step:06d}"
        with talk.first_rank_works() as working:
            if working:
                tensors = (*model.values(), *optimizer.values())
                needed = sum(t.nbytes for t in tensors) + sum(map(len, ranks))
                with atomic_directory(path, needed=needed) as folder:
                    save_file(model, folder / "model.safetensors")
                    save_file(optimizer, folder / "optimizer.safetensors", metadata=remembered)
                    for rank, data in enumerate(ranks):
                        (folder / f"rank-{rank}.safetensors").write_bytes(data)
                    (folder / "run.yaml").write_text(state.config, encoding="utf-8")
                    _write_manifest(folder, step, model, frozen)
                self._prune(step)
        return path

    def _prune(self, newest: int) -> None:
        """Remove all but the last `keep` up to `newest`, and those of a future that was undone."""
        paths = self.paths()
        past = [s for s in paths if s <= newest]
        for step in paths:
            if step not in past[-self.keep :]:
                # Without its manifest a folder is no checkpoint: a kill here leaves no half of one.
                (paths[step] / "manifest.json").unlink(missing_ok=True)
                shutil.rmtree(paths[step], ignore_errors=True)

    def restore_latest(self, state: TrainState) -> int | None:
        """Put the newest whole checkpoint into `state`; its step, or None where there is none.

        Raises:
            FileFormatError: there are checkpoints, but every one is damaged.
            TreadleError: the checkpoint is of another model, optimiser or number of processes.
        """
        path = self.latest()
        if path is None:
            return None
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        frozen = frozen_fingerprints(state)
        with talk.first_rank_works() as working:
            if working:
                check_model(path, manifest, model_tensors(state), frozen)
        weights = load_file(path / "model.safetensors")
        for name, tensor in model_tensors(state).items():
            put(tensor, weights[name])
        optimizer_from_disk(path / "optimizer.safetensors", state)
        own = _own_state(path, manifest["world"])
        state.stream.restore(own["stream"])
        for name, part in state.parts.items():
            if name not in own["parts"]:
                raise TreadleError(f"{path}: holds no state of `{name}`: the run was another one")
            part.restore(own["parts"][name])
        return int(manifest["step"])

    def latest(self) -> Path | None:
        """The newest checkpoint whose files are all whole; None where there is none at all.

        Raises:
            FileFormatError: there are checkpoints, but every one is damaged.
        """
        chosen = ""
        with talk.first_rank_works() as working:
            if working:
                chosen = self._newest_whole()
        chosen = talk.from_first(chosen)
        return Path(chosen) if chosen else None

    def _newest_whole(self) -> str:
        reasons = []
        for path in reversed(self.paths().values()):
            reason = damage(path)
            if not reason:
                return str(path)
            reasons.append(f"{path}: {reason}")
            self.say(f"checkpoint damaged, trying the one before: {reasons[-1]}")
        if reasons:
            raise FileFormatError(
                "no checkpoint can be read:\n" + "\n".join(reasons) + "\n"
                f"remove {self.folder} to start from the beginning"
            )
        return ""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The model's tensors of one checkpoint folder, by name.

    Raises:
        FileFormatError: a file is missing or fails its checksum.
    """
    if reason := damage(path):
        raise FileFormatError(f"{path}: {reason}")
    return load_file(path / "model.safetensors")


def damage(path: Path) -> str:
    """What is wrong with a checkpoint's files; empty where nothing is."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read ({error})"
    if manifest.get("format") != FORMAT:
        return f"manifest.json is of format {manifest.get('format')!r}, this is {FORMAT!r}"
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} is truncated: {file.stat().st_size} of {entry['bytes']} bytes"
        if sha256(file) != entry["sha256"]:
            return f"{name} is corrupt: its SHA-256 differs from the manifest's"
    return ""


def check_model(
    path: Path,
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    frozen: Mapping[str, list[Any]],
) -> None:
    """Raise TreadleError naming the first tensors in which checkpoint and model differ."""
    here = {name: list(tensor.shape) for name, tensor in tensors.items()}
    there: dict[str, list[int]] = manifest["model"]
    lines = [f"`{n}` is in the checkpoint only" for n in there if n not in here]
    lines += [f"`{n}` is in the model only" for n in here if n not in there]
    lines += [
        f"`{n}` is {there[n]} in the checkpoint, {here[n]} in the model"
        for n in here
        if n in there and here[n] != there[n]
    ]
    for name, (shape, dtype, digest) in manifest["frozen"].items():
        mine = frozen.get(name)
        if mine is None or mine[0] != shape:
            lines.append(f"frozen `{name}` was {shape}, is {mine[0] if mine else 'absent'}")
        elif mine[1] == dtype and mine[2] != digest:
            lines.append(f"frozen `{name}` holds other values: another base model")
    if lines:
        more = f"\n  and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise TreadleError(
            f"{path} is not a checkpoint of this model:\n  "
            + "\n  ".join(lines[:5])
            + f"{more}\ngo on with the configuration in {path / 'run.yaml'}, or use another folder"
        )


def _write_manifest(
    folder: Path, step: int, model: Mapping[str, Tensor], frozen: Mapping[str, Any]
) -> None:
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.iterdir())
    }
    manifest = {
        "format": FORMAT,
        "step": step,
        "world": talk.world_size(),
        "torch": torch.__version__,
        "files": files,
        "model": {name: list(tensor.shape) for name, tensor in model.items()},
        "frozen": frozen,
    }
    write_json(folder / "manifest.json", manifest)


def _own_state(path: Path, world: int) -> Any:
    """This rank's stream and parts; another number of processes can only share equal ones."""
    if world == talk.world_size():
        return unpack((path / f"rank-{talk.rank()}.safetensors").read_bytes())
    first, *others = (unpack((path / f"rank-{r}.safetensors").read_bytes()) for r in range(world))
    if any(other["stream"] != first["stream"] for other in others):
        raise TreadleError(
            f"{path}: written by {world} processes whose places in the data differ, "
            f"this run has {talk.world_size()}; start {world} processes"
        )
    return first
