"""What has a state: anything whose place a checkpoint must keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Stateful(Protocol):
    """State is a tree of dicts (string keys), lists, JSON scalars and torch tensors."""

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was taken."""
