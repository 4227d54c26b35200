"""Common sense by multiple choice: ARC, PIQA, HellaSwag, Winogrande, BoolQ.

Rows come as the data sets on the hub have them, or already prepared as `{"query", "choices",
"gold"}` (Winogrande: `{"context_options", "continuation", "gold"}`).
"""

from __future__ import annotations

import re

from treadle.core.cards import Card
from treadle.evals.multiple_choice import MultipleChoice, Question, ask
from treadle.evals.rows import Row, wrong_row

CARD = Card(
    id="ev.commonsense",
    paper=(
        "Clark et al. 2018, arXiv:1803.05457; Bisk et al. 2020, arXiv:1911.11641; "
        "Zellers et al. 2019, arXiv:1905.07830; Sakaguchi et al. 2020, arXiv:1907.10641; "
        "Clark et al. 2019, arXiv:1905.10044"
    ),
    summary="ARC, PIQA, HellaSwag, Winogrande and BoolQ by log-likelihood.",
    recipe="treadle eval smollm2-135m-instruct --like standard-benchmarks",
    oracle="tests/evals/test_evals_commonsense.py::test_matches_lm_eval",
)


class ARC(MultipleChoice):
    """Science questions of school exams; easy or challenge, as the rows are."""

    name: str = "arc"

    def question(self, row: Row) -> Question:
        match row:
            case {"query": str(query), "choices": [*choices], "gold": int(gold)}:
                return ask(f"{query.rstrip()}\nAnswer:", choices, gold)
            case {"question": str(text), "choices": {"text": [*texts], "label": [*labels]}}:
                gold = labels.index(row["answerKey"])
                return ask(f"Question: {text}\nAnswer:", texts, gold)
        raise wrong_row(self.name, row)


class PIQA(MultipleChoice):
    """How to reach a goal with everyday things."""

    name: str = "piqa"

    def question(self, row: Row) -> Question:
        match row:
            case {"query": str(query), "choices": [*choices], "gold": int(gold)}:
                return ask(f"{query.rstrip()}\nAnswer:", choices, gold)
            case {"goal": str(goal), "sol1": str(one), "sol2": str(two), "label": int(gold)}:
                return ask(f"Question: {goal}\nAnswer:", (one, two), gold)
        raise wrong_row(self.name, row)


class HellaSwag(MultipleChoice):
    """How a described scene goes on."""

    name: str = "hellaswag"

    def question(self, row: Row) -> Question:
        match row:
            case {"query": str(query), "choices": [*choices], "gold": int(gold)}:
                return ask(query, choices, gold)
            case {"ctx_a": str(a), "ctx_b": str(b), "activity_label": label, "endings": [*ends]}:
                context = clean(f"{label}: {a} {b.capitalize()}")
                return ask(context, [clean(end) for end in ends], int(row["label"]))
        raise wrong_row(self.name, row)


class BoolQ(MultipleChoice):
    """Yes or no, after a passage."""

    name: str = "boolq"

    def question(self, row: Row) -> Question:
        match row:
            case {"query": str(query), "choices": [*choices], "gold": int(gold)}:
                return ask(f"{query.rstrip()}\nAnswer:", choices, gold)
            case {"passage": str(passage), "question": str(text)}:
                context = f"{passage}\nQuestion: {text}?\nAnswer:"
                return ask(context, ("no", "yes"), int(row["label"]))
        raise wrong_row(self.name, row)


class Winogrande(MultipleChoice):
    """Whom a pronoun means: the end of the sentence is scored after each of two names
    (partial evaluation, Trinh and Le 2018, arXiv:1806.02847)."""

    name: str = "winogrande"

    def question(self, row: Row) -> Question:
        match row:
            case {"context_options": [*contexts], "continuation": str(end), "gold": int(gold)}:
                return partial(contexts, end, gold)
            case {"sentence": str(text), "option1": str(one), "option2": str(two)}:
                start, _, end = text.partition("_")
                return partial([start + one, start + two], end.strip(), int(row["answer"]) - 1)
        raise wrong_row(self.name, row)


def partial(contexts: list[str], end: str, gold: int) -> Question:
    """One continuation after several contexts, which are the choices."""
    ends = (f" {end}",) * len(contexts)
    return Question(tuple(contexts), ends, choices=tuple(contexts), gold=gold)


def clean(text: str) -> str:
    """HellaSwag's WikiHow half carries marks such as `[title]`."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
