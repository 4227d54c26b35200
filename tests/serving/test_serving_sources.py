"""Documents in a chat: which passages the model sees, and what its answer took from them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import openai
import pytest

pytest.importorskip("fastapi")
from serving.tiny_server import Running, running, tiny_engine
from tiny_generation import byte_tokenizer

from treadle.serving.prompt import chat_prompt
from treadle.serving.protocol import ChatBody
from treadle.serving.sources import LONGEST, Passage, chosen, citations, passages, scores, shown
from treadle.tokenizers.template import CHATML

LOOM = "A loom weaves cloth from thread. The warp is held tight while the weft goes across."
BREAD = "Bread rises because yeast makes gas. Bake it for forty minutes in a hot oven."
ASKED = [{"role": "user", "content": "What does a loom weave?"}]
DOCUMENTS = [{"title": "bread.txt", "text": BREAD}, {"title": "loom.txt", "text": LOOM}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as it:
        yield it


def test_texts_are_cut_where_they_may_be() -> None:
    sentence = "Thread by thread the cloth grows. "
    long = (sentence * 60).strip()
    given = passages([("a", f"{LOOM}\n\n{BREAD}"), ("b", long), ("c", "x" * 2000), ("d", " \n\n ")])
    assert [p.number for p in given] == list(range(1, len(given) + 1))
    assert all(0 < len(p.text) <= LONGEST for p in given)
    assert given[0].text == f"{LOOM}\n{BREAD}", "short paragraphs go together"
    pieces = [p.text for p in given if p.title == "b"]
    assert len(pieces) == 3
    assert all(piece.endswith("grows.") for piece in pieces)
    assert " ".join(pieces).split() == long.split(), "nothing is lost"
    assert "".join(p.text for p in given if p.title == "c").replace("\n", "") == "x" * 2000
    assert not [p for p in given if p.title == "d"]
    whole = "Thread. " * 112 + "Ends"
    assert len(whole) == LONGEST
    assert [p.text for p in passages([("a", whole)])] == [whole], "just as long as may be"
    assert len(passages([("a", whole + "!")])) == 2
    first = "w" * (LONGEST - 5)
    assert len(passages([("a", f"{first}\n\nfour")])) == 1
    assert len(passages([("a", f"{first}\n\nfives")])) == 2, "the line break counts"


def test_the_best_passages_are_those_of_the_formula() -> None:
    """BM25 in plain loops, from the paper, without the constant factor."""
    texts = [
        "warp warp weft",
        "warp loom",
        "oven yeast bread bread bread",
        "weft",
        "loom loom oven",
    ]
    question = "loom and warp"
    words = [["t", *text.split()] for text in texts]
    mean = sum(map(len, words)) / len(words)
    wanted = []
    for own in words:
        score = 0.0
        for word in question.split():
            having = sum(word in other for other in words)
            count = own.count(word)
            idf = math.log(1 + (len(words) - having + 0.5) / (having + 0.5))
            score += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(own) / mean))
        wanted.append(score)
    order = sorted(range(len(texts)), key=lambda i: -wanted[i])
    given = [Passage(i, "t", text) for i, text in enumerate(texts, 1)]
    assert scores(given, question) == pytest.approx(wanted, rel=1e-9)
    assert scores([Passage(1, "", "...")], question) == [0.0], "a passage without a word"
    alone = scores([Passage(1, "", "loom")], "loom")
    assert alone == pytest.approx([math.log(4 / 3) / 2.5]), "of the mean length"
    short, _ = scores([Passage(1, "", "loom"), Passage(2, "", "loom warp weft")], "loom")
    assert short == pytest.approx(math.log(1.2) / (1 + 1.5 * (0.25 + 0.75 / 2)))
    for room in range(1, 6):
        kept = chosen(given, question, lambda text: 1, room)
        assert [p.text for p in kept] == [texts[i] for i in sorted(order[:room])]
        assert [p.number for p in kept] == list(range(1, room + 1))
    assert chosen(given, question, lambda text: 2, 5) == chosen(given, question, lambda text: 1, 2)
    assert chosen([], question, len, 100) == []


def test_what_an_answer_took() -> None:
    given = [Passage(1, "bread", BREAD), Passage(2, "loom", LOOM)]
    answer = (
        "A loom weaves cloth from thread. It costs 3.5 coins! Is it so? [9] "
        "Yeast makes gas [1]. The warp is held tight.\nCloth."
    )
    found = [(answer[c.start : c.end], c.source, c.by) for c in citations(answer, given)]
    assert found == [
        ("A loom weaves cloth from thread.", 2, "words"),
        ("Yeast makes gas [1].", 1, "mark"),
        ("The warp is held tight.", 2, "words"),
    ]
    assert citations("Both. [2][1][1] More.", given)[0].end == len("Both. [2][1][1]")
    assert [c.source for c in citations("Both. [2][1][1] More.", given)] == [2, 1]
    assert citations(answer, []) == []
    assert citations("", given) == []
    # half of its words are there: that is no source
    assert citations("Looms weave thread while engines drive ploughs across fields.", given) == []


def test_an_answer_carries_its_sources(server: Running) -> None:
    """One pass is told what a second one is shown: the tiny model says nothing of use."""
    asked = {"model": "tiny", "messages": ASKED, "max_tokens": 8, "seed": 1}
    answer = server.client.chat.completions.create(**asked, extra_body={"documents": DOCUMENTS})
    message = answer.choices[0].message
    assert [s["title"] for s in message.sources] == ["bread.txt", "loom.txt"]
    assert [s["number"] for s in message.sources] == [1, 2]
    assert message.sources[1]["text"] == LOOM
    assert message.citations == []
    stream = server.client.chat.completions.create(
        **asked, extra_body={"documents": DOCUMENTS}, stream=True
    )
    *_, last = stream
    assert last.choices[0].delta.sources == message.sources
    assert last.choices[0].delta.citations == []
    plain = server.client.chat.completions.create(**asked)
    assert not hasattr(plain.choices[0].message, "sources")
    assert plain.usage.prompt_tokens < answer.usage.prompt_tokens - len(LOOM)


def test_a_streamed_answer_is_cited(server: Running) -> None:
    """An answer forced by a format, so that it has something to cite."""
    said = r"A loom weaves cloth from thread\. Yeast makes gas \[1\]\."
    asked = {"model": "tiny", "messages": ASKED, "max_tokens": 80, "stream": True}
    own = {"documents": DOCUMENTS, "response_format": {"type": "regex", "regex": said}}
    *_, last = server.client.chat.completions.create(**asked, extra_body=own)
    text = said.replace("\\", "")
    found = [(text[c["start"] : c["end"]], c["source"]) for c in last.choices[0].delta.citations]
    assert found == [("A loom weaves cloth from thread.", 2), ("Yeast makes gas [1].", 1)]


def test_documents_are_shown_by_template_or_system_prompt() -> None:
    tokenizer = byte_tokenizer().with_template(CHATML)
    body = ChatBody.model_validate({"model": "m", "messages": ASKED, "documents": DOCUMENTS})
    plain = chat_prompt(tokenizer, body, 4096)
    assert shown(plain.sources) in plain.text
    assert plain.text.startswith("<|im_start|>system\nAnswer from the sources below.")
    assert f"[2] loom.txt\n{LOOM}" in plain.text
    knows = CHATML + "{% for d in documents %}<doc {{ d.title }}>{{ d.text }}{% endfor %}"
    known = chat_prompt(tokenizer.with_template(knows), body, 4096)
    assert f"<doc loom.txt>{LOOM}" in known.text
    assert "Answer from" not in known.text
    few = chat_prompt(tokenizer, body, 200)
    assert [p.title for p in few.sources] == ["loom.txt"], "half of the context, the best first"
    assert few.sources[0].number == 1
    named = body.model_copy(update={"documents": None})
    assert "Answer from" not in chat_prompt(tokenizer, named, 4096).text


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([{"text": "no title"}], "`documents.0.title` is missing"),
        ([{"title": "a", "text": 5}], "`documents.0.text`"),
        ([{"title": "a", "text": "b", "url": "c"}], "unknown field `documents.0.url`"),
        ([{"title": "a", "text": "b"}] * 300, "`documents`"),
        ("loom", "`documents`"),
    ],
)
def test_documents_that_are_none(server: Running, documents: object, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(message)):
        server.client.chat.completions.create(
            model="tiny", messages=ASKED, extra_body={"documents": documents}
        )


def test_a_model_is_not_asked_for_more_than_it_holds() -> None:
    engine = tiny_engine(context=512)
    body = ChatBody.model_validate(
        {"model": "m", "messages": ASKED, "documents": [{"title": "a", "text": LOOM * 900}]}
    )
    prompt = chat_prompt(engine.tokenizer, body, engine.runner.context)
    assert len(engine.tokenizer.encode(prompt.text)) < 512
