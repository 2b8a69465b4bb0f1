"""Takes typed, bounded values out of JSON that came from a device. Pure.

Whatever is wrong with a value ends in one `FormatError` that says where it is and what it should
be. A wrong value is shown shortened: it may be as large as the place it came from.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from pool.errors import FormatError

#: Characters of a wrong value that a message shows.
SHOWN = 40
#: Times in seconds stay far below.
REAL_MAX = 1e15


def parse(data: bytes | memoryview, what: str) -> object:
    """The value of JSON text. Raises FormatError, also for what is nested too deep."""
    try:
        value: object = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is not JSON ({type(error).__name__})") from None
    return value


def shown(value: object) -> str:
    """A value for a message."""
    if isinstance(value, str | int | float) or value is None:
        text = ascii(value)
        return text if len(text) <= SHOWN else text[:SHOWN] + "..."
    return f"a {type(value).__name__}"


def number(value: object, low: int, high: int, where: str) -> int:
    """A whole number from `low` to `high`. True and 1.0 are none."""
    if type(value) is not int or not low <= value <= high:
        raise FormatError(f"{where} is {shown(value)}, not a number from {low} to {high}")
    return value


def numbers(value: object, length: int, high: int, where: str) -> list[int]:
    """A list of `length` numbers from 0 to `high`."""
    if not isinstance(value, list) or len(value) != length:
        raise FormatError(f"{where} is not a list of {length} numbers")
    return [number(item, 0, high, f"{where}[{at}]") for at, item in enumerate(value)]


class Fields:
    """One JSON object, as a place to take values from. `where` names it in messages."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{where} is {shown(value)}, not an object")
        self._value: dict[str, object] = value
        self.where = where

    @property
    def value(self) -> dict[str, object]:
        """The object itself, of which nothing but its kind is known."""
        return self._value

    def _get(self, key: str) -> tuple[object, str]:
        if key not in self._value:
            raise FormatError(f"{self.where} has no {key}")
        return self._value[key], f"{self.where}.{key}"

    def number(self, key: str, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        value, where = self._get(key)
        return number(value, low, high, where)

    def real(self, key: str) -> float:
        """A number that need not be whole, but has an end."""
        value, where = self._get(key)
        if type(value) not in (int, float) or not -REAL_MAX < value < REAL_MAX:  # type: ignore[operator]
            raise FormatError(f"{where} is {shown(value)}, not a number")
        return value  # type: ignore[return-value]

    def text(self, key: str, longest: int) -> str:
        """A string that can be printed on one line."""
        value, where = self._get(key)
        if not isinstance(value, str) or len(value) > longest or not value.isprintable():
            raise FormatError(f"{where} is {shown(value)}, not a line of text")
        return value

    def string(self, key: str, longest: int, default: str | None = None) -> str:
        """Any string; `default`, if there is one, for none."""
        if default is not None and key not in self._value:
            return default
        value, where = self._get(key)
        if not isinstance(value, str) or len(value) > longest:
            raise FormatError(f"{where} is {shown(value)}, not a string")
        return value

    def one_of(self, key: str, values: Collection[str]) -> str:
        """One of some strings."""
        value, where = self._get(key)
        if not isinstance(value, str) or value not in values:
            raise FormatError(f"{where} is {shown(value)}, not {' or '.join(sorted(values))}")
        return value

    def hex(self, key: str, digits: int) -> str:
        """So many hexadecimal digits."""
        value, where = self._get(key)
        if not isinstance(value, str) or len(value) != digits or set(value) - set(
            "0123456789abcdef"
        ):  # fmt: skip
            raise FormatError(f"{where} is {shown(value)}, not {digits} hexadecimal digits")
        return value

    def texts(self, key: str) -> dict[str, str]:
        """An object of strings."""
        value, where = self._get(key)
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise FormatError(f"{where} is not an object of strings")
        return value

    def flag(self, key: str) -> bool:
        """True or false; false if it is not there."""
        value = self._value.get(key, False)
        if not isinstance(value, bool):
            raise FormatError(f"{self.where}.{key} is {shown(value)}, not true or false")
        return value

    def below(self, key: str) -> Fields:
        """An object below."""
        value, where = self._get(key)
        return Fields(value, where)

    def items(self, key: str) -> list[object]:
        """A list."""
        value, where = self._get(key)
        if not isinstance(value, list):
            raise FormatError(f"{where} is {shown(value)}, not a list")
        return value

    def objects(self, key: str) -> Iterator[Fields]:
        """The objects of a list."""
        for at, value in enumerate(self.items(key)):
            yield Fields(value, f"{self.where}.{key}[{at}]")

    def only(self, keys: Collection[str]) -> None:
        """Refuse keys that are not known."""
        unknown = self._value.keys() - set(keys)
        if unknown:
            raise FormatError(f"{self.where} has an unknown {shown(min(unknown))}")
