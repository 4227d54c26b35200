"""The heap of tensors under threads, where it cannot be had, and beside torch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from treadle.kernels.heap import keep_tensors_apart

needs_heap = pytest.mark.skipif(bool(keep_tensors_apart()), reason="needs Linux and a compiler")

THREADS = """
import random, threading, torch
from treadle.kernels.heap import keep_tensors_apart, release_tensors
assert not keep_tensors_apart()
wrong = []

def work(seed):
    rng, living = random.Random(seed), []
    for step in range(400):
        living.append((seed, torch.full((rng.randint(1, 80_000),), float(seed))))
        if len(living) > 20:
            mark, tensor = living.pop(rng.randrange(20))
            if not bool((tensor == mark).all()):
                wrong.append(step)
        if step % 50 == 0:
            release_tensors()

threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not wrong
"""

TRAINING = """
import sys, torch
from treadle.kernels.heap import keep_tensors_apart, release_tensors
if sys.argv[1] == "apart":
    assert not keep_tensors_apart()
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(4)])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(5):
    model(torch.randn(64, 256)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if sys.argv[1] == "apart":
        release_tensors()
print(model[0].weight.double().sum().item().hex())
"""

TOO_LARGE = """
import torch
from treadle.kernels.heap import keep_tensors_apart, release_tensors
assert not keep_tensors_apart()
kept = torch.arange(1 << 20)
for _ in range(2):
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        print(str(error).splitlines()[0])
    release_tensors()  # of what was refused, nothing is given back
    gone = torch.ones(1 << 20)
    del gone
assert torch.equal(kept, torch.arange(1 << 20))
"""

LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
from treadle.kernels.heap import keep_tensors_apart
print(keep_tensors_apart())
import torch
assert torch.ones(1 << 20).sum() == 1 << 20
"""


def process(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_heap
def test_threads_keep_their_values() -> None:
    process(THREADS)


@needs_heap
def test_training_is_the_same_bit_for_bit() -> None:
    assert process(TRAINING, "apart") == process(TRAINING, "shared")


@needs_heap
def test_a_tensor_that_cannot_fit_is_refused_and_nothing_else_suffers() -> None:
    said = process(TOO_LARGE).splitlines()
    assert len(said) == 2
    assert all(f"not enough memory for a tensor of {1 << 60} bytes" in line for line in said)


@needs_heap
def test_limited_addresses_are_named() -> None:
    assert "ulimit -v" in process(LIMITED)


def test_without_a_compiler_tensors_share_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in process(
        "from treadle.kernels.heap import keep_tensors_apart; print(keep_tensors_apart())"
    )
