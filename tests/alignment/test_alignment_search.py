"""A search as a tool: its ranks by the formula, and a country that has to be looked up."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest

from treadle.alignment import search
from treadle.alignment.lookups import BUILDINGS, InventedFacts, LookUps, buildings
from treadle.alignment.reasoning_gym import split_of
from treadle.alignment.search import SearchTool, opened_index, words_of
from treadle.alignment.tool_solutions import CalculatorSolutions, SearchSolutions
from treadle.alignment.tools import Calculator, WithTools, call_text
from treadle.core.errors import TreadleError
from treadle.data.bm25 import B, K
from treadle.data.documents import Documents
from treadle.data.texts import TextFiles

pytest.importorskip("bm25s")
SMALL = InventedFacts(towns=6)


def by_hand(passages: list[str], query: str) -> list[float]:
    texts = [words_of(p) for p in passages]
    mean = sum(map(len, texts)) / len(texts)
    found = []
    for words in texts:
        counts, total = Counter(words), 0.0
        for word in set(words_of(query)):
            having = sum(word in t for t in texts)
            rare = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
            f = counts[word]
            total += rare * f / (f + K * (1 - B + B * len(words) / mean))
        found.append(total)
    return found


def test_passages_are_ranked_as_bm25_ranks_them() -> None:
    passages, _ = opened_index(SMALL)
    assert len(passages) == 3 * 5 * 6
    tool = SearchTool(documents=SMALL, found=3)
    first = buildings(SMALL)[7]
    for query in (f"{first.kind} of {first.town} built", f"{first.founder} born", "MILLS, bridges"):
        scores = by_hand(passages, query)
        best = sorted(range(len(passages)), key=lambda i: -scores[i])[:3]
        assert tool({"query": query}).splitlines() == [passages[i] for i in best]


def test_what_shares_no_word_is_not_told() -> None:
    tool = SearchTool(documents=SMALL, found=50, longest=20)
    assert tool({"query": "zebra"}) == "nothing was found"
    told = tool({"query": buildings(SMALL)[0].founder}).splitlines()
    assert 1 < len(told) < 50
    assert max(map(len, told)) == 20
    with pytest.raises(KeyError):
        tool({"words": "mill"})


def test_files_are_searched_whatever_their_part(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    rows = [{"text": f"note {n} on subject{n}\nand more"} for n in range(40)] + [{"text": " "}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    tool = SearchTool(documents=TextFiles(path=str(path)), found=1)
    for n in range(40):
        assert tool({"query": f"subject{n}"}) == f"note {n} on subject{n} and more"
    blank = tmp_path / "blank.jsonl"
    blank.write_text(json.dumps({"text": " "}) + "\n")
    with pytest.raises(TreadleError, match="there is no passage in the documents"):
        SearchTool(documents=TextFiles(path=str(blank)))({"query": "x"})


def test_the_country_has_one_answer_to_each_question() -> None:
    facts = InventedFacts()
    known = buildings(facts)
    assert len(known) == len(BUILDINGS) * facts.towns
    assert len({b.founder for b in known}) == len({b.name for b in known}) == len(known)
    assert buildings(facts.replace(seed=1)) != known
    texts = [t.text for t in facts.training()]
    assert len(texts) == len(set(texts)) == 3 * len(known)
    for hops, said in ((1, "built"), (2, "born")):
        sides = [LookUps(facts=facts, hops=hops, held_out=h) for h in (False, True)]
        asked = [{s.problem(i).prompt[0].content for i in range(600)} for s in sides]
        assert not asked[0] & asked[1]
        assert len(asked[0] | asked[1]) == len(known)
        towns = [{re.search(r"of (\w+) (?:built|born)", q)[1] for q in qs} for qs in asked]
        assert not towns[0] & towns[1], "nobody is asked of a town of the other side"
        problem = sides[0].problem(3)
        assert sides[0].score(problem, f"Answer: {problem.answer}") == 1.0
        assert sides[0].score(problem, f"Answer: {int(problem.answer) + 1}") == 0.0
        assert f"was {said} in {problem.answer}." in "\n".join(texts)


def test_a_country_without_held_out_towns_is_refused() -> None:
    countries = (InventedFacts(towns=4, seed=seed) for seed in range(99))
    small = next(f for f in countries if all(split_of(b.town) == "train" for b in buildings(f)))
    assert LookUps(facts=small).problem(0).answer
    with pytest.raises(TreadleError, match="none of 4 towns is on this side: take more towns"):
        LookUps(facts=small, held_out=True).problem(0)


def test_an_index_is_made_before_the_clock_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take longer than a call."""
    made: list[Documents] = []

    def index(documents: Documents) -> tuple[list[str], object]:
        made.append(documents)
        return [], None

    monkeypatch.setattr(search, "opened_index", index)
    environment = WithTools(problems=LookUps(facts=SMALL), tools=(SearchTool(documents=SMALL),))
    environment.begin(0)
    assert made == [SMALL], "before anything is said"


@pytest.mark.parametrize("hops", [1, 2])
def test_worked_plays_find_what_they_say(hops: int) -> None:
    """Each answer was read, and each name that is asked for had been read before."""
    facts = InventedFacts()
    environment = WithTools(
        problems=LookUps(facts=facts, hops=hops), tools=(SearchTool(documents=facts),)
    )
    solutions = SearchSolutions(environment=environment, amount=30)
    for index in range(30):
        *_, last = turns = solutions.conversation(index).messages
        calls = [m.content for m in turns if "<tool_call>" in m.content and m.role == "assistant"]
        assert len(calls) == hops
        read = "\n".join(m.content for m in turns[1:-1] if m.role == "user")
        assert last.content.removeprefix("Answer: ") in read
        asked = environment.problems.problem(index)
        assert environment.problems.score(asked, last.content) == 1.0
        assert last.content.removeprefix("Answer: ") not in turns[0].content
        if hops == 2:
            name = json.loads(calls[1].split(">")[1].split("<")[0])["arguments"]["query"][:-5]
            assert name in turns[2].content


def test_plays_need_the_right_tools_and_problems() -> None:
    lookups = LookUps(facts=SMALL)
    wrong = WithTools(problems=lookups, tools=(Calculator(),))
    with pytest.raises(TreadleError, match="has no SearchTool; add one to `tools`"):
        SearchSolutions(environment=wrong).conversation(0)
    with pytest.raises(TreadleError, match="these problems tell no expression"):
        CalculatorSolutions(environment=wrong).conversation(0)
    able = wrong.replace(tools=(SearchTool(documents=SMALL),))
    heard = able.begin(0).hear(0, call_text("search", query="mill"))
    assert heard.next == 0
    assert "mill" in heard.told[0]
    assert not heard.failure
