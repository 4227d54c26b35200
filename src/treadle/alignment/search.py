"""A search among documents as a tool: the model asks in the middle of its work, reads, goes on.

    <tool_call>{"name": "search", "arguments": {"query": "mill of Varno"}}</tool_call>

Passages are found by BM25. What is read is not learned, what was asked is: Jin et al. 2025,
Search-R1, arXiv:2503.09516; Nakano et al. 2021, WebGPT, arXiv:2112.09332.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import Field

from treadle.alignment.factuality import stem
from treadle.alignment.tools import CallableTool
from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.data.bm25 import WordIndex
from treadle.data.documents import Documents

CARD = Card(
    id="al.tools.search",
    paper="Jin et al. 2025, Search-R1, arXiv:2503.09516; Robertson and Zaragoza 2009 (BM25)",
    summary="Reinforcement with a search among documents, over one hop or two.",
    recipe="treadle run search",
    oracle="tests/alignment/test_alignment_search.py::test_passages_are_ranked_as_bm25_ranks_them",
)
_WORD = re.compile(r"\w+")


class SearchTool(CallableTool):
    """The passages that fit a query best, whatever part of the documents they are in."""

    documents: Documents
    """A passage each; `TextFiles` with a `separator` cuts longer ones."""
    found: int = Field(2, ge=1)
    """Passages that are told; those without a word of the query never are."""
    longest: int = Field(180, ge=20)
    """Characters of a passage that are told."""

    def name(self) -> str:
        return "search"

    def describe(self) -> str:
        return "search(query): the passages that fit a few words best"

    def prepare(self) -> None:
        """Raises TreadleError where there is nothing to search in."""
        opened_index(self.documents)

    def __call__(self, arguments: Mapping[str, Any]) -> str:
        passages, index = opened_index(self.documents)
        scores = index.scores(words_of(str(arguments["query"])))
        best = np.argsort(-scores, kind="stable")[: self.found]
        lines = [passages[i][: self.longest] for i in best if scores[i] > 0]
        return "\n".join(lines) or "nothing was found"


def words_of(text: str) -> list[str]:
    return [stem(word.lower()) for word in _WORD.findall(text)]


@lru_cache(maxsize=4)
def opened_index(documents: Documents) -> tuple[list[str], WordIndex]:
    """All passages, and their index.

    Raises:
        TreadleError: there are none, or bm25s is not installed.
    """
    texts = (" ".join(document.text.split()) for document in documents.everything())
    passages = [text for text in texts if text]
    if not passages:
        raise TreadleError("SearchTool: there is no passage in the documents")
    return passages, WordIndex([words_of(p) for p in passages])
