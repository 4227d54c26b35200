"""What the heap of tensors holds of the memory that a run asks for and gives back.

The rules are those of `kernels/heap/places.h`: the smallest free range that is large enough, the
lowest among equals; free neighbours are joined. So where each block of a rehearsal would lie is
known, and with it the end of the highest.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort

from treadle.kernels.heap import SMALL

PAGE = 4096


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


class Places:
    """Where blocks begin, and the end of the highest so far."""

    def __init__(self) -> None:
        self.end = 0
        self.free: list[tuple[int, int]] = []
        """Ranges: where each begins, and its size."""
        self.by_size: list[tuple[int, int]] = []

    def ask(self, size: int) -> int:
        """The place of a block of so many bytes, a multiple of a page."""
        fit = bisect_left(self.by_size, (size, 0))
        if fit < len(self.by_size):
            found, place = self.by_size[fit]
            self._take(place, found)
            if found > size:
                self._put(place + size, found - size)
            return place
        place = self.end
        if self.free and sum(self.free[-1]) == self.end:
            place, found = self.free[-1]
            self._take(place, found)
        self.end = place + size
        return place

    def give_back(self, place: int, size: int) -> None:
        after = bisect_left(self.free, (place, 0))
        if after < len(self.free) and self.free[after][0] == place + size:
            following, found = self.free[after]
            self._take(following, found)
            size += found
        if after and sum(self.free[after - 1]) == place:
            place, found = self.free[after - 1]
            self._take(place, found)
            size += found
        self._put(place, size)

    def _put(self, place: int, size: int) -> None:
        insort(self.free, (place, size))
        insort(self.by_size, (size, place))

    def _take(self, place: int, size: int) -> None:
        self.free.remove((place, size))
        del self.by_size[bisect_left(self.by_size, (size, place))]


def held(requests: Requests) -> int:
    """Most bytes that the process holds for tensors: to the end of the highest block, and the small
    ones that live at a time."""
    places = Places()
    given: list[tuple[int, int]] = [(0, 0)]
    small = most = 0
    for entry in requests.entries:
        if entry >= SMALL:
            size = -(-entry // PAGE) * PAGE
            given.append((places.ask(size), size))
        elif entry > 0:
            given.append((-1, entry))
            small += entry
            most = max(most, small)
        else:
            place, size = given[-entry]
            if place < 0:
                small -= size
            else:
                places.give_back(place, size)
    return places.end + most
