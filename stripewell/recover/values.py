"""Takes values out of what was read, and believes none of them. Pure; called by all parsers."""

from __future__ import annotations

import json
from typing import Any

U16 = (1 << 16) - 1
U32 = (1 << 32) - 1
U64 = (1 << 64) - 1
#: Positions of the journal: what a map entry has room for.
POSITIONS = (1 << 62) - 1

_LONGEST = 120


class Unusable(Exception):
    """What was read is not what the format says; `str()` is a part of a sentence."""


def json_object(data: bytes, what: str) -> dict[str, Any]:
    """The object in `data`. Raises Unusable, also for what nests too deep or is no number."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise Unusable(f"{what} is no JSON") from None
    return mapping(found, what)


def mapping(value: object, what: str) -> dict[str, Any]:
    """A JSON object. Raises Unusable."""
    if not isinstance(value, dict):
        raise Unusable(f"{what} is no object")
    return value


def sequence(value: object, what: str, length: int | None = None) -> list[Any]:
    """A JSON list, of that length if one is given. Raises Unusable."""
    if not isinstance(value, list) or length not in (None, len(value)):
        raise Unusable(f"{what} is no list" + (f" of {length}" if length is not None else ""))
    return value


def integer(value: object, what: str, high: int, low: int = 0) -> int:
    """A whole number in a range. Raises Unusable."""
    if type(value) is not int or not low <= value <= high:
        raise Unusable(f"{what} is no number from {low} to {high}")
    return value


def text(value: object, what: str) -> str:
    """A string. Raises Unusable."""
    if not isinstance(value, str):
        raise Unusable(f"{what} is no text")
    return value


def plain(value: str) -> str:
    """Text from a device as a terminal may show it: short, and nothing that moves the cursor."""
    shown = value if value.isprintable() else ascii(value)[1:-1]
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 3] + "..."
