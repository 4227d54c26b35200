"""Instructions that a program can check: length, format, words.

The problem's answer is a JSON list of checks, such as

    [{"check": "words", "least": 20, "most": 60}, {"check": "mentions", "text": "loom"}]

Zhou et al. 2023, IFEval, arXiv:2311.07911.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from treadle.core.errors import TreadleError, did_you_mean
from treadle.data.records import Problem

Check = Callable[[str, dict[str, Any]], bool]


def marks(problem: Problem, completion: str) -> float:
    """1 where every check passes, else half the share that does.

    Raises:
        TreadleError: the problem's answer is no list of known checks.
    """
    followed = [CHECKS[c["check"]](completion, c) for c in _checks(problem.answer)]
    return 1.0 if all(followed) else 0.5 * sum(followed) / len(followed)


def _within(count: int, rule: dict[str, Any]) -> bool:
    return bool(rule.get("least", 0) <= count <= rule.get("most", count))


def _words(text: str, rule: dict[str, Any]) -> bool:
    return _within(len(text.split()), rule)


def _sentences(text: str, rule: dict[str, Any]) -> bool:
    return _within(len(re.findall(r"[.!?]+(?=\s|\Z)", text)), rule)


def _paragraphs(text: str, rule: dict[str, Any]) -> bool:
    return _within(len([p for p in re.split(r"\n\s*\n", text) if p.strip()]), rule)


def _bullets(text: str, rule: dict[str, Any]) -> bool:
    return _within(len(re.findall(r"^\s*[-*] \S", text, re.MULTILINE)), rule)


def _occurrences(text: str, words: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE))


def _mentions(text: str, rule: dict[str, Any]) -> bool:
    return _within(_occurrences(text, rule["text"]), {"least": 1, **rule})


def _avoids(text: str, rule: dict[str, Any]) -> bool:
    return _occurrences(text, rule["text"]) == 0


def _begins(text: str, rule: dict[str, Any]) -> bool:
    return text.strip().startswith(rule["text"])


def _ends(text: str, rule: dict[str, Any]) -> bool:
    return text.strip().endswith(rule["text"])


def _case(text: str, rule: dict[str, Any]) -> bool:
    """`lower` or `upper`; a text without letters has neither."""
    return text.islower() if rule["text"] == "lower" else text.isupper()


def _json(text: str, rule: dict[str, Any]) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


COUNTED = {"least", "most"}
CHECKS: dict[str, Check] = {
    "words": _words,
    "sentences": _sentences,
    "paragraphs": _paragraphs,
    "bullets": _bullets,
    "mentions": _mentions,
    "avoids": _avoids,
    "begins": _begins,
    "ends": _ends,
    "case": _case,
    "json": _json,
}
FIELDS = {
    "words": COUNTED,
    "sentences": COUNTED,
    "paragraphs": COUNTED,
    "bullets": COUNTED,
    "mentions": {"text", *COUNTED},
    "avoids": {"text"},
    "begins": {"text"},
    "ends": {"text"},
    "case": {"text"},
    "json": set[str](),
}
"""What each check may say beside its name; a `text` is needed, bounds are not."""


def _checks(answer: str) -> list[dict[str, Any]]:
    try:
        rules = json.loads(answer)
    except json.JSONDecodeError as error:
        raise TreadleError(f"a problem's answer is no list of checks: {error}") from None
    if not isinstance(rules, list) or not rules:
        raise TreadleError("a problem's answer is no list of checks: write at least one")
    for rule in rules:
        _require_known(rule)
    return rules


def _require_known(rule: Any) -> None:
    name = rule.get("check") if isinstance(rule, dict) else None
    if name not in CHECKS:
        raise TreadleError(f"there is no check `{name}`{did_you_mean(str(name), CHECKS)}")
    fields = set(rule) - {"check"}
    for odd in sorted(fields - FIELDS[name]):
        raise TreadleError(f"check `{name}` has no `{odd}`{did_you_mean(odd, FIELDS[name])}")
    if "text" in FIELDS[name] - fields:
        raise TreadleError(f"check `{name}` needs a `text`")
    if name == "case" and rule["text"] not in ("lower", "upper"):
        raise TreadleError(f"check `case` knows lower and upper, not `{rule['text']}`")
