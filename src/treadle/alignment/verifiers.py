"""Verifiers: is the answer at the end of a completion right?

A problem names its verifier: `exact` and `number` compare with the stored answer,
`reasoning-gym/<family>` asks that family, and the others are the modules of `verify/`.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from importlib import import_module
from pkgutil import iter_modules

from treadle.alignment import verify
from treadle.alignment.gym import family_marks
from treadle.core.errors import TreadleError, did_you_mean
from treadle.data.records import Problem

GYM = "reasoning-gym"
ANSWERED = ("exact", "number", GYM)
"""Verifiers that look at the answer alone."""
_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_NAMED = re.compile(r"\banswer(?:\s+is)?\s*[*_]*\s*:[*]*", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?[$€£]?\d[\d,]*(?:\.\d+)?%?")
_WRAPPERS = "*`$ \t\r\n"


def extract_answer(completion: str, *, lines: int = 1) -> str | None:
    """What a completion gives as its answer, or None.

    It stands in `<answer>` tags, or after `Answer:`; of several, the last counts. Markdown around
    it and the full stop behind a number are dropped.

    Args:
        lines: lines that an answer after `Answer:` may have.
    """
    tagged = _TAGGED.findall(completion)
    if tagged:
        return _clean(tagged[-1])
    named = list(_NAMED.finditer(completion))
    if not named:
        return None
    after = completion[named[-1].end() :].strip().splitlines()
    return _clean("\n".join(after[:lines]))


def marks(problem: Problem, completion: str) -> float:
    """The verifier's marks for a completion, in [0, 1]; 1 is correct, no answer is 0.

    Raises:
        TreadleError: nothing of the verifier's name is known.
    """
    kind, _, family = problem.verifier.partition("/")
    if kind in ANSWERED:
        return _answer_marks(kind, family, problem, completion)
    modules = [found.name for found in iter_modules(verify.__path__)]
    if kind not in modules:
        hint = did_you_mean(kind, (*ANSWERED, *modules))
        raise TreadleError(f"there is no verifier `{problem.verifier}`{hint}")
    module = import_module(f"{verify.__name__}.{kind}")
    return float(module.marks(problem, completion))


def _answer_marks(kind: str, family: str, problem: Problem, completion: str) -> float:
    answer = extract_answer(completion, lines=problem.answer.strip().count("\n") + 1)
    if answer is None:
        return 0.0
    match kind:
        case "exact":
            return float(answer == problem.answer.strip())
        case "number":
            given, wanted = parse_number(answer), parse_number(problem.answer)
            return float(given is not None and given == wanted)
        case _:
            return family_marks(family, problem, answer)


def parse_number(text: str) -> Decimal | None:
    """`$1,234.50` as a number; None where the text is anything else."""
    if not _NUMBER.fullmatch(text.strip()):
        return None
    try:
        return Decimal(re.sub(r"[$€£,%]", "", text.strip()))
    except InvalidOperation:
        return None


def _clean(text: str) -> str | None:
    text = text.strip(_WRAPPERS)
    if text.endswith(".") and _NUMBER.fullmatch(text[:-1]):
        text = text[:-1]
    return text or None
