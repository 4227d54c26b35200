"""Who holds which page: reference counts, a free list, and the hash chain behind prefix caching.

A full page is named by what it holds and all that comes before it:

    key_0 = h(root, tokens of page 0),   key_i = h(key_{i-1}, tokens of page i)

Pages that nobody holds keep their key until they are needed, the least recently used first, so a
later request with the same beginning finds them and skips that part of its prefill.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from treadle.core.cards import Card

CARD = Card(
    id="inf.prefix_cache",
    paper="Kwon et al. 2023, arXiv:2309.06180; Zheng et al. 2024, SGLang, arXiv:2312.07104",
    summary="Requests that begin alike share pages: what is known is not computed again.",
    recipe="treadle chat smollm2-135m-instruct",
    oracle="tests/inference/test_inference_prefix.py::test_equals_fresh_and_skips_prefill",
)


def chain(previous: bytes, tokens: Sequence[int]) -> bytes:
    """Name of the page with these tokens after the page named `previous`."""
    return blake2b(array("q", tokens).tobytes(), key=previous, digest_size=16).digest()


class Blocks:
    """The pages 0 .. pages - 1 of `page` tokens."""

    def __init__(self, pages: int, page: int, root: bytes = b"") -> None:
        self.pages, self.page, self.root = pages, page, root
        self.epoch = 0
        self.references = [0] * pages
        # Low numbers first: a runner's memory grows with the highest page in use.
        self.free = list(range(pages - 1, -1, -1))
        self.keys: dict[int, bytes] = {}
        self.named: dict[bytes, int] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        """Named pages that nobody holds, least recently used first."""

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self.free) + len(self.idle)

    def take(self) -> int:
        """A page for new contents, held once."""
        if self.free:
            page = self.free.pop()
        else:
            page, _ = self.idle.popitem(last=False)
            del self.named[self.keys.pop(page)]
        self.references[page] = 1
        return page

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder of each."""
        for page in pages:
            self.idle.pop(page, None)
            self.references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less of each page of a sequence; its end goes before its beginning."""
        for page in reversed(pages):
            self.references[page] -= 1
            if self.references[page] == 0:
                if page in self.keys:
                    self.idle[page] = None
                else:
                    self.free.append(page)

    def shared(self, page: int) -> bool:
        return self.references[page] > 1

    def chain(
        self, tokens: Sequence[int], known: Sequence[bytes] = (), *, mark: bytes = b""
    ) -> Iterator[bytes]:
        """Keys of the full pages of a sequence after those that are known, in order.

        Tokens mean the same under equal marks only: that of an adapter, say.
        """
        key = known[-1] if known else chain(self.root + mark, [self.epoch])
        for start in range(len(known) * self.page, len(tokens) - self.page + 1, self.page):
            key = chain(key, tokens[start : start + self.page])
            yield key

    def find(self, tokens: Sequence[int], *, mark: bytes = b"") -> list[int]:
        """Pages that hold the beginning of these tokens, none of them held for the caller yet.

        At least one token is left over, since its logits must be computed.
        """
        pages: list[int] = []
        for key in self.chain(tokens[:-1], mark=mark):
            page = self.named.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def name(self, page: int, key: bytes) -> None:
        """The page is full. If another page holds the same, that one stays the known one."""
        if key not in self.named and page not in self.keys:
            self.named[key] = page
            self.keys[page] = key

    def forget(self) -> None:
        """Nothing that was computed so far is found again."""
        self.epoch += 1
        self.free += self.idle
        self.idle.clear()
        self.keys.clear()
        self.named.clear()
