"""What glibc keeps of a sequence of requests, against a process that makes and fills them."""

from __future__ import annotations

import json
import platform
import random
import subprocess
import sys

import pytest

from treadle.planning.heap import Requests, alive, held

KB = 1024
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")

PROCESS = """
import json, sys, torch

def resident(name):
    status = open("/proc/self/status").read()
    return int(status.partition(name)[2].split()[0]) * 1024

torch.empty(1 << 16).fill_(1)
entries = json.load(sys.stdin)
open("/proc/self/clear_refs", "w").write("5")
before, given = resident("VmRSS:"), [None]
for entry in entries:
    if entry > 0:
        given.append(torch.empty(entry, dtype=torch.uint8).fill_(1))
    else:
        given[-entry] = None
print(resident("VmHWM:") - before)
"""


def requests(*entries: int) -> Requests:
    found = Requests()
    for entry in entries:
        _ = found.ask(entry) if entry > 0 else found.give_back(-entry)
    return found


def mixed(seed: int, count: int = 1500) -> Requests:
    """Blocks of many sizes that live long and short, as in a training step."""
    rng, found, living = random.Random(seed), Requests(), []
    for _ in range(count):
        living.append(found.ask(rng.choice((40, 200, 700, 3000, 5000)) * KB))
        while len(living) > rng.randint(20, 350):
            found.give_back(living.pop(rng.randrange(len(living))))
    return found


def test_numbers_of_requests() -> None:
    found = Requests()
    assert [found.ask(10), found.ask(20)] == [1, 2]
    found.give_back(1)
    assert found.ask(5) == 3
    assert list(found.entries) == [10, 20, -1, 5]
    assert alive(found.entries) == 30
    found.give_back(3)
    assert found.ask(11) == 4
    assert found.ask(1) == 5
    assert alive(found.entries) == 32


@glibc
def test_a_block_with_pages_of_its_own_is_held_to_the_page() -> None:
    big = 8 * 1024 * KB
    assert big < held(requests(big)) <= big + 2 * 4 * KB
    assert held(requests(big, -1, big, -2, big - 64 * KB)) < 1.05 * big


@glibc
def test_holes_that_are_too_small_are_kept() -> None:
    small = [64 * KB] * 800
    half = [-number for number in range(1, 801, 2)]
    found = requests(*small, *half, *[96 * KB] * 400)
    lives = alive(found.entries)
    assert lives == 64 * KB * 400 + 96 * KB * 400
    assert held(found) == pytest.approx(64 * KB * 800 + 96 * KB * 400, rel=0.02)


@glibc
def test_what_fits_a_hole_takes_no_more() -> None:
    found = requests(*[64 * KB] * 800, *[-number for number in range(1, 801, 2)], *[63 * KB] * 400)
    assert held(found) == pytest.approx(64 * KB * 800, rel=0.02)


@glibc
@pytest.mark.parametrize("seed", [0, 1])
def test_as_much_as_processes_that_write_into_their_memory(seed: int) -> None:
    """Where a heap begins is drawn: the same requests took 459 to 644 MB in six processes."""
    found = mixed(seed)
    taken = []
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, "-c", PROCESS],
            input=json.dumps(list(found.entries)),
            check=True,
            capture_output=True,
            text=True,
        )
        taken.append(int(done.stdout))
    assert 0.9 * min(taken) < held(found) < 1.1 * max(taken)
    assert held(found) > 1.05 * alive(found.entries)
