"""WikiText: perplexity of Wikipedia articles, per word of the tokenised original.

The corpus is stored in a tokenised form (`@-@`, spaces before commas); the model reads it put
back into plain English, the words and bytes that are counted are those of the stored form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from treadle.evals.perplexity import Document, Perplexity
from treadle.evals.rows import Row, wrong_row

_ARTICLE = re.compile(r"^ = [^=\n]+ = *$", re.MULTILINE)
_SPACES = (
    (r"s '", "s'"),
    (r"/' [0-9]/", r"/'[0-9]/"),
    *((rf" @{re.escape(mark)}@ ", mark) for mark in "-,."),
    *((rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)


class WikiText(Perplexity):
    """Rows `{"page": article}`, or `{"text": ...}`: running text, which is cut into articles."""

    name: str = "wikitext"

    def documents(self, rows: Iterable[Row]) -> Sequence[Document]:
        pages: list[str] = []
        running: list[str] = []
        for row in rows:
            match row:
                case {"page": str(page)}:
                    pages.append(page)
                case {"text": str(text)}:
                    running.append(text)
                case _:
                    raise wrong_row(self.name, row)
        pages += articles("".join(running)) if running else []
        return [Document(plain(page), page) for page in pages]


def articles(text: str) -> list[str]:
    """A file of WikiText at its headings of the first level."""
    starts = [m.start() for m in _ARTICLE.finditer(text)]
    if len(starts) < 2:
        return [text]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def plain(text: str) -> str:
    """The tokenised form put back into plain English."""
    for pattern, replacement in _SPACES:
        text = re.sub(pattern, replacement, text)
    return text
