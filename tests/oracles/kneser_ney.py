"""Interpolated modified Kneser-Ney, written slowly from Chen and Goodman 1998.

Equation 26 and the text around it, with dictionaries and recursion.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

Gram = tuple[int, ...]


class NaiveKneserNey:
    def __init__(self, documents: Sequence[Sequence[int]], order: int, vocab: int) -> None:
        self.order, self.vocab = order, vocab
        self.count: Counter[Gram] = Counter()
        predecessors: dict[Gram, set[int]] = defaultdict(set)
        for document in documents:
            for start in range(len(document)):
                for length in range(1, order + 1):
                    gram = tuple(document[start : start + length])
                    if len(gram) == length:
                        self.count[gram] += 1
                        if start > 0:
                            predecessors[gram].add(document[start - 1])
        self.predecessors = predecessors
        self.discount = {k: self._discounts(k) for k in range(1, order + 1)}

    def adjusted(self, gram: Gram) -> int:
        """Count at the top, number of different predecessors below it."""
        if len(gram) == self.order:
            return self.count[gram]
        return len(self.predecessors.get(gram, ()))

    def _discounts(self, length: int) -> list[float]:
        values = [self.adjusted(g) for g in self.count if len(g) == length]
        n1, n2, n3, n4 = (sum(v == c for v in values) for c in (1, 2, 3, 4))
        if min(n1, n2, n3, n4) == 0:
            return [0.5, 1.0, 1.5]
        y = n1 / (n1 + 2 * n2)
        found = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        sound = 0 < found[0] <= 1 and 0 < found[1] <= 2 and 0 < found[2] <= 3
        return found if sound else [0.5, 1.0, 1.5]

    def d(self, length: int, a: int) -> float:
        return 0.0 if a == 0 else self.discount[length][min(a, 3) - 1]

    def p(self, word: int, context: Gram) -> float:
        """Probability of a word after a context of at most order - 1 tokens."""
        length = len(context) + 1
        lower = self.p(word, context[1:]) if context else 1.0 / self.vocab
        following = [self.adjusted((*context, v)) for v in range(self.vocab)]
        total = sum(following)
        if total == 0:
            return lower
        a = following[word]
        rest = sum(self.d(length, b) for b in following) / total
        return (a - self.d(length, a)) / total + rest * lower
