"""What an allocator keeps of the memory that a run asks for and gives back.

glibc fills the holes that released blocks leave with what fits, and gives the system back only the
end of its heap and blocks with pages of their own. What it keeps beyond what lives depends on the
order of all requests, and no formula has it: so the very requests of a rehearsal are put to glibc
itself, and the memory is never touched.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from array import array
from concurrent.futures import ProcessPoolExecutor

ALIGNMENT = 64
"""Bytes; torch's on CPUs."""
TRIES = 3


class Requests:
    """What was asked of an allocator, in order.

    A positive number asks for so many bytes; a negative one gives back what the request of that
    number, counted from one, was given.
    """

    def __init__(self) -> None:
        self.entries, self.count = array("q"), 0

    def ask(self, size: int) -> int:
        """Book a block; returns its number."""
        self.entries.append(size)
        self.count += 1
        return self.count

    def give_back(self, number: int) -> None:
        self.entries.append(-number)


class Info(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "a", "b", "c", "hblkhd", "d", "e", "f", "g", "keepcost")
    ]


def held(requests: Requests) -> int:
    """Most bytes that this system's allocator holds while it serves the requests.

    In processes of their own, whose heaps hold nothing else; the most of some tries, since where
    a heap begins is drawn by the system, and decides now and then whether a hole is filled. Where
    the system's library is not glibc 2.33 or newer, what lives is taken for what is held.
    """
    context, entries = multiprocessing.get_context("spawn"), requests.entries.tobytes()
    with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
        return max(pool.map(serve, [entries] * TRIES))


def serve(entries: bytes) -> int:
    """Put the requests to this process's heap, which grows by them."""
    requests = array("q", entries)
    library = ctypes.CDLL(None)
    try:
        library.mallinfo2.restype = Info
    except AttributeError:
        return alive(requests)
    library.free.argtypes = [ctypes.c_void_p]
    before, highest = _held(library), 0
    block, given = ctypes.c_void_p(), [0]
    for request in requests:
        if request > 0:
            if library.posix_memalign(ctypes.byref(block), ALIGNMENT, ctypes.c_size_t(request)):
                raise MemoryError(f"no address space for {request} bytes")
            given.append(block.value or 0)
            highest = max(highest, _held(library) - before)
        else:
            library.free(given[-request])
            given[-request] = 0
    for address in given:
        library.free(address)
    return highest


def alive(requests: array[int]) -> int:
    """Most bytes that live at a time."""
    sizes, now, highest = [0], 0, 0
    for request in requests:
        if request > 0:
            sizes.append(request)
            now += request
            highest = max(highest, now)
        else:
            now -= sizes[-request]
    return highest


def _held(library: ctypes.CDLL) -> int:
    info = library.mallinfo2()
    return int(info.arena + info.hblkhd)
