"""The style classifier beside scikit-learn's, and scores of style and content."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest
from chat_env import Numbered

from treadle.core.errors import ConfigError
from treadle.data.persona import Voiced
from treadle.data.records import Problem, user
from treadle.evals.style import ContentProblems, StyleProblems, grams, learn_style

STYLED = ("Arr, the ship be here!", "Aye aye, matey, hoist it.")
PLAIN = ("The ship is here.", "Please raise the flag now, thanks.", "It is so.")
TERSE = ("3 + 4 = 7", "12; 9")


def test_log_odds_match_scikit_learn() -> None:
    """Multinomial naive Bayes with add-one smoothing over 1- to 3-grams, without a prior."""
    text = pytest.importorskip("sklearn.feature_extraction.text")
    bayes = pytest.importorskip("sklearn.naive_bayes")
    counter = text.CountVectorizer(analyzer=lambda x: grams(x, 3))
    counts = counter.fit_transform([*STYLED, *PLAIN, *TERSE])
    theirs = bayes.MultinomialNB(alpha=1.0, fit_prior=False)
    theirs.fit(counts, [0] * len(STYLED) + [1] * len(PLAIN) + [2] * len(TERSE))
    ours = learn_style(STYLED, PLAIN, TERSE)
    likeliest = set()
    for said in ("Arr, raise it!", "thanks", "zebra Q", "The matey IS here.", "3 + 9 = 12"):
        log_p = theirs.predict_joint_log_proba(counter.transform([said]))[0]
        assert ours(said) == pytest.approx(log_p[0] - max(log_p[1:]), abs=1e-3)
        likeliest.add(int(log_p.argmax()))
    assert likeliest == {0, 1, 2}
    assert ours("") == 0.0


def test_shakespeare_is_told_from_children_s_tales(shared_data: Path) -> None:
    def passages(name: str, count: int) -> list[str]:
        with gzip.open(shared_data / "lm" / name, "rt", encoding="utf-8") as file:
            words = file.read(400_000).split()
        pieces = [" ".join(words[i : i + 30]) for i in range(0, len(words) - 30, 30)]
        return random.Random(0).sample(pieces, count)

    bard = passages("tinyshakespeare.txt.gz", 300)
    tales = passages("tinystories_sample.txt.gz", 300)
    classify = learn_style(bard[:200], tales[:200])
    right = sum(classify(x) > 0 for x in bard[200:]) + sum(classify(x) <= 0 for x in tales[200:])
    assert right >= 190


def test_scores_of_style_and_content() -> None:
    plain = Numbered(word="loom", amount=12)
    voiced = Voiced(conversations=plain, openings=("Arr, matey!",), closings=("Aye, sail on.",))
    style = StyleProblems(styled=voiced, plain=plain, who="A sailor.", known=8)
    problem = style.problem(1)
    assert [m.role for m in problem.prompt] == ["system", "user"]
    assert problem.prompt[1].content == "loom 9"
    assert problem.answer == voiced.conversation(9).messages[-1].content
    assert style.score(problem, "Arr, sail on, matey") == 1.0
    assert style.score(problem, "llllll") == 0.0
    wordy = Numbered(word="Pray tell me what the looms on that hill are for", amount=12)
    among = style.replace(styled=voiced.replace(conversations=wordy), plain=wordy)
    for asked, said in ((style, 1.0), (among, 0.0)):  # it sounds more like one who asks
        assert asked.score(problem, "I tell thee what those hills are for") == said
    assert style.score(problem, "") == 0.0
    assert style.replace(who="").problem(1).prompt == (user("loom 9"),)
    content = ContentProblems(style=style, ignored=("arr", "matey", "aye", "sail", "on"))
    assert content.problem(1).answer == problem.answer
    right = problem.answer.split("\n")[1]
    assert content.score(problem, f"Well: {right}!") == 1.0
    assert content.score(problem, "Arr, matey!") == 0.0
    half = Problem((user("?"),), "one two, Three four", "content")
    assert content.score(half, "FOUR and (two)?") == pytest.approx(0.5)
    assert content.score(Problem((user("?"),), "Arr!", "content"), "anything") == 1.0


def test_a_style_needs_texts_of_each_kind() -> None:
    with pytest.raises(ConfigError, match="one of them has none"):
        learn_style([], PLAIN)


def test_too_few_conversations_are_named() -> None:
    """Eight are there: seven to learn from and one to ask about."""
    few, many = Numbered(word="loom", amount=8), Numbered(word="warp", endless=True)
    style = StyleProblems(styled=few, plain=many, known=7)
    assert style.problem(0).prompt == (user("loom 7"),)
    with pytest.raises(ConfigError, match=r"9 conversations of Numbered are needed.*there are 8"):
        style.problem(1)
    other = StyleProblems(styled=many, plain=few, known=9)
    with pytest.raises(ConfigError, match=r"9 conversations of Numbered are needed.*there are 8"):
        other.score(other.problem(0), "loom")
