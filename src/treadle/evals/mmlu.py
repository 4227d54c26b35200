"""MMLU: 57 subjects, four choices, scored by the likelihood of the letter."""

from __future__ import annotations

from treadle.core.cards import Card
from treadle.evals.multiple_choice import MultipleChoice, Question, ask
from treadle.evals.rows import Row, wrong_row

CARD = Card(
    id="ev.mmlu",
    paper="Hendrycks et al. 2021, arXiv:2009.03300",
    summary="MMLU by subject and over all, shots from the development split.",
    recipe="treadle eval smollm2-135m-instruct --like standard-benchmarks",
    oracle="tests/evals/test_evals_mmlu.py::test_matches_lm_eval",
)

LETTERS = "ABCD"


class MMLU(MultipleChoice):
    """Rows with `subject`, `question`, `choices` and `answer` (a letter or its number).

    The five questions of each subject in the development split, in their order, are the usual
    shots: `FirstShots(rows=..., count=5)`.
    """

    name: str = "mmlu"

    def question(self, row: Row) -> Question:
        match row:
            case {"subject": str(subject), "question": str(text), "choices": [*choices]}:
                pass
            case _:
                raise wrong_row(self.name, row)
        answer = row["answer"]
        gold = LETTERS.index(answer) if isinstance(answer, str) else int(answer)
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
        return ask(
            "\n".join([text.strip(), *lines, "Answer:"]),
            LETTERS,
            gold,
            group=subject,
            header=(
                "The following are multiple choice questions (with answers) about "
                f"{subject.replace('_', ' ')}.\n\n"
            ),
        )
