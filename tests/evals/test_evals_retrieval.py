"""Retrieval and reranking against sentence-transformers' evaluator, and real MiniLM on SciFact."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from tiny_readers import WORDS, framed_tokenizer, tiny_encoder, write_rows

from treadle.core.errors import FileFormatError, TreadleError
from treadle.data.labelled import TaskFiles
from treadle.data.split import LeakFreeSplit
from treadle.data.task_formats import MatchFormat
from treadle.evals.harness import evaluate
from treadle.evals.retrieval import Reranking, Retrieval, ranking_metrics
from treadle.models.heads import EmbeddingHead, NumberHead
from treadle.models.hub.load import load_model
from treadle.tokenizers.tokenizer import Tokenizer

ALL = LeakFreeSplit(validation=0, test=0)


def test_metrics_match_sentence_transformers() -> None:
    chooser = random.Random(0)
    ids = [f"d{i}" for i in range(150)]
    ranked = {f"q{i}": chooser.sample(ids, 100) for i in range(20)}
    relevant = {q: set(chooser.sample(ids, chooser.randint(1, 14))) for q in ranked}
    theirs = InformationRetrievalEvaluator(
        queries={q: q for q in ranked},
        corpus={d: d for d in ids},
        relevant_docs=relevant,
        mrr_at_k=[10],
        ndcg_at_k=[10],
        accuracy_at_k=[1],
        precision_recall_at_k=[1, 10, 100],
        map_at_k=[10],
    )
    hits = [
        [{"corpus_id": d, "score": -i} for i, d in enumerate(ranked[q])] for q in theirs.queries_ids
    ]
    expected = theirs.compute_metrics(hits)
    ours = [ranking_metrics(ranked[q], relevant[q]) for q in theirs.queries_ids]
    for name, value in (
        ("ndcg@10", expected["ndcg@k"][10]),
        ("mrr@10", expected["mrr@k"][10]),
        ("recall@1", expected["recall@k"][1]),
        ("recall@10", expected["recall@k"][10]),
        ("recall@100", expected["recall@k"][100]),
    ):
        assert sum(m[name] for m in ours) / len(ours) == pytest.approx(value), name


def corpus(folder: Path) -> tuple[str, str]:
    texts = [{"id": i, "title": w, "text": f"{w} {w}"} for i, w in enumerate(WORDS)]
    queries = [{"query": f"{w} {w} {w}", "relevant": [i]} for i, w in enumerate(WORDS)]
    queries.append({"query": "unanswered", "relevant": []})
    return write_rows(folder / "corpus.jsonl", texts), write_rows(folder / "q.jsonl", queries)


def test_a_query_finds_its_own_text(tmp_path: Path) -> None:
    texts, queries = corpus(tmp_path)
    task = Retrieval(name="search", corpus=texts, queries=queries)
    model = EmbeddingHead()(tiny_encoder())
    scores = evaluate(model, framed_tokenizer(), [task], tokens=20).tasks["search"].scores
    assert scores["recall@1"]["value"] == 1.0
    assert scores["ndcg@10"]["n"] == len(WORDS)
    wrong = [{"query": f"{w} {w} {w}", "relevant": [(i + 1) % 10]} for i, w in enumerate(WORDS)]
    other = task.replace(queries=write_rows(tmp_path / "wrong.jsonl", wrong))
    scores = evaluate(model, framed_tokenizer(), [other]).tasks["search"].scores
    assert scores["recall@1"]["value"] == 0.0
    assert scores["recall@10"]["value"] == 1.0


def test_a_text_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    texts, _ = corpus(tmp_path)
    rows = [{"query": f"{w} {w} {w}", "relevant": [i, i]} for i, w in enumerate(WORDS)]
    task = Retrieval(name="s", corpus=texts, queries=write_rows(tmp_path / "two.jsonl", rows))
    scores = evaluate(EmbeddingHead()(tiny_encoder()), framed_tokenizer(), [task]).tasks["s"].scores
    assert scores["recall@1"]["value"] == 1.0
    assert scores["ndcg@10"]["value"] == 1.0


def test_candidates_are_ranked_by_either_kind_of_model(tmp_path: Path) -> None:
    rows = [
        {"query": f"{w} {w}", "positive": f"{w} {w}", "negatives": [WORDS[i - 1]]}
        for i, w in enumerate(WORDS)
    ]
    path = write_rows(tmp_path / "c.jsonl", rows)
    task = Reranking(name="c", texts=TaskFiles(path=path, format=MatchFormat(), parts=ALL))
    embeds = EmbeddingHead()(tiny_encoder())
    scores = evaluate(embeds, framed_tokenizer(), [task]).tasks["c"].scores
    assert scores["accuracy"]["value"] == 1.0
    assert scores["chance"]["value"] == 0.5
    cross = NumberHead()(tiny_encoder())
    with torch.no_grad():
        cross.head.linear.weight.zero_()  # every pair alike: nothing is won by that
    scores = evaluate(cross, framed_tokenizer(), [task]).tasks["c"].scores
    assert scores["accuracy"]["value"] == 0.0
    assert scores["mrr"]["value"] == 0.5


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    texts, queries = corpus(tmp_path)
    model = EmbeddingHead()(tiny_encoder())
    task = Retrieval(name="search", corpus=texts, queries=queries)
    unknown = write_rows(tmp_path / "u.jsonl", [{"query": "warm", "relevant": ["x9"]}])
    with pytest.raises(FileFormatError, match="has no text `x9`, which a query names"):
        evaluate(model, framed_tokenizer(), [task.replace(queries=unknown)])
    with pytest.raises(FileFormatError, match="row 0: key `ids`: expected a list of ids"):
        evaluate(model, framed_tokenizer(), [task.replace(relevant="ids")])
    twice = [{"id": 3, "text": "warm"}, {"id": "3", "text": "cold"}]
    with pytest.raises(FileFormatError, match="two texts have the id `3`; give one another"):
        evaluate(
            model,
            framed_tokenizer(),
            [task.replace(corpus=write_rows(tmp_path / "t.jsonl", twice))],
        )
    with pytest.raises(FileFormatError, match="row 0: key `doc` is missing"):
        evaluate(model, framed_tokenizer(), [task.replace(id="doc")])
    with pytest.raises(FileFormatError, match="none of the keys body holds a text"):
        evaluate(model, framed_tokenizer(), [task.replace(keys=("body",))])
    with pytest.raises(TreadleError, match="gives no vectors; measure it by Reranking"):
        evaluate(NumberHead()(tiny_encoder()), framed_tokenizer(), [task])


@pytest.mark.slow
def test_real_minilm_finds_as_published(minilm: Path, shared_data: Path, tmp_path: Path) -> None:
    """SciFact, 300 claims: the model's card and BEIR's table say nDCG@10 0.645."""

    def rows(name: str):
        with gzip.open(shared_data / "rag" / name, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    claims = rows("scifact_claims_train.jsonl.gz")[:300]
    queries = [{"query": c["claim"], "relevant": c["cited_doc_ids"]} for c in claims]
    task = Retrieval(
        name="scifact",
        corpus=str(shared_data / "rag" / "scifact_corpus.jsonl.gz"),
        id="doc_id",
        queries=write_rows(tmp_path / "q.jsonl", queries),
    )
    model = EmbeddingHead()(load_model(minilm).model.requires_grad_(False))
    scores = evaluate(model, Tokenizer.load(minilm), [task]).tasks["scifact"].scores
    assert scores["ndcg@10"]["value"] > 0.6
