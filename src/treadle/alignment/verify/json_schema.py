"""JSON that obeys a schema, which is the problem's answer."""

from __future__ import annotations

import json
import re
from typing import Any

from treadle.core.errors import TreadleError
from treadle.data.records import Problem

_FENCED = re.compile(r"\A```(?:json)?[^\S\n]*\n(.*?)\n?```\Z", re.DOTALL)


def marks(problem: Problem, completion: str) -> float:
    """1 for valid JSON, fenced or bare, that obeys the schema; half for other valid JSON.

    Raises:
        TreadleError: the problem's answer is no JSON schema, or the library is absent.
    """
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError
    except ImportError:
        raise TreadleError("JSON schemas need jsonschema: pip install 'treadle[tasks]'") from None
    try:
        schema: Any = json.loads(problem.answer)
        Draft202012Validator.check_schema(schema)
    except (json.JSONDecodeError, SchemaError) as error:
        raise TreadleError(f"a problem's answer is no JSON schema: {error}") from None
    text = completion.strip()
    fenced = _FENCED.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (json.JSONDecodeError, RecursionError):
        return 0.0
    return 1.0 if Draft202012Validator(schema).is_valid(value) else 0.5
