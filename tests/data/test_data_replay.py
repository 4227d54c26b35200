"""Replay: how much is old, out of how small a memory, and nothing new is lost."""

from __future__ import annotations

from collections import Counter

import pytest
from chat_env import Numbered

from treadle.core.errors import ConfigError
from treadle.data.replay import Replayed


def test_share_and_buffer_are_as_asked() -> None:
    olds = (Numbered(word="warp", amount=30), Numbered(word="weft", amount=30))
    replayed = Replayed(new=Numbered(word="loom", amount=40), old=olds, kept=5, share=0.25)
    said = [replayed.conversation(i).messages[0].content.split() for i in range(2000)]
    words = Counter(word for word, _ in said)
    assert words["warp"] + words["weft"] == 500
    assert words["warp"] == pytest.approx(words["weft"], abs=60)
    for old in ("warp", "weft"):
        memory = {int(n) for word, n in said if word == old}
        assert len(memory) == 5
        assert memory != set(range(5)), "of all conversations, not of the first"
    news = [int(n) for word, n in said if word == "loom"]
    epochs = [tuple(news[i : i + 40]) for i in range(0, 1480, 40)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs), "nothing new is lost"
    assert len(set(epochs)) == len(epochs), "each epoch has an order of its own"
    for step in range(0, 2000, 8):
        assert sum(word == "loom" for word, _ in said[step : step + 8]) == 6


def test_endless_tasks_and_other_seeds() -> None:
    endless = Numbered(word="loom", endless=True)
    replayed = Replayed(new=endless, old=(endless.replace(word="warp"),), kept=50)
    assert replayed.count() is None
    first = [replayed.conversation(i) for i in range(40)]
    words = [chat.messages[0].content.split() for chat in first]
    assert [int(n) for word, n in words if word == "loom"] == list(range(30))
    assert all(int(n) < 50 for word, n in words if word == "warp")
    assert first == [replayed.conversation(i) for i in range(40)]
    assert first != [replayed.replace(seed=1).conversation(i) for i in range(40)]


def test_too_small_a_task_is_named() -> None:
    replayed = Replayed(
        new=Numbered(word="loom"), old=(Numbered(word="warp", amount=3),), kept=4, share=0.9
    )
    with pytest.raises(ConfigError, match="one has only 3; lower `kept`"):
        [replayed.conversation(i) for i in range(20)]
