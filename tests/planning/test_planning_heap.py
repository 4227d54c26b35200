"""Where blocks lie, by hand; and against the heap that torch is given, place by place."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from treadle.kernels.heap import SMALL, keep_tensors_apart
from treadle.planning.heap import PAGE, Places, Requests, held

PROCESS = """
import json, sys, torch
from treadle.kernels.heap import keep_tensors_apart, release_tensors

before = torch.full((1 << 16,), 3, dtype=torch.uint8)
assert not keep_tensors_apart()
begin, given, places = None, [None], []
for number, entry in enumerate(json.load(sys.stdin)):
    if entry > 0:
        given.append(torch.empty(entry, dtype=torch.uint8).fill_(len(given) % 251))
        begin = given[1].data_ptr() if begin is None else begin
        places.append(given[-1].data_ptr() - begin)
    else:
        given[-entry] = None
    if number % 100 == 0:
        release_tensors()
for number, tensor in enumerate(given):
    assert tensor is None or bool((tensor == number % 251).all()), number
del before  # of the heap that torch had before
print(json.dumps(places))
"""


def requests(*entries: int) -> Requests:
    found = Requests()
    for entry in entries:
        _ = found.ask(entry) if entry > 0 else found.give_back(-entry)
    return found


def mixed(seed: int, count: int = 600) -> Requests:
    """Blocks of many sizes that live long and short, as in a training step."""
    rng, found, living = random.Random(seed), Requests(), []
    for _ in range(count):
        living.append(
            found.ask(rng.choice((33, 40, 200, 203, 700, 3000)) * 1024 + rng.randint(0, 9))
        )
        while len(living) > rng.randint(20, 120):
            found.give_back(living.pop(rng.randrange(len(living))))
    return found


def test_places_by_hand() -> None:
    places = Places()
    assert [places.ask(size * PAGE) for size in (3, 1, 2, 1, 2)] == [
        n * PAGE for n in (0, 3, 4, 6, 7)
    ]
    places.give_back(0, 3 * PAGE)
    places.give_back(4 * PAGE, 2 * PAGE)
    assert places.ask(2 * PAGE) == 4 * PAGE  # the smallest that is large enough
    assert places.ask(PAGE) == 0  # its rest stays free
    assert places.free == [(PAGE, 2 * PAGE)]
    places.give_back(3 * PAGE, PAGE)
    assert places.free == [(PAGE, 3 * PAGE)]  # joined with what lies before it
    places.give_back(0, PAGE)
    assert places.free == [(0, 4 * PAGE)]  # and after it
    places.give_back(7 * PAGE, 2 * PAGE)
    assert places.ask(5 * PAGE) == 7 * PAGE  # begins in what is free at the end
    assert places.end == 12 * PAGE


def test_small_ones_are_counted_apart() -> None:
    small = SMALL - 1
    assert held(requests(small, small, -1, small)) == 2 * small
    assert held(requests(SMALL, small, SMALL + 1)) == small + SMALL + SMALL + PAGE
    assert held(requests(SMALL, -1, SMALL)) == SMALL


@pytest.mark.skipif(bool(keep_tensors_apart()), reason="needs Linux and a C++ compiler")
@pytest.mark.parametrize("seed", [0, 1])
def test_places_are_those_of_torchs_tensors(seed: int) -> None:
    """Whose values stay what they were, whatever is given back around them."""
    found = mixed(seed)
    done = subprocess.run(
        [sys.executable, "-c", PROCESS],
        input=json.dumps(list(found.entries)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    places, expected, sizes = Places(), [], [0]
    for entry in found.entries:
        if entry > 0:
            sizes.append(-(-entry // PAGE) * PAGE)
            expected.append(places.ask(sizes[-1]))
        else:
            places.give_back(expected[-entry - 1], sizes[-entry])
    assert json.loads(done.stdout) == expected
    alive = most = 0
    for entry in found.entries:
        alive += entry if entry > 0 else -sizes[-entry]
        most = max(most, alive)
    assert most < held(found) < 1.25 * most
