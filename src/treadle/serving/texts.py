"""One text or several, as strings or as tokens."""

from __future__ import annotations

from treadle.serving.errors import ApiError

Text = str | list[int]


def several(
    given: str | list[str] | list[int] | list[list[int]], limit: int, param: str
) -> list[Text]:
    """
    Raises:
        ApiError: there are none, or more than `limit`.
    """
    texts: list[Text] = []
    if isinstance(given, str):
        texts = [given]
    elif given and isinstance(given[0], int):
        texts = [[token for token in given if isinstance(token, int)]]
    else:
        texts = [item for item in given if not isinstance(item, int)]
    if not texts:
        raise ApiError(400, f"`{param}` is empty", param=param)
    if len(texts) > limit:
        raise ApiError(400, f"`{param}` has {len(texts)} texts; at most {limit}", param=param)
    return texts
