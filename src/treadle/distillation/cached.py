"""A teacher on disk: its likeliest next tokens, computed once, kept for every epoch and run.

    <run>/teacher/<identity>-k64-t1.0/rank0-000000.safetensors
        keys      [S 16]   which context each sequence of predictions has
        ends      [S]      where its predictions end
        tokens    [R k]    int32
        logprobs  [R k]    float16, at the lesson's temperature

A sequence is known by a digest of the tokens up to its last prediction and of which of them are
predicted: of all that decides the answer, and of nothing else. So an order that changes from
epoch to epoch finds it again, and so do other runs of the pipeline. Shards appear whole or not at
all, and carry a checksum. The identity is a fingerprint of the teacher's configuration and of the
content of its files: a teacher that was changed since has a cache of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from treadle.core.errors import FileFormatError, TreadleError
from treadle.core.files import atomic_file
from treadle.data.batch import Batch
from treadle.data.source import Env
from treadle.distillation.taught import Lesson, Pupil, Teacher, taught
from treadle.kernels.linear_cross_entropy import chunks, head_logits
from treadle.models.decoder import DecoderModel
from treadle.nn.linear import bias_of
from treadle.objectives.distil import TaughtBatch
from treadle.objectives.objective import head_rule

SHARD_ROWS = 1 << 16
"""Predictions after which a shard is written: 25 MB at k = 64."""


class Cached(Lesson):
    """The teacher's k likeliest tokens, from the disk where they are there."""

    k: int = Field(64, ge=1)
    temperature: float = Field(1.0, gt=0.0)
    """Of the distribution that is kept; SoftLabels must ask for the same."""

    def open(self, teacher: Teacher, env: Env) -> Pupil:
        vocab = env.model.config.vocab
        if self.k >= vocab:
            raise TreadleError(
                f"Cached: k={self.k} is the whole vocabulary of {vocab} tokens or more: lower it, "
                "or use Live"
            )
        name = f"{teacher.identity}-k{self.k}-t{self.temperature}"
        folder = teacher.workspace.root / "teacher" / name
        store = TopStore(folder, k=self.k, rank=env.rank)
        if not store.known:
            teacher.check_vocabulary()
        return _CachedPupil(self, teacher, env, store)


class TopStore:
    """Top-k answers by the digest of their context.

    Raises:
        FileFormatError: a shard is damaged.
    """

    def __init__(self, folder: Path, *, k: int, rank: int = 0) -> None:
        self.folder, self.k, self.rank = folder, k, rank
        self.known: dict[bytes, tuple[Tensor, Tensor]] = {}
        self.fresh: list[bytes] = []
        self.rows = 0
        for path in sorted(folder.glob("rank*.safetensors")):
            self.known.update(_read(path, k))
        # After the last one: a damaged shard that was deleted leaves a gap.
        mine = (int(p.stem.partition("-")[2]) for p in folder.glob(f"rank{rank}-*.safetensors"))
        self.written = max(mine, default=-1) + 1

    def add(self, key: bytes, tokens: Int[Tensor, "R k"], logprobs: Float[Tensor, "R k"]) -> None:
        """Keep an answer; it is on the disk after the next `flush`."""
        if key not in self.known:
            self.known[key] = (tokens.int().cpu(), logprobs.half().cpu())
            self.fresh.append(key)
            self.rows += len(tokens)
        if self.rows >= SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is new as one shard."""
        if not self.fresh:
            return
        found = [self.known[key] for key in self.fresh]
        tensors = {
            "keys": torch.from_numpy(np.frombuffer(b"".join(self.fresh), np.uint8).copy()),
            "ends": torch.tensor([len(tokens) for tokens, _ in found]).cumsum(0),
            "tokens": torch.cat([tokens for tokens, _ in found]),
            "logprobs": torch.cat([logprobs for _, logprobs in found]),
        }
        path = self.folder / f"rank{self.rank}-{self.written:06d}.safetensors"
        with atomic_file(path, needed=sum(t.nbytes for t in tensors.values())) as temporary:
            save_file(tensors, temporary, metadata={"sha256": _checksum(tensors)})
        self.written += 1
        self.fresh, self.rows = [], 0


def _read(path: Path, k: int) -> Iterator[tuple[bytes, tuple[Tensor, Tensor]]]:
    damaged = f"{path}: this part of the teacher's cache is damaged: delete it, and it is made anew"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FileFormatError(f"{damaged} ({error})") from None
    if set(tensors) != {"keys", "ends", "tokens", "logprobs"} or tensors["tokens"].shape[1] != k:
        raise FileFormatError(damaged)
    if metadata.get("sha256") != _checksum(tensors):
        raise FileFormatError(f"{damaged} (its checksum is wrong)")
    keys, ends = tensors["keys"].numpy().tobytes(), tensors["ends"].tolist()
    start = 0
    for i, end in enumerate(ends):
        yield (
            keys[16 * i : 16 * i + 16],
            (tensors["tokens"][start:end], tensors["logprobs"][start:end]),
        )
        start = end


def _checksum(tensors: dict[str, Tensor]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        hashed.update(tensors[name].contiguous().numpy().tobytes())
    return hashed.hexdigest()


def sequence_keys(batch: Batch) -> list[tuple[bytes, slice]]:
    """For each sequence of predictions the digest of its context, and its rows."""
    tokens, sources = batch.tokens.numpy(), batch.sources.numpy()
    positions = batch.layout.positions.numpy()
    starts = np.asarray(batch.layout.starts)
    counts = np.bincount(batch.sequences.numpy(), minlength=batch.sequence_count)
    ends = counts.cumsum()
    found = []
    for start, end in zip(ends - counts, ends, strict=True):
        last = int(sources[start:end][-1])
        segment = int(np.searchsorted(starts, last, side="right")) - 1
        hashed = hashlib.blake2b(digest_size=16)
        for ancestor in batch.layout.lineage(segment)[:-1]:
            span = batch.layout.span(ancestor)
            hashed.update(tokens[span.start : span.stop].tobytes())
        hashed.update(tokens[starts[segment] : last + 1].tobytes())
        hashed.update(positions[sources[start:end]].tobytes())
        found.append((hashed.digest(), slice(int(start), int(end))))
    return found


@torch.no_grad()
def likeliest(
    config: Cached, teacher: DecoderModel, batch: Batch
) -> tuple[Int[Tensor, "M k"], Float[Tensor, "M k"]]:
    """The tokens that follow likeliest on each prediction, and their log-probabilities."""
    hidden = teacher(batch.tokens, batch.context())[batch.sources]
    weight, bias = teacher.head_weight(), bias_of(teacher.head)
    rule = head_rule(teacher, config.temperature)
    tops = []
    for rows in chunks(len(hidden), len(weight)):
        logits, _ = head_logits(hidden[rows], weight, bias, rule)
        top = logits.topk(config.k, -1)
        tops.append((top.indices, top.values - logits.logsumexp(-1, keepdim=True)))
    return torch.cat([i for i, _ in tops]), torch.cat([v for _, v in tops])


class _CachedPupil:
    def __init__(self, config: Cached, teacher: Teacher, env: Env, store: TopStore) -> None:
        self.config, self.teacher, self.env, self.store = config, teacher, env, store

    def __call__(self, batch: Batch, step: int) -> TaughtBatch:
        keys = sequence_keys(batch)
        if any(key not in self.store.known for key, _ in keys):
            tokens, logprobs = self._ask(batch)
            for key, rows in keys:
                self.store.add(key, tokens[rows], logprobs[rows])
        found = [self.store.known[key] for key, _ in keys]
        return taught(
            batch,
            step=step,
            top_tokens=torch.cat([tokens for tokens, _ in found]),
            top_logprobs=torch.cat([logprobs for _, logprobs in found]).float(),
            top_temperature=self.config.temperature,
        )

    def _ask(self, batch: Batch) -> tuple[Int[Tensor, "M k"], Float[Tensor, "M k"]]:
        self.teacher.check_vocabulary()
        with self.env.autocast():
            return likeliest(self.config, self.teacher.model, batch.to(self.env.device))

    def settle(self) -> None:
        self.store.flush()
