from __future__ import annotations

import gzip
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import naive_jaccard

from treadle.core.config import from_yaml, to_yaml
from treadle.data.split import LeakFreeSplit, Part, clusters_of, shingles_of


@pytest.fixture(scope="module")
def texts(shared_data: Path) -> list[str]:
    """Real questions, and near duplicates of them: some words changed, in a chain."""
    path = shared_data / "sft" / "gsm8k_train.jsonl.gz"
    with gzip.open(path, "rt") as file:
        questions = [json.loads(line)["question"] for line in file][:250]
    random.seed(0)
    out = list(questions)
    for question in questions[:80]:
        for _ in range(random.randrange(3)):
            words = question.split()
            words[random.randrange(len(words))] = random.choice(["seven", "red", "loom"])
            question = " ".join(words)
            out.append(question)
    random.shuffle(out)
    return out


@pytest.mark.parametrize("similarity", [0.4, 0.7, 0.9, 1.0])
def test_clusters_match_all_pairs(texts: list[str], similarity: float) -> None:
    ours = clusters_of([shingles_of(t, 3) for t in texts], similarity)
    naive = naive_jaccard.clusters(texts, 3, similarity)
    assert ours == naive
    assert similarity == 1.0 or len(set(naive)) < len(texts) - 20


@given(
    texts=st.lists(st.lists(st.sampled_from("abcd"), max_size=7).map(" ".join), max_size=12),
    similarity=st.sampled_from([0.2, 0.5, 0.8, 1.0]),
)
@settings(max_examples=200, deadline=None)
def test_clusters_match_all_pairs_anywhere(texts: list[str], similarity: float) -> None:
    texts = [t for t in texts if t]
    ours = clusters_of([shingles_of(t, 2) for t in texts], similarity)
    assert ours == naive_jaccard.clusters(texts, 2, similarity)


def test_no_cluster_in_two_parts(texts: list[str]) -> None:
    split = LeakFreeSplit(validation=0.2, test=0.2, similarity=0.5, shingle=3)
    parts = split(texts)
    where = defaultdict(set)
    for cluster, part in zip(naive_jaccard.clusters(texts, 3, 0.5), parts, strict=True):
        where[cluster].add(part)
    assert all(len(p) == 1 for p in where.values())
    assert set(parts) == set(Part)
    sizes = Counter(next(iter(p)) for p in where.values())
    assert sizes[Part.TEST] / len(where) == pytest.approx(0.2, abs=0.07)
    assert sizes[Part.VALIDATION] / len(where) == pytest.approx(0.2, abs=0.07)


def test_a_split_by_hash_alone_would_leak(texts: list[str]) -> None:
    """The oracle above can fail: documents split one by one break clusters."""
    split = LeakFreeSplit(validation=0.2, test=0.2, similarity=1.0, shingle=3)
    where = defaultdict(set)
    for cluster, part in zip(naive_jaccard.clusters(texts, 3, 0.5), split(texts), strict=True):
        where[cluster].add(part)
    assert any(len(p) > 1 for p in where.values())


def test_stable_under_order_layout_and_growth(texts: list[str]) -> None:
    split = LeakFreeSplit(validation=0.2, test=0.2)
    parts = dict(zip(texts, split(texts), strict=True))
    again = list(reversed(texts))
    assert [parts[t] for t in again] == split(again)
    assert split([t.upper().replace(" ", "\n ") for t in texts]) == split(texts)

    fewer = texts[::2]
    clusters = naive_jaccard.clusters(texts, 5, 0.7)
    alone = [t for t, c in zip(texts, clusters, strict=True) if clusters.count(c) == 1]
    before = dict(zip(fewer, split(fewer), strict=True))
    moved = [t for t in alone if t in before and before[t] != parts[t]]
    assert moved == []


def test_another_salt_is_another_split(texts: list[str]) -> None:
    split = LeakFreeSplit(validation=0.2, test=0.2)
    assert split.replace(salt="b")(texts) != split(texts)


def test_scripts_without_spaces_are_compared() -> None:
    a = "織機の踏み板を足で踏むと布が織れます。"
    b = a.replace("足", "手")
    assert clusters_of([shingles_of(t, 3) for t in (a, b)], 0.6) == [0, 0]
    assert len(set(clusters_of([shingles_of(t, 5) for t in ("", "!!", "...")], 0.5))) == 3


def test_config_round_trip_and_mistakes() -> None:
    split = LeakFreeSplit(validation=0.1, salt="x")
    assert from_yaml(to_yaml(split), expect=LeakFreeSplit) == split
    assert split([]) == []
    with pytest.raises(ValueError, match="nothing is left"):
        LeakFreeSplit(validation=0.5, test=0.5)
