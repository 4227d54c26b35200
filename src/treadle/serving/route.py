"""A name that stands for several adapters of one base: each request goes to the one it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from treadle.core.errors import TreadleError
from treadle.inference.route import Chooser, read_examples
from treadle.serving.pool import Adapted, Offer
from treadle.serving.worker import Worker


@dataclass(frozen=True)
class Route:
    """What clients ask for, and the file with examples of each adapter that it may mean."""

    name: str
    examples: Path


def parse_route(text: str) -> Route:
    """`NAME=FILE`.

    Raises:
        TreadleError: it is written otherwise.
    """
    name, _, file = text.partition("=")
    if not (name and file):
        raise TreadleError(f"--route {text}: write it NAME=FILE")
    return Route(name, Path(file))


class Routes:
    """The routes of a server.

    Raises:
        TreadleError: a name is taken, or adapters are missing.
        FileFormatError: a file of examples is not one.
    """

    def __init__(self, routes: Sequence[Route], offers: Sequence[Offer]) -> None:
        adapters = [offer.name for offer in offers if isinstance(offer, Adapted)]
        bases = {offer.base for offer in offers if isinstance(offer, Adapted)}
        self._choosers: dict[str, Chooser] = {}
        for route in routes:
            if route.name in self._choosers or route.name in [offer.name for offer in offers]:
                raise TreadleError(f"route `{route.name}`: the name is taken; choose another")
            examples = read_examples(route.examples, adapters)
            self._choosers[route.name] = Chooser({n: p for n, p in examples.items() if p})
        self.base = min(bases) if self._choosers else ""
        if self._choosers and len(bases) > 1:
            raise TreadleError("a route is among adapters of one base; there are several")

    @property
    def names(self) -> list[str]:
        return list(self._choosers)

    async def choose(self, name: str, worker: Worker, prompt: Sequence[int]) -> str:
        """The adapter that a prompt is for; `worker` is that of the base."""
        return await worker.call(partial(self._choosers[name], prompt=prompt))
