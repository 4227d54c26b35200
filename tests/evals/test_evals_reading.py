"""Tasks of models with heads: their metrics against seqeval, scikit-learn and scipy, and a run."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import seqeval.metrics
import sklearn.metrics
import torch
from scipy import stats
from tiny_readers import WORDS, framed_tokenizer, tiny_encoder, write_rows

from treadle.core.errors import TreadleError
from treadle.data.labelled import TaskFiles
from treadle.data.split import LeakFreeSplit
from treadle.data.task_formats import ClassFormat, RatedFormat, TagFormat
from treadle.evals.classes import TextClasses, label_figures
from treadle.evals.grades import Grades, pearson, ranks, resampled, spearman
from treadle.evals.harness import evaluate
from treadle.evals.spans import WordLabels, span_figures, spans_of
from treadle.evals.store import fingerprint
from treadle.evals.task import Subject
from treadle.inference.engine import EngineConfig
from treadle.models.decoder import DecoderModel
from treadle.models.heads import ClassHead, EmbeddingHead, NumberHead, TextReadout, TokenHead
from treadle.models.pooling import FirstToken, MeanPooling
from treadle.nn.layout import Layout

ALL = LeakFreeSplit(validation=0, test=0)
TAGS = ("O", "B-person", "I-person", "B-place", "I-place")


def files(path: Path, rows, format) -> TaskFiles:
    return TaskFiles(path=write_rows(path, rows), format=format, parts=ALL)


@pytest.mark.parametrize("labels", [TAGS, ("O", "B", "I", "B-x", "I-x")], ids=("typed", "bare"))
def test_spans_are_those_of_seqeval(labels: tuple[str, ...]) -> None:
    """Random tags, most of them no proper BIO; seqeval calls what has no type `_`."""
    generator = np.random.default_rng(0)
    gold, said = (
        [[labels[i] for i in generator.integers(0, 5, n)] for n in range(1, 40)] for _ in range(2)
    )
    for tags in gold:
        expected = seqeval.metrics.sequence_labeling.get_entities(tags)
        found = {(s.type or "_", s.start, s.end - 1) for s in spans_of(tags)}
        assert found == set(expected), tags
    counts = [
        {
            "right": len(spans_of(a) & spans_of(b)),
            "said": len(spans_of(b)),
            "gold": len(spans_of(a)),
            "words_right": sum(x == y for x, y in zip(a, b, strict=True)),
            "words": len(a),
            "words_outside": a.count("O"),
        }
        for a, b in zip(gold, said, strict=True)
    ]
    figures = span_figures(counts)
    for name, theirs in (
        ("f1", seqeval.metrics.f1_score),
        ("precision", seqeval.metrics.precision_score),
        ("recall", seqeval.metrics.recall_score),
        ("word_accuracy", seqeval.metrics.accuracy_score),
    ):
        assert figures[name]["value"] == pytest.approx(theirs(gold, said)), name
        assert figures[name]["low"] < figures[name]["value"] < figures[name]["high"]


def test_classes_are_counted_as_scikit_learn_does() -> None:
    generator = np.random.default_rng(1)
    names = ("a", "b", "c", "never said")
    gold = [names[i] for i in generator.choice(4, 200, p=(0.6, 0.2, 0.15, 0.05))]
    said = [g if generator.random() < 0.7 else names[generator.integers(0, 3)] for g in gold]
    figures = label_figures(gold, said)
    assert figures["accuracy"]["value"] == sklearn.metrics.accuracy_score(gold, said)
    expected = sklearn.metrics.f1_score(gold, said, average="macro")
    assert figures["macro_f1"]["value"] == pytest.approx(expected)
    boot = []
    for _ in range(400):
        picks = generator.integers(0, 200, 200)
        boot.append(
            sklearn.metrics.f1_score(
                [gold[i] for i in picks], [said[i] for i in picks], average="macro"
            )
        )
    low, high = np.quantile(boot, (0.025, 0.975))
    assert figures["macro_f1"]["low"] == pytest.approx(low, abs=0.02)
    assert figures["macro_f1"]["high"] == pytest.approx(high, abs=0.02)
    assert figures["majority"]["value"] == gold.count("a") / 200


def test_intervals_of_what_is_rare() -> None:
    """One span is said of twenty texts: of a third of all resamples there is no precision."""
    plain = {"right": 0, "said": 0, "gold": 0, "words_right": 3, "words": 3, "words_outside": 3}
    once = {**plain, "right": 1, "said": 1, "gold": 1, "words_outside": 2}
    precision = span_figures([once, *[plain] * 19])["precision"]
    assert (precision["value"], precision["low"], precision["high"]) == (1.0, 1.0, 1.0)


def test_many_labels_take_little_memory() -> None:
    names = [str(i) for i in range(400)]
    tracemalloc.start()
    figures = label_figures(names, names)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert figures["macro_f1"]["value"] == 1.0
    assert peak < 100e6, "a table of 400 x 400 a resample would take 1.3 GB together"


def test_what_has_no_correlation_has_no_interval() -> None:
    for said, gold in (([1.0], [2.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])):
        figure = resampled(spearman, np.array(said), np.array(gold))
        assert np.isnan(figure["value"])
        assert (figure["low"], figure["high"]) == (None, None)


def test_a_model_that_gives_no_numbers_is_named(tmp_path: Path) -> None:
    model = ClassHead(labels=("a", "b"))(tiny_encoder())
    with torch.no_grad():
        model.head.linear.bias.fill_(float("nan"))
    rows = [{"text": "warm", "label": "a"}]
    task = TextClasses(name="words", texts=files(tmp_path / "a.jsonl", rows, ClassFormat()))
    with pytest.raises(TreadleError, match="gives numbers that are none"):
        evaluate(model, framed_tokenizer(), [task])


def test_correlations_are_those_of_scipy() -> None:
    generator = np.random.default_rng(2)
    a = generator.integers(0, 6, 50).astype(float)
    b = a + generator.normal(size=50)
    assert ranks(a).tolist() == stats.rankdata(a).tolist()
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert np.isnan(pearson(a, np.ones(50)))


def knowing(model: DecoderModel, word: str) -> DecoderModel:
    """A class head that says the second label where the first word is `word`."""
    head = model.head
    assert isinstance(head, TextReadout)
    tokenizer = framed_tokenizer()
    with torch.no_grad():
        states = []
        for other in WORDS:
            ids = torch.tensor(tokenizer.encode(other, add_special=True))
            states.append(head.pool(model(ids), Layout((len(ids),)))[0])
        target = torch.tensor([1.0 if w == word else -1.0 for w in WORDS])
        stacked = torch.cat([torch.stack(states), torch.ones(len(WORDS), 1)], 1)
        solution = torch.linalg.lstsq(stacked, target[:, None]).solution[:, 0]
        head.linear.weight.copy_(torch.stack([-solution[:-1], solution[:-1]]))
        head.linear.bias.copy_(torch.stack([-solution[-1], solution[-1]]))
    return model


def test_a_model_that_knows_is_right(tmp_path: Path) -> None:
    model = knowing(ClassHead(labels=("other", "loom"))(tiny_encoder()), "loom")
    rows = [{"text": w, "label": "loom" if w == "loom" else "other"} for w in WORDS]
    task = TextClasses(name="words", texts=files(tmp_path / "a.jsonl", rows, ClassFormat()))
    result = evaluate(model, framed_tokenizer(), [task], tokens=7).tasks["words"].scores
    assert result["accuracy"]["value"] == 1.0
    assert result["majority"]["value"] == 0.9
    wrong = [{"text": w, "label": "loom" if w != "loom" else "other"} for w in WORDS]
    task = TextClasses(name="words", texts=files(tmp_path / "b.jsonl", wrong, ClassFormat()))
    result = evaluate(model, framed_tokenizer(), [task]).tasks["words"].scores
    assert result["accuracy"]["value"] == 0.0


def test_words_that_are_cut_off_are_outside(tmp_path: Path) -> None:
    model = TokenHead(labels=TAGS)(tiny_encoder())
    with torch.no_grad():
        model.head.linear.weight.zero_()
        model.head.linear.bias.copy_(torch.tensor([0.0, 1, 0, 0, 0]))  # B-person, always
    rows = [{"tokens": ["red"] * 6, "tags": ["B-person"] * 6}]
    task = WordLabels(name="spans", texts=files(tmp_path / "a.jsonl", rows, TagFormat()), longest=6)
    scores = evaluate(model, framed_tokenizer(), [task]).tasks["spans"].scores
    assert scores["precision"]["value"] == 1.0
    assert scores["recall"]["value"] == pytest.approx(4 / 6)  # [CLS], four words, [SEP]
    assert scores["all_outside"]["value"] == 0.0
    other = TokenHead(labels=("B-person", "I-person"))(tiny_encoder())
    with pytest.raises(TreadleError, match="none of the labels B-person, I-person is `O`"):
        evaluate(other, framed_tokenizer(), [task])
    ended = TokenHead(labels=(*TAGS, "E-person"))(tiny_encoder())
    with pytest.raises(TreadleError, match="label `E-person` is not of the scheme B- I- O"):
        evaluate(ended, framed_tokenizer(), [task])


def test_an_embedding_model_rates_by_cosine(tmp_path: Path) -> None:
    pairs = [("warm", "warm"), ("warm", "cold loom"), ("red", "blue thread old")]
    model = EmbeddingHead()(tiny_encoder())
    found = []
    for a, b in pairs:
        tokenizer = framed_tokenizer()
        va, vb = (
            model(torch.tensor(tokenizer.encode(t, add_special=True))).mean(0) for t in (a, b)
        )
        found.append((va @ vb / va.norm() / vb.norm()).item())
    rows = [{"text": a, "second": b, "score": s} for (a, b), s in zip(pairs, found, strict=True)]
    texts = files(tmp_path / "a.jsonl", rows, RatedFormat(second="second"))
    task = Grades(name="likeness", texts=texts)
    scores = evaluate(model, framed_tokenizer(), [task]).tasks["likeness"].scores
    assert scores["spearman"]["value"] == pytest.approx(1.0)
    assert scores["pearson"]["value"] == pytest.approx(1.0)
    alone = Grades(name="likeness", texts=texts.replace(format=RatedFormat()))
    with pytest.raises(TreadleError, match="an embedding model rates pairs"):
        evaluate(model, framed_tokenizer(), [alone])
    evaluate(NumberHead()(tiny_encoder()), framed_tokenizer(), [task])


def test_how_a_head_pools_is_part_of_what_is_kept(tmp_path: Path) -> None:
    """The same weights with another head are another model to the records."""
    marks = set()
    for pooling in (MeanPooling(), FirstToken()):
        model = EmbeddingHead(pooling=pooling)(tiny_encoder())
        marks.add(
            fingerprint(Subject(model, framed_tokenizer(), 64, EngineConfig(), torch.no_grad))
        )
    assert len(marks) == 2


def test_models_without_the_head_are_refused(tmp_path: Path) -> None:
    rows = [{"text": "warm", "label": 0}]
    task = TextClasses(name="words", texts=files(tmp_path / "a.jsonl", rows, ClassFormat()))
    with pytest.raises(TreadleError, match="no head for a task"):
        evaluate(tiny_encoder(), framed_tokenizer(), [task])
    with pytest.raises(TreadleError, match="task `words`: the model gives no labels"):
        evaluate(NumberHead()(tiny_encoder()), framed_tokenizer(), [task])
