"""BM25: how well each of some texts fits a question, by the words that they share.

    score(t) = sum over w in q of  ln(1 + (N - n_w + 1/2) / (n_w + 1/2))
                                   * f / (f + k (1 - b + b |t| / mean |t|)),  f of w in t

over N texts of which n_w have the word. Robertson and Zaragoza 2009; their factor k + 1 is left
out, as it changes no order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from treadle.core.errors import TreadleError

K, B = 1.5, 0.75


class WordIndex:
    """Texts, each as its words, to be asked again and again."""

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        """Raises TreadleError where bm25s is not installed."""
        try:
            from bm25s import BM25
        except ImportError:
            raise TreadleError(
                "finding passages needs bm25s: pip install 'treadle[serve]' or 'treadle[tasks]'"
            ) from None
        self.count = len(texts)
        self.bm25 = BM25(k1=K, b=B, method="lucene", dtype="float64")
        self.bm25.index([list(words) or [""] for words in texts], show_progress=False)

    def scores(self, question: Iterable[str]) -> Float[np.ndarray, " N"]:
        """Of each text; a word counts once, however often it is asked for."""
        known = sorted(w for w in set(question) if w in self.bm25.vocab_dict)
        if not known:
            return np.zeros(self.count)
        found: Float[np.ndarray, " N"] = self.bm25.get_scores(known)
        return found
