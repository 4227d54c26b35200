"""Replay: how much is old, out of how small a memory, and nothing new is lost."""

from __future__ import annotations

from collections import Counter

import pytest
from chat_env import Numbered

from treadle.core.errors import ConfigError
from treadle.data.replay import Replayed


def test_share_and_buffer_are_as_asked() -> None:
    olds = (Numbered(word="warp", amount=30), Numbered(word="weft", amount=30))
    replayed = Replayed(new=Numbered(word="loom", amount=40), old=olds, kept=5, share=0.3)
    said = [replayed.conversation(i).messages[0].content.split() for i in range(2000)]
    words = Counter(word for word, _ in said)
    assert words["warp"] + words["weft"] == pytest.approx(600, abs=60)
    assert words["warp"] == pytest.approx(words["weft"], abs=60)
    for old in ("warp", "weft"):
        assert {int(n) for word, n in said if word == old} == set(range(5))
    assert {int(n) for word, n in said if word == "loom"} == set(range(40))
    assert all(int(n) == i % 40 for i, (word, n) in enumerate(said) if word == "loom")


def test_endless_tasks_and_other_seeds() -> None:
    endless = Numbered(word="loom", endless=True)
    replayed = Replayed(new=endless, old=(endless.replace(word="warp"),), kept=50)
    assert replayed.count() is None
    first = [replayed.conversation(i) for i in range(40)]
    assert first == [replayed.conversation(i) for i in range(40)]
    assert first != [replayed.replace(seed=1).conversation(i) for i in range(40)]


def test_too_small_a_task_is_named() -> None:
    replayed = Replayed(
        new=Numbered(word="loom"), old=(Numbered(word="warp", amount=3),), kept=4, share=0.9
    )
    with pytest.raises(ConfigError, match="one has only 3; lower `kept`"):
        [replayed.conversation(i) for i in range(20)]
