"""Sizes as people write them: a number and a suffix, in powers of 1024. Pure; called by the CLI."""

from __future__ import annotations

import re
from fractions import Fraction

from stripewell.errors import UserError

_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,9})?)([KMGTPE]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_SUFFIXES = " KMGTPE"

#: What an NBD export's 64-bit size and signed file offsets can express.
MAX_SIZE = 2**63 - 1


def parse_size(text: str) -> int:
    """Bytes of "20G", "1.5T" or "4096". Raises `UserError` for zero and what is no size."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{text[:80]!r} is no size: write a number and K, M, G or T, as in 20G")
    size = Fraction(match[1]) * 1024 ** _SUFFIXES.index(match[2].upper() or " ")
    if not 0 < size <= MAX_SIZE:
        raise UserError(f"{text[:80]!r} is no usable size: it must be at least 1 byte and below 8E")
    if size.denominator != 1:
        raise UserError(f"{text[:80]!r} is no whole number of bytes")
    return int(size)


def format_size(size: int) -> str:
    """The largest unit that leaves at least one, with one decimal where it tells something."""
    power = max(0, min((size.bit_length() - 1) // 10, len(_SUFFIXES) - 1)) if size > 0 else 0
    number = f"{size / 1024**power:.1f}".removesuffix(".0")
    return f"{number} {_SUFFIXES[power]}iB" if power else f"{size} B"
